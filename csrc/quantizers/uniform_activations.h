// Codes and values of activations on given grids, for operators that find the grids first.
#pragma once
#include <ATen/core/Tensor.h>

namespace torchquant {

constexpr int64_t kActivationsPerChunk = 1 << 15;  // float32 copies of half types stay in L2

void check_activation_type(const char* op, const at::Tensor& x);

at::Tensor uniform_quantize(const at::Tensor& x, const at::Tensor& scale,
                            const at::Tensor& zero_point, int64_t bits, int64_t axis,
                            int64_t group_size);

at::Tensor uniform_dequantize(const at::Tensor& codes, const at::Tensor& scale,
                              const at::Tensor& zero_point, int64_t axis, int64_t group_size);

}  // namespace torchquant
