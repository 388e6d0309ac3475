#include <csrc/core/value_integers.h>
#include <csrc/kernels/conv_quantize.h>
#include <csrc/kernels/linear_tile.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

// Lines of sums: D, S, and the same of the padding.
enum Line { kProducts, kInputs, kPaddingWeights, kPaddingTaps };

void fill_plane(const DepthwisePlane& d, int32_t value) {
  const ConvShape& s = *d.shape;
  const int64_t count = (s.padded.h + s.dilation.h) * d.pitch * s.stride.w;
  for (int64_t i = 0; i < count; ++i) d.plane[i] = static_cast<int16_t>(value);
}

void copy_inside(const DepthwisePlane& d) {
  const ConvShape& s = *d.shape;
  const int64_t width = d.pitch * s.stride.w,
                bytes = s.size.w * static_cast<int64_t>(sizeof(int16_t));
  for (int64_t y = 0; y < s.size.h; ++y)
    copy_run(d.integers + y * s.size.w, d.plane + (y + s.before.h) * width + s.before.w, bytes);
}

// `count` pairs from every `step`-th pixel on.
void pair_run(const int16_t* __restrict__ first, const int16_t* __restrict__ second, int64_t step,
              int64_t count, uint32_t* __restrict__ to) {
  const auto pair = [](int16_t a, int16_t b) __attribute__((always_inline)) {
    return static_cast<uint16_t>(a) | static_cast<uint32_t>(b) << 16;
  };
  if (step == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = pair(first[i], second[i]);
  } else if (step == 2) {
    for (int64_t i = 0; i < count; ++i) to[i] = pair(first[2 * i], second[2 * i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = pair(first[i * step], second[i * step]);
  }
}

// See Note [row pairs]. Remainders of y that no tap starts from are left out where that is plain.
void pair_rows(const DepthwisePlane& d, int32_t* pairs) {
  const ConvShape& s = *d.shape;
  const int64_t width = d.pitch * s.stride.w;
  const bool multiples = 2 * s.dilation.h % s.stride.h == 0;
  const int64_t rows_at_once = s.stride.h == 1 ? s.padded.h : 1;
  for (int64_t y = 0; y < s.padded.h;
       y += multiples && s.stride.h > 1 ? s.stride.h : rows_at_once) {
    for (int64_t phase = 0; phase < s.stride.w; ++phase) {
      const int16_t* const first = d.plane + y * width + phase;
      int32_t* const to =
          pairs + (y % s.stride.h * s.stride.w + phase) * d.phase_size + y / s.stride.h * d.pitch;
      pair_run(first, first + s.dilation.h * width, s.stride.w, rows_at_once * d.pitch,
               reinterpret_cast<uint32_t*>(to));
    }
  }
}

// V vectors of results, from `pairs` on.
template <int V, bool kDot>
inline __attribute__((always_inline)) void sum_vectors(const DepthwisePlane& d,
                                                       const int32_t* pairs, const int32_t* weight,
                                                       int32_t* sums) {
  Ints total[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) total[v] = Ints{};
  for (int64_t t = 0; t < d.pair_taps; ++t) {
    const Ints w = Ints{} + weight[t];
    const int32_t* at = pairs + d.offsets[t];
    asm("" : "+r"(at));  // else g++ keeps a register for each of the addresses, and spills
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      total[v] = add_pairs<kDot>(total[v], load<Ints>(at + v * kVectorLanes), w);
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) store(total[v], sums + v * kVectorLanes);
}

template <bool kDot>
void sum_positions(const DepthwisePlane& d, const int32_t* pairs, const int32_t* weight,
                   int32_t* sums) {
  constexpr int64_t kMost = 8;
  int64_t i = 0;
  for (; i + (kMost - 1) * kVectorLanes < d.positions; i += kMost * kVectorLanes)
    sum_vectors<kMost, kDot>(d, pairs + i, weight, sums + i);
  for (; i + kVectorLanes < d.positions; i += 2 * kVectorLanes)
    sum_vectors<2, kDot>(d, pairs + i, weight, sums + i);
  for (; i < d.positions; i += kVectorLanes) sum_vectors<1, kDot>(d, pairs + i, weight, sums + i);
}

void sum_taps(const DepthwisePlane& d, const int32_t* pairs, const int16_t* weight, int32_t* sums) {
  using AnyInt32 = int32_t __attribute__((may_alias));
  const auto* const both = reinterpret_cast<const AnyInt32*>(weight);
  d.tier == CpuTier::avx512 ? sum_positions<false>(d, pairs, both, sums)
                            : sum_positions<true>(d, pairs, both, sums);
}

// y = a_scale * (scale * (D + offset * S) - a_zero * sum) + bias + what the padding gives back.
void finish_plane(const DepthwisePlane& d, int64_t n, float offset) {
  const int64_t count = d.positions;
  const float scale = d.scale[n], a_scale = d.a_scale, zero = d.a_zero * d.sum[n];
  const float bias = d.bias == nullptr ? 0.0f : d.bias[n];
  const int32_t* __restrict__ products = d.sums + kProducts * d.line;
  const int32_t* __restrict__ inputs = d.sums + kInputs * d.line;
  float* __restrict__ y = d.values;
  if (offset == 0.0f) {
    for (int64_t i = 0; i < count; ++i)
      y[i] = fused(static_cast<float>(products[i]) * scale - zero, a_scale, bias);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const float sum = static_cast<float>(products[i]) + offset * static_cast<float>(inputs[i]);
      y[i] = fused(sum * scale - zero, a_scale, bias);
    }
  }
  if (d.fill_error != 0.0f) {
    const int32_t* __restrict__ weights = d.sums + kPaddingWeights * d.line;
    const int32_t* __restrict__ taps = d.sums + kPaddingTaps * d.line;
    const float factor = a_scale * d.fill_error * scale;
    for (int64_t i = 0; i < count; ++i)
      y[i] += factor * (static_cast<float>(weights[i]) + offset * static_cast<float>(taps[i]));
  }
  if (d.epilogue == Epilogue::gelu) {
    for (int64_t i = 0; i < count; ++i) y[i] = gelu(y[i]);
  } else if (d.epilogue == Epilogue::silu) {
    for (int64_t i = 0; i < count; ++i) y[i] = silu(y[i]);
  }
}

void run_output(const DepthwisePlane& d, int64_t n) {
  const ConvShape& s = *d.shape;
  const int16_t* const weight = d.weight + n * d.pair_taps * 2;
  const float offset = d.offset == nullptr ? 0.0f : d.offset[n];
  sum_taps(d, d.pairs, weight, d.sums + kProducts * d.line);
  if (offset != 0.0f) sum_taps(d, d.pairs, d.ones, d.sums + kInputs * d.line);
  if (d.fill_error != 0.0f) {
    sum_taps(d, d.padding_pairs, weight, d.sums + kPaddingWeights * d.line);
    sum_taps(d, d.padding_pairs, d.ones, d.sums + kPaddingTaps * d.line);
  }
  finish_plane(d, n, offset);
  float* const out = d.out + n * s.out.area();
  for (int64_t y = 0; y < s.out.h; ++y)
    copy_run(d.values + y * d.pitch, out + y * s.out.w,
             s.out.w * static_cast<int64_t>(sizeof(float)));
}

// Ones on padding, zeros inside.
void pair_padding(const DepthwisePlane& d) {
  fill_plane(d, 1);
  for (int64_t i = 0; i < d.shape->size.area(); ++i) d.integers[i] = 0;
  copy_inside(d);
  pair_rows(d, d.padding_pairs);
}

}  // namespace

void depthwise_plane(const DepthwisePlane& d) {
  const int64_t pixels = d.shape->size.area();
  if (!d.padded) {
    if (d.fill_error != 0.0f) pair_padding(d);
    fill_plane(d, d.fill);
  }
  if (d.x == nullptr) {
    code_integers(d.codes, d.grid.shift, pixels, d.integers);
  } else if (!value_integers(d.grid, d.x, pixels, d.integers)) {
    *d.finite = false;
  }
  copy_inside(d);
  pair_rows(d, d.pairs);
  for (int64_t n = 0; n < d.outputs; ++n) run_output(d, n);
}

}  // namespace torchquant::TORCHQUANT_TIER
