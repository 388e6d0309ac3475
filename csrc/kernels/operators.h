// Operators that others are made of, as C++ functions; see their schemas and docstrings.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace torchquant {

using OptionalTensor = std::optional<at::Tensor>;

// Float32 outputs of a float32 or uint8 x lie in `out`, where that is given: one row after another.
at::Tensor quantized_linear(const OptionalTensor& out, const at::Tensor& x,
                            const at::Tensor& packed, const at::Tensor& grid,
                            const OptionalTensor& bias, int64_t bits, int64_t in_features,
                            int64_t out_features, int64_t group_size, const OptionalTensor& levels,
                            const OptionalTensor& input_scale,
                            const OptionalTensor& input_zero_point, int64_t input_bits,
                            std::string_view activation, const OptionalTensor& residual,
                            const OptionalTensor& output_scale,
                            const OptionalTensor& output_zero_point, int64_t output_bits,
                            std::optional<bool> input_symmetric);

at::Tensor quantized_layer_norm(const at::Tensor& x, const OptionalTensor& weight,
                                const OptionalTensor& bias, const at::Tensor& output_scale,
                                const at::Tensor& output_zero_point, int64_t output_bits,
                                double eps);

// Codes may lie as [..., L, heads, Dv].
at::Tensor quantized_attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const OptionalTensor& mask,
    const OptionalTensor& thresholds, const OptionalTensor& exponents, const OptionalTensor& eta,
    const OptionalTensor& softmax_scale, const OptionalTensor& softmax_zero_point,
    int64_t softmax_bits, std::optional<double> scale, bool is_causal,
    const OptionalTensor& query_scale, const OptionalTensor& query_zero_point, int64_t query_bits,
    const OptionalTensor& key_scale, const OptionalTensor& key_zero_point, int64_t key_bits,
    const OptionalTensor& value_scale, const OptionalTensor& value_zero_point, int64_t value_bits,
    const OptionalTensor& output_scale, const OptionalTensor& output_zero_point,
    int64_t output_bits);

}  // namespace torchquant
