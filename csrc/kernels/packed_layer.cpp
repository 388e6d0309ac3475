#include <csrc/kernels/packed_layer.h>

#include <c10/util/Exception.h>

namespace torchquant {
namespace {

constexpr size_t kTensors = 6, kNumbers = 6;

}  // namespace

OptionalTensor given(const at::Tensor& tensor) {
  return tensor.numel() > 0 ? OptionalTensor(tensor) : std::nullopt;
}

PackedLayer::PackedLayer(const char* op, const char* argument, at::TensorList tensors,
                         at::IntArrayRef numbers)
    : tensors_(tensors), numbers_(numbers) {
  TORCH_CHECK_VALUE(tensors.size() == kTensors, op, ": ", argument, " must be ", kTensors,
                    " tensors (packed, grid, bias, levels, input_scale, input_zero_point), "
                    "got ",
                    tensors.size());
  TORCH_CHECK_VALUE(numbers.size() == kNumbers, op, ": ", argument, "_numbers must be ", kNumbers,
                    " (bits, in_features, out_features, group_size, input_bits, row grids), got ",
                    numbers.size());
  TORCH_CHECK_VALUE(numbers[5] >= 0 && numbers[5] <= 2, op, ": ", argument,
                    "_numbers must end with 0 (no grid for each row), 1 (symmetric ones) or 2 "
                    "(asymmetric ones), got ",
                    numbers[5]);
  bias_ = given(tensors[2]);
  levels_ = given(tensors[3]);
  input_scale_ = given(tensors[4]);
  input_zero_point_ = given(tensors[5]);
}

at::Tensor PackedLayer::run(const at::Tensor& x, const Epilogue& epilogue,
                            const OptionalTensor& scale, const OptionalTensor& zero_point,
                            int64_t bits) const {
  return quantized_linear(epilogue.out, x, tensors_[0], tensors_[1], bias_, numbers_[0],
                          numbers_[1], numbers_[2], numbers_[3], levels_, input_scale_,
                          input_zero_point_, numbers_[4], epilogue.activation, epilogue.residual,
                          scale, zero_point, bits,
                          numbers_[5] == 0 ? std::nullopt : std::optional(numbers_[5] == 1));
}

at::Tensor PackedLayer::operator()(const at::Tensor& x, const Epilogue& epilogue) const {
  const PackedLayer* next = epilogue.next;
  if (next == nullptr || !next->input_scale_.has_value())
    return run(x, epilogue, std::nullopt, std::nullopt, 8);
  return run(x, epilogue, next->input_scale_, next->input_zero_point_, next->input_bits());
}

at::Tensor PackedLayer::codes(const at::Tensor& x, const at::Tensor& scale,
                              const at::Tensor& zero_point, int64_t bits) const {
  return run(x, {"none"}, scale, zero_point, bits);
}

}  // namespace torchquant
