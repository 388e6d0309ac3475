#include <csrc/kernels/conv_input.h>

#include <ATen/Parallel.h>
#include <csrc/core/check.h>

#include <cstring>

namespace torchquant {
namespace {

constexpr int64_t kMagnitudeElements = 1 << 16;  // of a task

// A channels-last tensor whose other layout is the same (one channel, one pixel) counts as
// contiguous.
bool is_channels_last(const at::Tensor& x) {
  return x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x.is_contiguous();
}

}  // namespace

ConvInput::ConvInput(const char* op, const at::Tensor& x, const InputGrid& grid,
                     const ConvShape& shape)
    : op_(op), shape_(shape), channels_last_(is_channels_last(x)), has_zero_(grid.scale) {
  check_input(op, x, grid, "sample", x.size(0));
  x_ = x.detach().to(x.scalar_type() == at::kByte ? at::kByte : at::kFloat);
  x_ =
      x_.contiguous(channels_last_ ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  scale_.resize(shape.batch);
  zero_.resize(shape.batch);
  grids_.resize(shape.batch);
  has_zero_ ? take_given(grid) : take_from_samples(grid.bits);
}

void ConvInput::take_given(const InputGrid& grid) {
  const at::Tensor scale = grid.scale->contiguous(), zero_point = grid.zero_point->contiguous();
  const bool one = scale.numel() == 1;
  const int32_t shift = 1 << (grid.bits - 1);
  for (int64_t b = 0; b < shape_.batch; ++b) {
    scale_[b] = scale.const_data_ptr<float>()[one ? 0 : b];
    const float zero = zero_point.const_data_ptr<float>()[one ? 0 : b];
    zero_[b] = zero - static_cast<float>(shift);
    check_positive(op_, "input_scale", scale_[b]);
    grids_[b] = {scale_[b], 0.0f, zero, max_code_of(grid.bits), shift};
  }
}

void ConvInput::take_from_samples(int64_t bits) {
  const int64_t size = shape_.channels * shape_.size.area();
  const int64_t chunks = (size + kMagnitudeElements - 1) / kMagnitudeElements;
  std::vector<int32_t> largest(shape_.batch * chunks);
  at::parallel_for(0, shape_.batch * chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % chunks * kMagnitudeElements;
      largest_magnitude(
          {values(i / chunks) + first, std::min(kMagnitudeElements, size - first), &largest[i]});
    }
  });
  const float limit = bits == 8 ? 127.0f : 32767.0f;
  for (int64_t b = 0; b < shape_.batch; ++b) {
    const auto first = largest.begin() + b * chunks;
    const int32_t magnitude = chunks == 0 ? 0 : *std::max_element(first, first + chunks);
    if (magnitude > kFiniteBits) raise_if_not_finite();
    float value;
    std::memcpy(&value, &magnitude, sizeof(value));
    const SymmetricScale symmetric = symmetric_scale(value, limit);
    scale_[b] = symmetric.scale;
    grids_[b] = {0.0f, symmetric.factor, 0.0f, 0.0f, 0};
  }
}

int32_t ConvInput::fill(int64_t sample) const {
  return static_cast<int32_t>(round_to_integer(std::clamp(zero_[sample], -128.0f, 127.0f)));
}

const float* ConvInput::values(int64_t sample) const {
  if (x_.scalar_type() == at::kByte) return nullptr;
  return x_.const_data_ptr<float>() + sample * shape_.channels * shape_.size.area();
}

const uint8_t* ConvInput::codes(int64_t sample) const {
  if (x_.scalar_type() != at::kByte) return nullptr;
  return x_.const_data_ptr<uint8_t>() + sample * shape_.channels * shape_.size.area();
}

void ConvInput::raise_if_not_finite() const { check_finite(op_, "x", x_); }

bool ConvInput::pads_exactly() const {
  if (!has_padding(shape_)) return true;
  for (int64_t b = 0; b < shape_.batch; ++b)
    if (fill_error(b) != 0.0f) return false;
  return true;
}

void ConvInput::make_contiguous() {
  x_ = x_.contiguous();
  channels_last_ = false;
}

void ConvInput::make_channels_last() {
  x_ = x_.contiguous(at::MemoryFormat::ChannelsLast);
  channels_last_ = true;
}

}  // namespace torchquant
