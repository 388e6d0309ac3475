// One wording of errors: operator, argument, rule, what was got.
#pragma once
#include <ATen/core/Tensor.h>
#include <csrc/core/quant_math.h>

#include <string_view>

namespace torchquant {

void check_matrix(const char* op, const char* argument,
                  const at::Tensor& matrix);  // [N, K], float32 | float16 | bfloat16
// [K, K], or [B, K, K] when B problems of N / B consecutive rows each have their own Gram; float32
// | float64.
void check_gram(const char* op, const at::Tensor& gram, const at::Tensor& weight);
void check_shape(const char* op, const char* argument, const at::Tensor& tensor,
                 at::IntArrayRef shape);
void check_same_device(const char* op, const char* argument, const at::Tensor& tensor,
                       const at::Tensor& weight);
void check_positive(const char* op, const char* argument, float number);  // and finite
void check_finite(const char* op, const char* argument, const at::Tensor& tensor);
void check_bits(const char* op, int64_t bits);
void check_group_size(const char* op, int64_t group_size);
void check_shrink(const char* op, at::ArrayRef<double> shrink);
GridType parse_grid(const char* op, std::string_view grid);

inline int64_t group_count(int64_t columns, int64_t group_size) {
  return group_size == 0 ? 1 : (columns + group_size - 1) / group_size;
}

}  // namespace torchquant
