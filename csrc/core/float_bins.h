// Log-spaced bins of float32, host and device, no Torch. The pattern of x, made increasing in x as
// an unsigned integer, is cut after m bits of the mantissa: B = 512 << m bins of relative width
// 2^-m, for every float, with no range to choose beforehand. So histograms over these bins merge by
// adding. Used by statistics/histogram and by the quantizers that are fitted on it.
#pragma once
#include <csrc/core/quant_math.h>

#include <cstdint>

namespace torchquant {

constexpr int64_t kFloatBinsBase = 512;  // sign and exponent: 9 bits
constexpr int64_t kMaxBinMantissa = 7;
constexpr int32_t kFloatMantissa = 23;
constexpr uint32_t kFloatSign = 0x80000000u;

// m of B = 512 << m bins, or -1 when B is no such number.
TORCHQUANT_HOST_DEVICE int32_t bin_mantissa_of(int64_t bins) {
  for (int32_t m = 0; m <= kMaxBinMantissa; ++m) {
    if (bins == kFloatBinsBase << m) return m;
  }
  return -1;
}

// Increasing in x; -0 counts as +0.
TORCHQUANT_HOST_DEVICE uint32_t ordered_pattern(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (bits == kFloatSign) return kFloatSign;
  return bits & kFloatSign ? ~bits : bits | kFloatSign;
}

TORCHQUANT_HOST_DEVICE float float_of_pattern(uint32_t pattern) {
  const bool positive = (pattern & kFloatSign) != 0;
  return __builtin_bit_cast(float, positive ? pattern ^ kFloatSign : ~pattern);
}

TORCHQUANT_HOST_DEVICE uint32_t bin_of(float x, int32_t mantissa) {
  return ordered_pattern(x) >> (kFloatMantissa - mantissa);
}

// The least and the greatest float of a bin; both are infinite or NaN where no finite float falls.
TORCHQUANT_HOST_DEVICE float bin_lower_edge(uint32_t bin, int32_t mantissa) {
  return float_of_pattern(bin << (kFloatMantissa - mantissa));
}
TORCHQUANT_HOST_DEVICE float bin_upper_edge(uint32_t bin, int32_t mantissa) {
  const int32_t shift = kFloatMantissa - mantissa;
  const uint32_t last = (bin << shift) | ((1u << shift) - 1);
  return float_of_pattern(last == kFloatSign - 1 ? last - 1 : last);  // that one is -0
}

// The bin that begins at +0.
TORCHQUANT_HOST_DEVICE uint32_t zero_bin(int32_t mantissa) {
  return kFloatSign >> (kFloatMantissa - mantissa);
}

}  // namespace torchquant
