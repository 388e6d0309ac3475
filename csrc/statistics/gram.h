// Gram matrices: activations -> x^T x, the only thing a solver needs to know about them. ATen
// products alone, so one source serves every device and there is no leaf.
#pragma once
#include <ATen/core/Tensor.h>

namespace torchquant {

// gram[b] += x[b]^T x[b]. Half the work by symmetry: only the upper triangle is computed (and
// read), then mirrored.
void accumulate_gram(const at::Tensor& gram,  // [B, K, K] contiguous, float32 | float64
                     const at::Tensor& x);    // [B, M, K] of gram's dtype; unit stride in M or in K

}  // namespace torchquant
