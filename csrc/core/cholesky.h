// Cholesky factors of Gram matrices.
#pragma once
#include <ATen/core/Tensor.h>

namespace torchquant {

// Overwrites symmetric matrices A, float32 or float64 [B, K, K], with R on and above the diagonal,
// where A = R R^T: the factor that starts at the last column, so that what belongs to the last
// columns alone is its last block. Leaves anything below. Returns where this failed, bool [B]: not
// positive definite, and what is left there means nothing.
at::Tensor cholesky_(const at::Tensor& matrix);

}  // namespace torchquant
