// Packed linear layers on tensor cores: rows of integers, and which file has rows of another type.
#include <csrc/kernels/linear_mma.cuh>

namespace torchquant {

void launch_matrix_product(const MatrixProduct& m, void* stream) {
  const PackedProduct& p = m.product;
  if (p.rows == 0 || p.last_tile <= p.first_tile) return;
  if (m.x.type == UnpackType::float16) return launch_matrix_product_float16(m, stream);
  if (m.x.type == UnpackType::bfloat16) return launch_matrix_product_bfloat16(m, stream);
  launch_matrix_product_of<Integers>(m, stream);
}

}  // namespace torchquant
