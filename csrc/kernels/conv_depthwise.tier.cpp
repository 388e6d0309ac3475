#include <csrc/kernels/conv_quantize.h>
#include <csrc/kernels/linear_tile.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace torchquant::TORCHQUANT_TIER {
namespace {

constexpr int64_t kVector = 8;  // outputs of a vector

// Lines of sums: D, S, and the same of the padding.
enum Line { kProducts, kInputs, kPaddingWeights, kPaddingTaps };

void fill_plane(const DepthwisePlane& d, int16_t inside, int16_t padding, bool from_input) {
  const ConvShape& s = *d.shape;
  for (int64_t i = 0; i < s.padded.area(); ++i) d.plane[i] = padding;
  for (int64_t y = 0; y < s.size.h; ++y) {
    int16_t* const row = d.plane + (y + s.before.h) * s.padded.w + s.before.w;
    if (!from_input) {
      for (int64_t x = 0; x < s.size.w; ++x) row[x] = inside;
    } else if (d.x == nullptr) {
      integers_of(d.grid, d.codes + y * s.size.w, s.size.w, row);
    } else {
      integers_of(d.grid, d.x + y * s.size.w, s.size.w, row);
    }
  }
}

// See Note [row pairs]. Rows that no output starts from are left out where they are easily known.
void pair_rows(const DepthwisePlane& d, int32_t* pairs) {
  const ConvShape& s = *d.shape;
  const bool multiples = 2 * s.dilation.h % s.stride.h == 0;
  for (int64_t y = 0; y < s.padded.h; y += multiples ? s.stride.h : 1) {
    const int16_t* const first = d.plane + y * s.padded.w;
    const bool has_second = y + s.dilation.h < s.padded.h;
    const int16_t* const second = has_second ? first + s.dilation.h * s.padded.w : first;
    const uint32_t keep = has_second ? 0xffff0000u : 0u;
    for (int64_t phase = 0; phase < s.stride.w; ++phase) {
      auto* __restrict__ to =
          reinterpret_cast<uint32_t*>(pairs) + (y * s.stride.w + phase) * d.phase_width;
      const int64_t count = (s.padded.w - phase + s.stride.w - 1) / s.stride.w;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t x = i * s.stride.w + phase;
        to[i] = static_cast<uint16_t>(first[x]) | ((static_cast<uint32_t>(second[x]) << 16) & keep);
      }
    }
  }
}

#if defined(__AVX2__)
// V vectors of outputs, from `pixels` on.
template <int V>
inline __attribute__((always_inline)) void sum_vectors(const DepthwisePlane& d,
                                                       const int32_t* pixels, const int32_t* weight,
                                                       int32_t* sums) {
  __m256i total[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) total[v] = _mm256_setzero_si256();
  for (int64_t t = 0; t < d.pair_taps; ++t) {
    const __m256i w = _mm256_set1_epi32(weight[t]);
    const int32_t* const at = pixels + d.offsets[t];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + v * kVector));
      total[v] = _mm256_add_epi32(total[v], _mm256_madd_epi16(a, w));
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + v * kVector), total[v]);
}

void sum_row(const DepthwisePlane& d, const int32_t* pixels, const int16_t* weight, int32_t* sums) {
  using AnyInt32 = int32_t __attribute__((may_alias));
  const auto* const pairs = reinterpret_cast<const AnyInt32*>(weight);
  int64_t x = 0;
  for (; x + 3 * kVector < d.shape->out.w; x += 4 * kVector)
    sum_vectors<4>(d, pixels + x, pairs, sums + x);
  for (; x + kVector < d.shape->out.w; x += 2 * kVector)
    sum_vectors<2>(d, pixels + x, pairs, sums + x);
  for (; x < d.shape->out.w; x += kVector) sum_vectors<1>(d, pixels + x, pairs, sums + x);
}
#else
void sum_row(const DepthwisePlane& d, const int32_t* pixels, const int16_t* weight, int32_t* sums) {
  for (int64_t x = 0; x < d.shape->out.w; ++x) sums[x] = 0;
  for (int64_t t = 0; t < d.pair_taps; ++t) {
    const int32_t first = weight[2 * t], second = weight[2 * t + 1];
    const int32_t* const at = pixels + d.offsets[t];
    for (int64_t x = 0; x < d.shape->out.w; ++x) {
      const auto low = static_cast<int16_t>(at[x] & 0xffff);
      sums[x] += first * low + second * (at[x] >> 16);
    }
  }
}
#endif

// y = a_scale * (scale * (D + offset * S) - a_zero * sum) + bias + what the padding gives back.
void finish_plane_row(const DepthwisePlane& d, int64_t n, const int32_t* sums, int64_t line,
                      float* __restrict__ y) {
  const int64_t count = d.shape->out.w;
  const float offset = d.offset == nullptr ? 0.0f : d.offset[n], scale = d.scale[n];
  const float zero = d.a_zero * d.sum[n], bias = d.bias == nullptr ? 0.0f : d.bias[n];
  const int32_t* const products = sums + kProducts * line;
  const int32_t* const inputs = sums + kInputs * line;
  for (int64_t x = 0; x < count; ++x) y[x] = static_cast<float>(products[x]);
  if (offset != 0.0f) {
    for (int64_t x = 0; x < count; ++x) y[x] += offset * static_cast<float>(inputs[x]);
  }
  for (int64_t x = 0; x < count; ++x) y[x] = (y[x] * scale - zero) * d.a_scale + bias;
  if (d.fill_error != 0.0f) {
    const int32_t* const weights = sums + kPaddingWeights * line;
    const int32_t* const taps = sums + kPaddingTaps * line;
    const float factor = d.a_scale * d.fill_error * scale;
    for (int64_t x = 0; x < count; ++x)
      y[x] += factor * (static_cast<float>(weights[x]) + offset * static_cast<float>(taps[x]));
  }
  if (d.epilogue == Epilogue::gelu) {
    for (int64_t x = 0; x < count; ++x) y[x] = gelu(y[x]);
  } else if (d.epilogue == Epilogue::silu) {
    for (int64_t x = 0; x < count; ++x) y[x] = silu(y[x]);
  }
}

void run_plane(const DepthwisePlane& d, int64_t n) {
  const ConvShape& s = *d.shape;
  const int16_t* const weight = d.weight + n * d.pair_taps * 2;
  const int64_t line = (s.out.w + kVector - 1) / kVector * kVector;
  const bool offset = d.offset != nullptr && d.offset[n] != 0.0f;
  for (int64_t y = 0; y < s.out.h; ++y) {
    const int64_t at = y * s.stride.h * s.stride.w * d.phase_width;
    sum_row(d, d.pairs + at, weight, d.sums + kProducts * line);
    if (offset) sum_row(d, d.pairs + at, d.ones, d.sums + kInputs * line);
    if (d.fill_error != 0.0f) {
      sum_row(d, d.padding_pairs + at, weight, d.sums + kPaddingWeights * line);
      sum_row(d, d.padding_pairs + at, d.ones, d.sums + kPaddingTaps * line);
    }
    finish_plane_row(d, n, d.sums, line, d.out + (n * s.out.h + y) * s.out.w);
  }
}

}  // namespace

void depthwise_plane(const DepthwisePlane& d) {
  if (d.x != nullptr && magnitude_bits(d.x, d.shape->size.area()) > kFiniteBits) *d.finite = false;
  if (d.fill_error != 0.0f) {
    fill_plane(d, 0, 1, false);
    pair_rows(d, d.padding_pairs);
  }
  fill_plane(d, 0, static_cast<int16_t>(d.fill), true);
  pair_rows(d, d.pairs);
  for (int64_t n = 0; n < d.outputs; ++n) run_plane(d, n);
}

}  // namespace torchquant::TORCHQUANT_TIER
