#include <csrc/kernels/conv_input.h>

#include <ATen/Parallel.h>
#include <csrc/core/check.h>

#include <cstring>
#include <limits>

namespace torchquant {
namespace {

constexpr int64_t kMagnitudeElements = 1 << 16;  // of a task

void check_given(const char* op, const at::Tensor& x, const ConvGrid& grid) {
  check_bits(op, grid.bits);
  const bool codes = x.scalar_type() == at::kByte;
  const int64_t count = grid.scale->numel();
  for (const auto& [name, tensor] :
       {std::pair{"input_scale", &*grid.scale}, {"input_zero_point", &*grid.zero_point}}) {
    TORCH_CHECK_TYPE(tensor->scalar_type() == at::kFloat, op, ": ", name, " must be float32, got ",
                     tensor->scalar_type());
    check_same_device(op, name, *tensor, x);
    TORCH_CHECK_VALUE(tensor->numel() == count && (count == 1 || (codes && count == x.size(0))), op,
                      ": ", name, " must be one number", codes ? " or one for each sample" : "",
                      ", got ", tensor->sizes());
  }
}

void check(const char* op, const at::Tensor& x, const ConvGrid& grid) {
  const auto type = x.scalar_type();
  const bool codes = type == at::kByte, given = grid.scale.has_value();
  TORCH_CHECK_TYPE(codes || type == at::kFloat || type == at::kHalf || type == at::kBFloat16, op,
                   ": x must be float32, float16, bfloat16 or uint8 codes, got ", type);
  TORCH_CHECK_VALUE(given == grid.zero_point.has_value(), op,
                    ": input_scale and input_zero_point must be given together");
  TORCH_CHECK_VALUE(!codes || given, op, ": x of codes needs input_scale");
  if (given) return check_given(op, x, grid);
  TORCH_CHECK_VALUE(grid.bits == 8 || grid.bits == 16, op,
                    ": input_bits must be 8 or 16 where the scale comes from x, got ", grid.bits);
}

// A channels-last tensor whose other layout is the same (one channel, one pixel) counts as
// contiguous.
bool is_channels_last(const at::Tensor& x) {
  return x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x.is_contiguous();
}

SampleGrid symmetric_grid(int32_t bits, float limit, float* scale) {
  float largest;
  std::memcpy(&largest, &bits, sizeof(largest));
  // Under the smallest normal number 1 / scale would overflow: such a sample counts as zero.
  const bool zero = !(largest >= std::numeric_limits<float>::min() * limit);
  *scale = zero ? 0.0f : largest / limit;
  return {0.0f, zero ? 0.0f : limit / largest, 0.0f, 0.0f, 0};
}

}  // namespace

ConvInput::ConvInput(const char* op, const at::Tensor& x, const ConvGrid& grid,
                     const ConvShape& shape)
    : op_(op), shape_(shape), channels_last_(is_channels_last(x)), has_zero_(grid.scale) {
  check(op, x, grid);
  x_ = x.detach().to(x.scalar_type() == at::kByte ? at::kByte : at::kFloat);
  x_ =
      x_.contiguous(channels_last_ ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  scale_.resize(shape.batch);
  zero_.resize(shape.batch);
  grids_.resize(shape.batch);
  has_zero_ ? take_given(grid) : take_from_samples(grid.bits);
}

void ConvInput::take_given(const ConvGrid& grid) {
  const at::Tensor scale = grid.scale->contiguous(), zero_point = grid.zero_point->contiguous();
  const bool one = scale.numel() == 1;
  const int32_t shift = 1 << (grid.bits - 1);
  for (int64_t b = 0; b < shape_.batch; ++b) {
    scale_[b] = scale.const_data_ptr<float>()[one ? 0 : b];
    const float zero = zero_point.const_data_ptr<float>()[one ? 0 : b];
    zero_[b] = zero - static_cast<float>(shift);
    TORCH_CHECK_VALUE(scale_[b] > 0 && scale_[b] <= std::numeric_limits<float>::max(), op_,
                      ": input_scale must be positive, got ", scale_[b]);
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
    grids_[b] = symmetric_grid(magnitude, limit, &scale_[b]);
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

void ConvInput::make_contiguous() {
  x_ = x_.contiguous();
  channels_last_ = false;
}

}  // namespace torchquant
