// Depthwise convolutions: one task for some planes of the input.
#include <ATen/Parallel.h>
#include <csrc/core/check.h>
#include <csrc/kernels/conv_input.h>

#include <atomic>
#include <vector>

namespace torchquant {
namespace {

constexpr int64_t kTaskOutputs = 1 << 13;
constexpr int64_t kVector = 16;  // at least what the kernel takes at once

// See Note [row pairs].
struct PairLayout {
  explicit PairLayout(const ConvShape& s)
      : pitch((s.padded.w + s.stride.w - 1) / s.stride.w),
        phase_size((s.padded.h + s.stride.h - 1) / s.stride.h * pitch + kVector),
        positions((s.out.h - 1) * pitch + s.out.w),
        line((positions + kVector - 1) / kVector * kVector) {}

  int64_t pitch;
  int64_t phase_size;
  int64_t positions;
  int64_t line;
};

// One thread's copies of a plane.
struct Workspace {
  Workspace(const ConvShape& s, const PairLayout& layout)
      : integers(s.size.area()),
        plane((s.padded.h + s.dilation.h) * layout.pitch * s.stride.w),
        pairs(s.stride.area() * layout.phase_size),
        padding_pairs(pairs.size()),
        sums(4 * layout.line),
        values(layout.line) {}

  std::vector<int16_t> integers;
  std::vector<int16_t> plane;
  std::vector<int32_t> pairs;
  std::vector<int32_t> padding_pairs;
  std::vector<int32_t> sums;
  std::vector<float> values;
};

// Where a pair of taps reads, and ones on its taps.
struct Taps {
  Taps(const ConvShape& s, const PairLayout& layout) {
    for (int64_t ky = 0; ky < s.kernel.h; ky += 2) {
      for (int64_t kx = 0; kx < s.kernel.w; ++kx) {
        const int64_t y = ky * s.dilation.h, x = kx * s.dilation.w;
        const int64_t phase = y % s.stride.h * s.stride.w + x % s.stride.w;
        offsets.push_back(phase * layout.phase_size + y / s.stride.h * layout.pitch +
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

void check_depthwise_weight(const char* op, const ConvShape& s, const DepthwiseWeight& weight) {
  TORCH_CHECK_TYPE(
      weight.packed.scalar_type() == at::kShort && weight.grid.scalar_type() == at::kFloat, op,
      ": packed must be int16 and grid float32 of a depthwise convolution, got ",
      weight.packed.scalar_type(), " and ", weight.grid.scalar_type());
  check_shape(op, "packed", weight.packed, {s.outputs, pair_taps(s.kernel), 2});
  check_shape(op, "grid", weight.grid, {3, s.outputs});
}

void run_depthwise(const ConvShape& s, const ConvInput& input, const DepthwiseWeight& weight,
                   const ConvOutput& output) {
  const at::Tensor packed = weight.packed.contiguous(), grid = weight.grid.contiguous();
  const float* const numbers = grid.const_data_ptr<float>();
  const int64_t multiplier = s.outputs / s.groups;
  const PairLayout layout(s);
  const Taps taps(s, layout);
  float* const out = output.out.mutable_data_ptr<float>();
  std::atomic<bool> finite{true};
  const int64_t grain = kTaskOutputs / (multiplier * s.out.area()) + 1;
  at::parallel_for(0, s.batch * s.channels, grain, [&](int64_t begin, int64_t end) {
    Workspace own(s, layout);
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
      d.pitch = layout.pitch;
      d.phase_size = layout.phase_size;
      d.positions = layout.positions;
      d.line = layout.line;
      d.padded = i > begin && c > 0;
      d.scale = numbers + n;
      d.offset = numbers + s.outputs + n;
      d.sum = numbers + 2 * s.outputs + n;
      d.bias = output.bias == nullptr ? nullptr : output.bias + n;
      d.epilogue = output.epilogue;
      d.tier = cpu_tier();
      d.integers = own.integers.data();
      d.values = own.values.data();
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
