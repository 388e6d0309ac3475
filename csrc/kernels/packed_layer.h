// A packed linear layer with the grid of its input, as two arguments of an operator that runs
// several layers.
#pragma once
#include <csrc/kernels/operators.h>

namespace torchquant {

// What a list of tensors has at a place; an empty tensor stands for nothing.
OptionalTensor given(const at::Tensor& tensor);

class PackedLayer {
 public:
  // tensors: packed, grid, bias, levels, input_scale, input_zero_point of quantized_linear;
  // numbers: bits, in_features, out_features, group_size, input_bits, and whether each row of the
  // input has a grid of its own: 0 no, 1 symmetric, 2 asymmetric.
  PackedLayer(const char* op, const char* argument, at::TensorList tensors,
              at::IntArrayRef numbers);

  // What becomes of the sums: activation(y) + residual, as codes where `next` takes codes.
  struct Epilogue {
    std::string_view activation = "none";
    const PackedLayer* next = nullptr;
    OptionalTensor residual = std::nullopt;
    OptionalTensor out = std::nullopt;  // where float32 outputs are to lie
  };
  at::Tensor operator()(const at::Tensor& x, const Epilogue& epilogue) const;
  at::Tensor operator()(const at::Tensor& x) const { return (*this)(x, {"none"}); }
  // Their codes on a grid for each of equal parts.
  at::Tensor codes(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& zero_point,
                   int64_t bits) const;

  int64_t out_features() const { return numbers_[2]; }
  int64_t input_bits() const { return numbers_[4]; }
  const OptionalTensor& input_scale() const { return input_scale_; }
  const OptionalTensor& input_zero_point() const { return input_zero_point_; }

 private:
  at::Tensor run(const at::Tensor& x, const Epilogue& epilogue, const OptionalTensor& scale,
                 const OptionalTensor& zero_point, int64_t bits) const;

  at::TensorList tensors_;
  at::IntArrayRef numbers_;
  OptionalTensor bias_, levels_, input_scale_, input_zero_point_;
};

}  // namespace torchquant
