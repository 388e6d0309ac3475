// What the packed kernels ask of an operator's input, and how its options read.
#pragma once
#include <ATen/core/Tensor.h>
#include <csrc/kernels/linear.h>

#include <optional>
#include <string_view>

namespace torchquant {

// The grid of the input's integers: given, or taken from the input: from magnitudes, or with
// `symmetric` as dynamic_quantize does.
struct InputGrid {
  std::optional<at::Tensor> scale;
  std::optional<at::Tensor> zero_point;
  int64_t bits;
  std::optional<bool> symmetric = std::nullopt;

  bool dynamic() const { return !scale.has_value(); }
};

// A given grid is one number, or for codes one for each of `count` parts of x ("row", "sample").
void check_input(const char* op, const at::Tensor& x, const InputGrid& grid, const char* part,
                 int64_t count);

Epilogue parse_epilogue(const char* op, std::string_view name);

}  // namespace torchquant
