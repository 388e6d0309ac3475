// Matrices where they lie in a tensor of any strides.
#pragma once
#include <ATen/core/Tensor.h>

namespace torchquant {

// Of element [0, 0] of matrix `index` of x [..., R, C], counted along the leading dimensions.
inline int64_t matrix_offset(const at::Tensor& x, int64_t index) {
  int64_t offset = 0;
  for (int64_t d = x.dim() - 3; d >= 0; --d) {
    offset += index % x.size(d) * x.stride(d);
    index /= x.size(d);
  }
  return offset;
}

}  // namespace torchquant
