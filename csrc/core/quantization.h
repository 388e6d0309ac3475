// The tensor side of grid.h: a weight [N, K] with scale and zero_point [N, G], on CPU or CUDA.
#pragma once
#include <ATen/core/Tensor.h>
#include <csrc/core/quant_math.h>

namespace torchquant {

struct Quantization {
  at::Tensor codes;       // uint8 [N, K]
  at::Tensor scale;       // float32 [N, G]
  at::Tensor zero_point;  // float32 [N, G]
};

// The grid that spans each row or group; codes are allocated, not filled.
Quantization fit_grids(const at::Tensor& weight,  // float32 [N, K], contiguous
                       int64_t group_size, GridType type, int64_t bits);

// Fills q.codes with the nearest codes on q's grid.
void encode(const at::Tensor& weight, int64_t group_size, int64_t bits, Quantization& q);

// [..., G] -> [..., K]: the value of its group for every column.
at::Tensor expand_groups(const at::Tensor& grouped, int64_t columns, int64_t group_size);

// (codes - zero_point) * scale, for codes [..., K] and scale, zero_point [..., G].
at::Tensor values_of(const Quantization& q, int64_t group_size);

}  // namespace torchquant
