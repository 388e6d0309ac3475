// Packed linear layers by the tensor cores of CUDA, where the rows are float16, bfloat16 or bytes:
//
//   y[m, n] = sum_g scale[g, n] * sum_k (u[n, k] - origin + offset[g, n]) * x[m, k] + bias[n]
//
// Weights are exact in x's type but for offsets with more bits than it has; sums are float32. Bytes
// follow linear.h to the last bit.
#pragma once
#include <csrc/kernels/linear.h>

namespace torchquant {

struct TypedArray {
  const void* data;  // or null
  UnpackType type;
};

struct MatrixProduct {
  PackedProduct product;  // its bias, residual and out, and narrow or wide, are those below
  TypedArray x;           // [rows, row_inputs]: blocks as of `narrow`, the padding zeros
  int64_t row_inputs;
  TypedArray bias, residual;
  TypedArray out;  // written where there are no codes

  // How the kernel is launched: Note [shares of a matrix product].
  int tokens;  // groups of eight rows that a warp multiplies at once
  int tiles;
  int parts;
  int block_tiles;
};

// For more rows of floats, or of bytes in long groups, an unpacked weight pays.
constexpr int64_t kMostMatrixRows = 128;

void launch_matrix_product(const MatrixProduct& m, void* stream);

// Of x in that type.
void launch_matrix_product_float16(const MatrixProduct& m, void* stream);
void launch_matrix_product_bfloat16(const MatrixProduct& m, void* stream);

}  // namespace torchquant
