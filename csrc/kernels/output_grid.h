// The tensor side of codes in place of outputs.
#pragma once
#include <ATen/core/Tensor.h>
#include <csrc/core/integers.h>
#include <csrc/kernels/code_grid.h>

#include <optional>

namespace torchquant {

// The grid of the codes that take the place of outputs, where one is given: one number or one for
// each of equal parts of the outputs.
class OutputGrid {
 public:
  OutputGrid(const char* op, const at::Tensor& x, int64_t outputs,
             const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& zero_point,
             int64_t bits);

  bool given() const { return scale_.defined(); }
  int64_t parts() const { return on_cpu_->parts(); }  // for the CPU, as what follows
  IntegerGrid integer_grid() const { return on_cpu_->integer_grid(); }  // of the first output
  void apply_to(PackedProduct& product, const at::Tensor& codes) const;
  at::Tensor codes(const at::Tensor& values) const {
    return codes_of(values, scale_, zero_point_, bits_);
  }

 private:
  void check(const char* name, const at::Tensor& numbers, const at::Tensor& x,
             int64_t outputs) const;

  const char* op_;
  at::Tensor scale_, zero_point_;  // contiguous; on CUDA one for each output
  int64_t bits_;
  std::optional<CodeGrid> on_cpu_;
};

}  // namespace torchquant
