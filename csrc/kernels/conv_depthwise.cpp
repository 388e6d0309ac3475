// Depthwise convolutions: one task for some planes of the input.
#include <ATen/Parallel.h>
#include <csrc/core/check.h>
#include <csrc/kernels/conv_input.h>

#include <atomic>
#include <vector>

namespace torchquant {
namespace {

constexpr int64_t kTaskOutputs = 1 << 13;
constexpr int64_t kVector = 8;  // outputs that the kernel takes at once

// One thread's copies of a plane.
struct Workspace {
  Workspace(const ConvShape& s, int64_t phase_width)
      : plane(s.padded.area()),
        pairs(s.padded.h * s.stride.w * phase_width),
        padding_pairs(pairs.size()),
        sums(4 * (s.out.w + kVector)) {}

  std::vector<int16_t> plane;
  std::vector<int32_t> pairs;
  std::vector<int32_t> padding_pairs;
  std::vector<int32_t> sums;
};

void check_weight(const char* op, const ConvShape& s, const DepthwiseWeight& weight) {
  TORCH_CHECK_TYPE(
      weight.packed.scalar_type() == at::kShort && weight.grid.scalar_type() == at::kFloat, op,
      ": packed must be int16 and grid float32 of a depthwise convolution, got ",
      weight.packed.scalar_type(), " and ", weight.grid.scalar_type());
  check_shape(op, "packed", weight.packed, {s.outputs, pair_taps(s.kernel), 2});
  check_shape(op, "grid", weight.grid, {3, s.outputs});
}

// Where a pair of taps reads, and ones on its taps.
struct Taps {
  Taps(const ConvShape& s, int64_t phase_width) {
    for (int64_t ky = 0; ky < s.kernel.h; ky += 2) {
      for (int64_t kx = 0; kx < s.kernel.w; ++kx) {
        const int64_t x = kx * s.dilation.w;
        offsets.push_back((ky * s.dilation.h * s.stride.w + x % s.stride.w) * phase_width +
                          x / s.stride.w);
        ones.push_back(1);
        ones.push_back(ky + 1 < s.kernel.h ? 1 : 0);
      }
    }
  }

  std::vector<int64_t> offsets;
  std::vector<int16_t> ones;
};

}  // namespace

void run_depthwise(const char* op, const ConvShape& s, const ConvInput& input,
                   const DepthwiseWeight& weight, const ConvOutput& output) {
  check_weight(op, s, weight);
  const at::Tensor packed = weight.packed.contiguous(), grid = weight.grid.contiguous();
  const float* const numbers = grid.const_data_ptr<float>();
  const int64_t multiplier = s.outputs / s.groups;
  const int64_t phase_width = (s.padded.w + s.stride.w - 1) / s.stride.w + kVector;
  const Taps taps(s, phase_width);
  float* const out = output.out.mutable_data_ptr<float>();
  std::atomic<bool> finite{true};
  const int64_t grain = kTaskOutputs / (multiplier * s.out.area()) + 1;
  at::parallel_for(0, s.batch * s.channels, grain, [&](int64_t begin, int64_t end) {
    Workspace own(s, phase_width);
    bool own_finite = true;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / s.channels, c = i % s.channels, n = c * multiplier;
      DepthwisePlane d{};
      d.shape = &s;
      const float* const x = input.values(b);
      const uint8_t* const codes = input.codes(b);
      d.x = x == nullptr ? nullptr : x + c * s.size.area();
      d.codes = codes == nullptr ? nullptr : codes + c * s.size.area();
      d.grid = input.grid(b);
      d.fill = input.fill(b);
      d.a_scale = input.scale(b);
      d.a_zero = input.zero(b);
      d.fill_error = input.fill_error(b);
      d.outputs = multiplier;
      d.weight = packed.const_data_ptr<int16_t>() + n * 2 * pair_taps(s.kernel);
      d.ones = taps.ones.data();
      d.offsets = taps.offsets.data();
      d.pair_taps = pair_taps(s.kernel);
      d.phase_width = phase_width;
      d.scale = numbers + n;
      d.offset = numbers + s.outputs + n;
      d.sum = numbers + 2 * s.outputs + n;
      d.bias = output.bias == nullptr ? nullptr : output.bias + n;
      d.epilogue = output.epilogue;
      d.plane = own.plane.data();
      d.pairs = own.pairs.data();
      d.padding_pairs = own.padding_pairs.data();
      d.sums = own.sums.data();
      d.out = out + (b * s.outputs + n) * s.out.area();
      d.finite = &own_finite;
      depthwise_plane(d);
    }
    if (!own_finite) finite = false;
  });
  if (!finite) input.raise_if_not_finite();
}

}  // namespace torchquant
