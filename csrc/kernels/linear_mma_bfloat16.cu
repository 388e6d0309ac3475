// Packed linear layers on tensor cores: rows of bfloat16.
#include <csrc/kernels/linear_mma.cuh>

namespace torchquant {

void launch_matrix_product_bfloat16(const MatrixProduct& m, void* stream) {
  launch_matrix_product_of<Floats<BFloat16>>(m, stream);
}

}  // namespace torchquant
