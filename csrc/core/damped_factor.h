// The inverse of a Gram matrix in a form that solvers can use: factored, damped as far as needed.
#pragma once
#include <ATen/core/Tensor.h>

namespace torchquant {

struct DampedFactor {
  at::Tensor
      upper;  // [B, K, K] U with (H + damping I)^-1 = U^T U; the identity where nothing helped
  at::Tensor damping;  // [B, 1, 1] added to the diagonal
  at::Tensor failed;   // bool [B, 1, 1]: not positive definite with the largest damping either
  int64_t raised = 0;  // how often damping was raised

  int64_t status() const;  // 0 ok, 1 damping raised, 2 failed
};

// gram: float32 [B, K, K]; damp: relative to the mean of its diagonal. The damping of those Grams
// that are not positive definite, in float32, is raised tenfold up to three times. Runs on one
// thread: see Note [thread-independent codes].
DampedFactor damped_factor(const at::Tensor& gram, double damp);

}  // namespace torchquant
