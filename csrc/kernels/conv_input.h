// The tensor side of a convolution's geometry and input.
#pragma once
#include <ATen/core/Tensor.h>
#include <csrc/kernels/conv_columns.h>
#include <csrc/kernels/integer_input.h>
#include <csrc/kernels/output_grid.h>
#include <csrc/kernels/prepacked.h>

#include <optional>
#include <vector>

namespace torchquant {

// The input with its integers' grids: one for each sample.
class ConvInput {
 public:
  ConvInput(const char* op, const at::Tensor& x, const InputGrid& grid, const ConvShape& shape);

  bool channels_last() const { return channels_last_; }
  const IntegerGrid& grid(int64_t sample) const { return grids_[sample]; }
  float scale(int64_t sample) const { return scale_[sample]; }
  float zero(int64_t sample) const { return zero_[sample]; }
  bool has_zero() const { return has_zero_; }
  int32_t fill(int64_t sample) const;  // the integer that pads
  float fill_error(int64_t sample) const { return zero(sample) - static_cast<float>(fill(sample)); }
  bool pads_exactly() const;  // no output gets back what `fill` misses
  // Start of a sample, or null: x has the other type.
  const float* values(int64_t sample) const;
  const uint8_t* codes(int64_t sample) const;
  void raise_if_not_finite() const;
  void make_contiguous();  // not channels last
  void make_channels_last();

 private:
  void take_given(const InputGrid& grid);
  void take_from_samples(int64_t bits);

  const char* op_;
  ConvShape shape_;
  at::Tensor x_;  // float32 or uint8
  bool channels_last_;
  bool has_zero_;
  std::vector<IntegerGrid> grids_;
  std::vector<float> scale_;
  std::vector<float> zero_;
};

// What both kernels of the operator need besides the weight.
struct ConvOutput {
  const float* bias;  // [N], or null
  Epilogue epilogue;
  bool channels_last;
  at::Tensor out;          // [B, N, H', W']: float32, or uint8 codes, which are channels last
  const OutputGrid* grid;  // of the codes, or null
};

void run_gathered(const ConvShape& shape, const ConvInput& input, std::vector<Prepacked> weights,
                  int64_t group_size, bool wide, const ConvOutput& output);

struct DepthwiseWeight {
  at::Tensor packed;
  at::Tensor grid;
};

void check_depthwise_weight(const char* op, const ConvShape& shape, const DepthwiseWeight& weight);

// Channels first.
void run_depthwise(const ConvShape& shape, const ConvInput& input, const DepthwiseWeight& weight,
                   const ConvOutput& output);
// Channels last, one output a channel.
void run_depthwise_pixels(const ConvShape& shape, const ConvInput& input,
                          const DepthwiseWeight& weight, const ConvOutput& output);

}  // namespace torchquant
