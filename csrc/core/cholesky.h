// Cholesky factors of Gram matrices.
#pragma once
#include <ATen/core/Tensor.h>

namespace torchquant {

// Overwrites symmetric matrices, float32 or float64 [B, K, K], with their lower factors, zeros
// above the diagonal. Returns where this failed, bool [B]: not positive definite, and what is left
// there means nothing.
at::Tensor cholesky_(const at::Tensor& matrix);

}  // namespace torchquant
