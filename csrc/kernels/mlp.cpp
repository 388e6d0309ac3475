// Two packed linear layers with an activation function between them.
#include <csrc/kernels/packed_layer.h>
#include <torch/library.h>

namespace torchquant {
namespace {

at::Tensor quantized_mlp(const at::Tensor& x, at::TensorList fc1, at::IntArrayRef fc1_numbers,
                         at::TensorList fc2, at::IntArrayRef fc2_numbers,
                         std::string_view activation) {
  const PackedLayer first("quantized_mlp", "fc1", fc1, fc1_numbers);
  const PackedLayer second("quantized_mlp", "fc2", fc2, fc2_numbers);
  return second(first(x, {activation, &second}));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "quantized_mlp(Tensor x, Tensor[] fc1, int[] fc1_numbers, Tensor[] fc2, int[] fc2_numbers, "
      "*, str activation=\"gelu\") -> Tensor");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) { m.impl("quantized_mlp", quantized_mlp); }
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) { m.impl("quantized_mlp", quantized_mlp); }
#endif

}  // namespace torchquant
