// Note [division by products]: a division takes as long as all the rest of a quantizer. Here x
// times 1 / scale in twice the precision, which is less than a unit in the last place off, is
// corrected by its exact remainder: then it is rounded as a division is (Markstein 1990). Values
// are cut before, where codes end, and scales near the ends of the range of floats do divide:
// otherwise remainders could get lost. Quotients under 2^-41 may lose bits: no code sees them.
#pragma once
#include <csrc/core/floats.h>

namespace torchquant {
namespace {  // compiled anew for every tier

struct CodeByProducts {
  CodeByProducts(const Grid& grid, float max_code)
      : scale(grid.scale),
        zero_point(grid.zero_point),
        high(1.0f / scale),
        low(fused(-high, scale, 1.0f) * high),
        lowest(-zero_point * scale),
        highest((max_code - zero_point) * scale) {}

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

  // to_code ahead of rounding, where it may lie less than 1/2 beyond the codes. Of NaN it is 0.
  template <class Number>
  inline __attribute__((always_inline)) Number operator()(Number x) const {
    x = smaller(larger(x, lowest), highest);
    const Number quotient = fused(x, high, x * low);
    const Number remainder = fused(quotient, -scale, x);
    return fused(remainder, high, quotient) + zero_point;
  }

  float scale, zero_point;
  float high, low;        // 1 / scale
  float lowest, highest;  // values of the first and the last code
};

}  // namespace
}  // namespace torchquant
