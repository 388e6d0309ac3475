// The tensor side of packed linear layers on CUDA.
#pragma once
#include <ATen/core/Tensor.h>
#include <csrc/kernels/linear.h>

#include <optional>

namespace torchquant {

inline PackedProduct rows_of(const PackedProduct& all, int64_t first, int64_t count) {
  const BlockLayout& layout = all.weight.layout;
  const int64_t depth = layout.blocks * kBlockInputs;
  PackedProduct part = all;
  part.rows = count;
  if (part.narrow != nullptr) part.narrow += first * depth;
  if (part.wide != nullptr) part.wide += first * depth;
  part.sums += first * layout.groups;
  if (part.starts != nullptr) part.starts += first;
  part.a_scale += first;
  if (part.a_zero != nullptr) part.a_zero += first;
  if (part.residual != nullptr) part.residual += first * all.out_stride;
  if (part.out != nullptr) part.out += first * all.out_stride;
  if (part.codes != nullptr) part.codes += first * all.out_stride;
  return part;
}

// All but `dots` is there.
void multiply_on_cuda(const PackedProduct& all, const at::Tensor& integers);  // [M, blocks * 32]

// Whether rows of floats are multiplied as such, not as 16-bit integers; and in which of two ways.
bool takes_floats(const at::Tensor& x, int64_t rows);
bool takes_packed_weight(const at::Tensor& x, int64_t rows);

// float16 or bfloat16 times a weight that becomes such floats in registers: all of `product` is
// there but what its rows, bias and residual are. To codes, or to `out` in its dtype.
void multiply_floats(PackedProduct product, const at::Tensor& rows,  // [M, K]
                     const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& residual, const at::Tensor& out);  // [M, N]

// float x times the weight in its dtype.
at::Tensor linear_in_floats(const at::Tensor& x, const PackedWeight& weight,
                            const std::optional<at::Tensor>& bias, Epilogue epilogue,
                            const std::optional<at::Tensor>& residual);

}  // namespace torchquant
