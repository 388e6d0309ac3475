// Depthwise convolutions, channels last: one task for some channels of a band of output rows.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <csrc/kernels/conv_input.h>

#include <atomic>
#include <vector>

namespace torchquant {
namespace {

constexpr int64_t kRingBytes = 1 << 15;  // of row pairs: most of a core's L1

// Channels of a task: whole vectors, so many that the ring stays in L1.
int64_t chunk_width(const ConvShape& s, int64_t reach) {
  const int64_t most = padded(s.channels, kPixelLanes);
  const int64_t pixel_bytes = reach * s.padded.w * static_cast<int64_t>(sizeof(int32_t));
  const int64_t fits = kRingBytes / pixel_bytes / kPixelLanes * kPixelLanes;
  const int64_t width = std::clamp(fits, kPixelLanes, most);
  const int64_t chunks = (most + width - 1) / width;
  return padded((most + chunks - 1) / chunks, kPixelLanes);
}

// The weight's pairs and numbers with channels side by side, padded with zeros.
struct ChannelNumbers {
  ChannelNumbers(const ConvShape& s, const DepthwiseWeight& weight, const float* given_bias)
      : stride(padded(s.channels, kPixelLanes)),
        pairs(at::zeros({pair_taps(s.kernel), stride}, at::kInt)),
        ones(at::zeros({pair_taps(s.kernel), stride}, at::kInt)),
        scale(stride),
        offset(stride),
        sum(stride),
        bias(stride) {
    const at::Tensor packed = weight.packed.contiguous(), grid = weight.grid.contiguous();
    const auto* const from = packed.const_data_ptr<int16_t>();
    const float* const numbers = grid.const_data_ptr<float>();
    const int64_t taps = pair_taps(s.kernel);
    auto* const to = pairs.mutable_data_ptr<int32_t>();
    auto* const one = ones.mutable_data_ptr<int32_t>();
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t t = 0; t < taps; ++t) {
        const int16_t* const pair = from + (c * taps + t) * 2;
        to[t * stride + c] = static_cast<uint16_t>(pair[0]) | pair[1] * (1 << 16);
        one[t * stride + c] = t / s.kernel.w * 2 + 1 < s.kernel.h ? 0x10001 : 1;
      }
      scale[c] = numbers[c];
      offset[c] = numbers[s.channels + c];
      sum[c] = numbers[2 * s.channels + c];
      bias[c] = given_bias == nullptr ? 0.0f : given_bias[c];
    }
  }

  int64_t stride;
  at::Tensor pairs;
  at::Tensor ones;
  std::vector<float> scale, offset, sum, bias;
};

// Tasks: channels are cut first, and rows where that leaves too few tasks. No output depends on it.
struct Cut {
  Cut(const ConvShape& s, int64_t width) : width(width) {
    chunks = (s.channels + width - 1) / width;
    const int64_t threads = at::get_num_threads(),
                  wanted = 4 * threads / std::max<int64_t>(s.batch * chunks, 1);
    bands = std::clamp<int64_t>(threads == 1 ? 1 : wanted, 1, s.out.h);
    tasks = s.batch * chunks * bands;
  }

  int64_t width, chunks, bands, tasks;
};

}  // namespace

void run_depthwise_pixels(const ConvShape& s, const ConvInput& input, const DepthwiseWeight& weight,
                          const ConvOutput& output) {
  const ChannelNumbers numbers(s, weight, output.bias);
  const int64_t reach = s.dilation.h * (s.kernel.h - 1) + 1, taps = pair_taps(s.kernel);
  const Cut cut(s, chunk_width(s, reach));
  const int64_t ring = reach * s.padded.w * cut.width;
  const bool codes = output.grid != nullptr;
  float* const out = codes ? nullptr : output.out.mutable_data_ptr<float>();
  uint8_t* const out_codes = codes ? output.out.mutable_data_ptr<uint8_t>() : nullptr;
  std::atomic<bool> finite{true};
  at::parallel_for(0, cut.tasks, 1, [&](int64_t begin, int64_t end) {
    const at::Tensor pairs = at::zeros({2, ring}, at::kInt);
    std::vector<const int32_t*> tap_rows(2 * taps);
    bool own_finite = true;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t band = i % cut.bands, chunk = i / cut.bands % cut.chunks;
      const int64_t b = i / cut.bands / cut.chunks, c = chunk * cut.width;
      DepthwisePixels d{};
      d.shape = &s;
      d.x = input.values(b) == nullptr ? nullptr : input.values(b) + c;
      d.codes = input.codes(b) == nullptr ? nullptr : input.codes(b) + c;
      d.grid = input.grid(b);
      d.fill = input.fill(b);
      d.a_scale = input.scale(b);
      d.a_zero = input.zero(b);
      d.fill_error = input.fill_error(b);
      d.channels = std::min(cut.width, s.channels - c);
      d.width = cut.width;
      d.first_row = band * s.out.h / cut.bands;
      d.last_row = (band + 1) * s.out.h / cut.bands;
      d.pair_taps = taps;
      d.weight = numbers.pairs.const_data_ptr<int32_t>() + c;
      d.ones = numbers.ones.const_data_ptr<int32_t>() + c;
      d.weight_stride = numbers.stride;
      d.scale = numbers.scale.data() + c;
      d.offset = numbers.offset.data() + c;
      d.sum = numbers.sum.data() + c;
      d.bias = numbers.bias.data() + c;
      d.epilogue = output.epilogue;
      d.tier = cpu_tier();
      d.pairs = pairs.mutable_data_ptr<int32_t>();
      d.padding_pairs = d.pairs + ring;
      d.taps = tap_rows.data();
      const int64_t first = b * s.out.area() * s.channels + c;
      if (codes) {
        d.out_codes = out_codes + first;
        d.out_grid = output.grid->integer_grid();
      } else {
        d.out = out + first;
      }
      d.finite = &own_finite;
      depthwise_pixels(d);
    }
    if (!own_finite) finite = false;
  });
  if (!finite) input.raise_if_not_finite();
}

}  // namespace torchquant
