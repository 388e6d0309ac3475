// Packed linear layers on tensor cores: rows of float16.
#include <csrc/kernels/linear_mma.cuh>

namespace torchquant {

void launch_matrix_product_float16(const MatrixProduct& m, void* stream) {
  launch_matrix_product_of<Floats<Float16>>(m, stream);
}

}  // namespace torchquant
