// Note [division by products]: a division takes as long as all the rest of a quantizer. Here x
// times 1 / scale in twice the precision, which is less than a unit in the last place off, is
// corrected by its exact remainder: then it is rounded as a division is (Markstein 1990). Large x,
// whose codes are all the largest, are cut, and scales near the ends of the range of floats do
// divide: otherwise remainders could get lost. Quotients under 2^-41 may lose bits: no code sees
// them.
#pragma once
#include <csrc/core/quant_math.h>

namespace torchquant {
namespace {  // compiled anew for every tier

struct Reciprocal {
  explicit Reciprocal(float of)
      : divisor(of),
        high(1.0f / of),
        low(__builtin_fmaf(-high, of, 1.0f) * high),
        limit(kLimit * of) {}

  static bool in_range(const Grid& grid) {
    return grid.scale > 0x1p-60f && grid.scale < 0x1p60f && absolute(grid.zero_point) < 0x1p20f;
  }
  // Without a fused instruction it would be slower than a division.
  static bool serves(const Grid& grid) {
#if defined(__FMA__)
    return in_range(grid);
#else
    return in_range(grid) && false;
#endif
  }

  // x / divisor. NaN stays NaN, and so may -inf become: codes of both are 0.
  inline __attribute__((always_inline)) float times(float x) const {
    x = limit < x ? limit : x;
    const float quotient = __builtin_fmaf(x, high, x * low);
    return __builtin_fmaf(__builtin_fmaf(-quotient, divisor, x), high, quotient);
  }

  static constexpr float kLimit = 0x1p30f;  // times the divisor
  float divisor, high, low, limit;
};

}  // namespace
}  // namespace torchquant
