// Self-attention whose projections and products all take codes, as arguments of an operator.
#pragma once
#include <csrc/kernels/packed_layer.h>

namespace torchquant {

class SelfAttention {
 public:
  // As in quantized_self_attention.
  struct Arguments {
    at::TensorList qkv;
    at::IntArrayRef qkv_numbers;
    at::TensorList proj;
    at::IntArrayRef proj_numbers;
    at::TensorList scales;
    at::TensorList zero_points;
    int64_t bits;
    at::TensorList softmax;
    int64_t softmax_bits;
    int64_t num_heads;
    std::optional<double> scale;
    bool symmetric;
  };

  // The lists outlive the object.
  SelfAttention(const char* op, const Arguments& arguments);

  // Plus `residual`, where there is one.
  at::Tensor operator()(const at::Tensor& x, const OptionalTensor& mask = std::nullopt,
                        bool is_causal = false,
                        const OptionalTensor& residual = std::nullopt) const;

  const PackedLayer& first_layer() const { return in_; }
  int64_t out_features() const { return out_.out_features(); }

 private:
  const char* op_;
  Arguments arguments_;
  PackedLayer in_, out_;
};

}  // namespace torchquant
