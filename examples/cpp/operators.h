// Typed functions for the operators that the example calls, looked up once in the dispatcher. The
// types are those of the schemas.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace torchquant {

template <class Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// gram [K, K] += x^T x, x [..., K]
inline void gram_accumulate_(const at::Tensor& gram, const at::Tensor& x) {
  static const auto op =
      find_operator<void(const at::Tensor&, const at::Tensor&)>("torchquant::gram_accumulate_");
  op.call(gram, x);
}

struct Quantized {
  at::Tensor codes;       // uint8 [N, K]
  at::Tensor scale;       // float32 [N, G]
  at::Tensor zero_point;  // float32 [N, G]
  at::Tensor info;        // int64 [3]: status, dead input channels, times damping was raised
};

// COMQ with the operator's default options.
inline Quantized comq_quantize(const at::Tensor& weight,  // [N, K]
                               const at::Tensor& gram,    // [K, K]
                               int64_t bits, int64_t group_size) {
  using Tensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
  using Given = const std::optional<at::Tensor>&;
  static const auto op = find_operator<Tensors(
      const at::Tensor&, const at::Tensor&, int64_t, int64_t, std::string_view, Given, int64_t,
      std::string_view, bool, at::OptionalArrayRef<double>, std::string_view, Given, Given, Given)>(
      "torchquant::comq_quantize");
  auto [codes, scale, zero_point, info] =
      op.call(weight, gram, bits, group_size, "asymmetric", std::nullopt, 3, "shared", true,
              std::nullopt, "weight", std::nullopt, std::nullopt, std::nullopt);
  return {codes, scale, zero_point, info};
}

}  // namespace torchquant
