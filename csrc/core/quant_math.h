// The only rounding in the library. value = (code - zero_point) * scale; host and device; no Torch.
// Note [ties and zero points]: rounding is half to even everywhere. A code is found by clamping
// value / scale + zero_point to [0, max_code] and then rounding: with integral bounds that equals
// rounding first, and it keeps the argument small enough for the exact float trick below, which
// gives the same bits on every CPU tier and on CUDA.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define TORCHQUANT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TORCHQUANT_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace torchquant {

// asymmetric: integral zero_point from min and max. symmetric: zero_point = 2^(bits-1). midrise:
// zero_point = (2^bits - 1) / 2, so the levels are odd multiples of scale / 2 (what rows need whose
// min is exactly -max: MagR's).
enum class GridType : int32_t { asymmetric, symmetric, midrise };

struct Grid {
  float scale;
  float zero_point;
};

TORCHQUANT_HOST_DEVICE float max_code_of(int64_t bits) {
  return static_cast<float>((1 << bits) - 1);
}

TORCHQUANT_HOST_DEVICE float absolute(float x) { return x < 0 ? -x : x; }

// Half to even for |x| <= 2^22: the sum leaves no bits below the unit, so the hardware rounds it
// there.
TORCHQUANT_HOST_DEVICE float round_to_integer(float x) {
  const float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (x + kMagic) - kMagic;
}

// The same for |x| <= 2^51.
TORCHQUANT_HOST_DEVICE double round_to_integer(double x) {
  const double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  return (x + kMagic) - kMagic;
}

TORCHQUANT_HOST_DEVICE float to_code(float value, float scale, float zero_point, float max_code) {
  float x = value / scale + zero_point;
  x = x > 0.0f ? x : 0.0f;
  x = x < max_code ? x : max_code;
  return round_to_integer(x);
}

TORCHQUANT_HOST_DEVICE float to_value(float code, float scale, float zero_point) {
  return (code - zero_point) * scale;
}

// A row whose values are all v is represented exactly: v = 0 by scale 1 on an integral zero point
// (midrise has no zero level), any other v by one level.
TORCHQUANT_HOST_DEVICE Grid constant_grid(GridType type, float v, float max_code) {
  const float half = (max_code + 1.0f) / 2.0f;
  if (v == 0.0f) return {1.0f, type == GridType::asymmetric ? 0.0f : half};
  if (type == GridType::midrise) return {2.0f * absolute(v), max_code / 2.0f};
  return {absolute(v), type == GridType::symmetric ? half : (v > 0 ? 0.0f : 1.0f)};
}

// The grid that spans [lo, hi]. Ranges under the smallest normal float count as zero; a range so
// far from zero that its zero point would lose bits (beyond 2^20) is widened to contain zero.
TORCHQUANT_HOST_DEVICE Grid fit_grid(GridType type, float lo, float hi, float max_code) {
  const float kSmallest = 1.17549435e-38f;
  const float kZeroPointLimit = 1048576.0f;
  const float largest = absolute(lo) > absolute(hi) ? absolute(lo) : absolute(hi);
  if (largest < kSmallest * max_code) return constant_grid(type, 0.0f, max_code);
  if (lo == hi) return constant_grid(type, lo, max_code);
  if (type == GridType::symmetric) return {largest / (max_code / 2.0f), (max_code + 1.0f) / 2.0f};
  if (type == GridType::midrise) return {largest / (max_code / 2.0f), max_code / 2.0f};
  float scale = hi / max_code - lo / max_code;
  if (!(absolute(lo) < kZeroPointLimit * scale)) {
    lo = lo < 0.0f ? lo : 0.0f;
    hi = hi > 0.0f ? hi : 0.0f;
    scale = hi / max_code - lo / max_code;
  }
  return {scale, round_to_integer(-lo / scale)};
}

}  // namespace torchquant
