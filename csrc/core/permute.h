// Columns of a layer in another order, one order per Gram.
#pragma once
#include <ATen/core/Tensor.h>

namespace torchquant {

// out[b, n, k] = x[b, n, permutation[b, k]] for x [B, n, K] float32 or uint8 and permutation int64
// [B, K].
at::Tensor permute_columns(const at::Tensor& x, const at::Tensor& permutation);

// Rows and columns of gram [B, K, K].
at::Tensor permute_gram(const at::Tensor& gram, const at::Tensor& permutation);

}  // namespace torchquant
