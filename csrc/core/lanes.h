// Eight floats side by side, for *.tier.cpp: the compiler maps them to whatever vectors the tier
// has. Sums run in a fixed number of these lanes and are folded in a fixed order, so every tier
// rounds alike.
#pragma once
#include <cstdint>

namespace torchquant {

using Float8 = float __attribute__((vector_size(32)));
using UnalignedFloat8 = float __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int64_t kFloat8 = 8;

#define TORCHQUANT_LOAD8(pointer) \
  (static_cast<Float8>(*reinterpret_cast<const UnalignedFloat8*>(pointer)))
#define TORCHQUANT_STORE8(pointer, value) (*reinterpret_cast<UnalignedFloat8*>(pointer) = (value))

// out[j][i] = in[i][j] for 8 x 8 elements; strides in elements.
static inline __attribute__((always_inline)) void transpose8(const float* in, int64_t in_stride,
                                                             float* out, int64_t out_stride) {
  Float8 r[8], s[8];
#pragma GCC unroll 8
  for (int64_t i = 0; i < 8; ++i) r[i] = TORCHQUANT_LOAD8(in + i * in_stride);
#pragma GCC unroll 4
  for (int64_t i = 0; i < 8; i += 2) {
    s[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    s[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int64_t i = 0; i < 8; i += 4) {
    r[i] = __builtin_shufflevector(s[i], s[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    r[i + 1] = __builtin_shufflevector(s[i], s[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    r[i + 2] = __builtin_shufflevector(s[i + 1], s[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    r[i + 3] = __builtin_shufflevector(s[i + 1], s[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < 4; ++i) {
    TORCHQUANT_STORE8(out + i * out_stride,
                      __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
    TORCHQUANT_STORE8(out + (i + 4) * out_stride,
                      __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
  }
}

// out[j][i] = in[i][j] for any rows x columns.
static inline void transpose(const float* in, int64_t in_stride, int64_t rows, int64_t columns,
                             float* out, int64_t out_stride) {
  const int64_t whole_rows = rows - rows % 8, whole_columns = columns - columns % 8;
  for (int64_t i = 0; i < whole_rows; i += 8) {
    for (int64_t j = 0; j < whole_columns; j += 8)
      transpose8(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j)
      out[j * out_stride + i] = in[i * in_stride + j];
  }
}

}  // namespace torchquant
