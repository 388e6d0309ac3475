// Gram matrices and their inverses in a form that solvers can use: factored, damped as far as
// needed.
#pragma once
#include <ATen/core/Tensor.h>

namespace torchquant {

struct DampedFactor {
  at::Tensor upper;    // [B, K, K], upper triangular; the identity where nothing helped
  at::Tensor damping;  // [B, 1, 1] added to the diagonal
  at::Tensor failed;   // bool [B, 1, 1]: not positive definite with the largest damping either
  int64_t raised = 0;  // how often damping was raised

  int64_t status() const;  // 0 ok, 1 damping raised, 2 failed
};

// `upper` is U with (H + damping I)^-1 = U^T U. gram: float32 [B, K, K]; damp: relative to the mean
// of its diagonal. The damping of those Grams that are not positive definite, in float32, is raised
// tenfold up to three times. Runs on one thread: see Note [thread-independent codes].
DampedFactor damped_factor(const at::Tensor& gram, double damp);

// `upper` is R = U^-1 with H + damping I = R R^T; below its diagonal are leftovers. Of any columns
// and all behind them H + damping I is the product of that last block of R: whoever needs inverses
// of those blocks needs no inverse.
DampedFactor damped_cholesky(const at::Tensor& gram, double damp);

}  // namespace torchquant
