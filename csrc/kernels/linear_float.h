// The float functions behind integer sums, for host and device: what is written here in single
// operations without fused multiply-add gives the same bits everywhere.
#pragma once
#include <csrc/core/quant_math.h>

#include <cstdint>

namespace torchquant {

TORCHQUANT_HOST_DEVICE uint32_t bits_of(float x) {
  union {
    float value;
    uint32_t bits;
  } pun = {x};
  return pun.bits;
}

TORCHQUANT_HOST_DEVICE float float_of(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } pun = {bits};
  return pun.value;
}

// e^x for x in [-80, 0], by 2^n e^r with |r| <= ln(2) / 2 and e^r's series to the seventh power
// (relative error 1e-7). Below, e^-80: small, and still so large that its products with what
// follows are no denormal numbers, which are slow.
TORCHQUANT_HOST_DEVICE float exp_of_negative(float x) {
  x = x < -80.0f ? -80.0f : x;
  const float n = round_to_integer(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float e = 1.0f / 5040;
  e = e * r + 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  return e * float_of(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

// x (1 + erf(x / sqrt 2)) / 2, by Abramowitz and Stegun 7.1.26 (absolute error of erf 1.5e-7).
TORCHQUANT_HOST_DEVICE float gelu(float x) {
  const float z = absolute(x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.3275911f * z);
  const float p =
      t * (0.254829592f +
           t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const float tail = 0.5f * p * exp_of_negative(-z * z);  // of the normal distribution, beyond |x|
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

TORCHQUANT_HOST_DEVICE float silu(float x) {
  const float e = exp_of_negative(-absolute(x));
  return x * (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// Half to even, as every conversion of dtypes rounds. For finite x.
TORCHQUANT_HOST_DEVICE uint16_t bfloat16_bits(float x) {
  const uint32_t bits = bits_of(x);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

TORCHQUANT_HOST_DEVICE uint16_t float16_bits(float x) {
#ifdef __CUDA_ARCH__
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
  return half;
#else
  const uint32_t sign = bits_of(x) >> 16 & 0x8000, bits = bits_of(x) & 0x7fffffff;
  const float kSmallestNormal = 6.103515625e-5f;  // 2^-14; below, all numbers are multiples of
  uint32_t half;                                  // 2^-24, as floats from 0.5 to 1 are
  if (float_of(bits) < kSmallestNormal) {
    half = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
  } else {
    const uint32_t kBias = (127 - 15) << 23;
    half = (bits - kBias + 0xfff + ((bits >> 13) & 1)) >> 13;
    half = half < 0x7c00 ? half : 0x7c00;
  }
  return static_cast<uint16_t>(sign | half);
#endif
}

}  // namespace torchquant
