// The float functions behind integer sums, for host and device: single operations, and fused ones
// only where they are written as such, give the same bits everywhere.
#pragma once
#include <csrc/core/floats.h>

namespace torchquant {

// e^x for x in [-80, 0], by 2^n e^r with |r| <= ln(2) / 2 and e^r's series to the seventh power
// (relative error 1e-7). Below, e^-80: small, and still so large that its products with what
// follows are no denormal numbers, which are slow.
TORCHQUANT_HOST_DEVICE float exp_of_negative(float x) {
  x = x < -80.0f ? -80.0f : x;
  const float n = round_to_integer(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float e = 1.0f / 5040;
  e = fused(e, r, 1.0f / 720);
  e = fused(e, r, 1.0f / 120);
  e = fused(e, r, 1.0f / 24);
  e = fused(e, r, 1.0f / 6);
  e = fused(e, r, 0.5f);
  e = fused(e, r, 1.0f);
  e = fused(e, r, 1.0f);
  return e * float_of(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

// x (1/2 + erf(x / sqrt 2) / 2). The second term is x times a polynomial of x^2 whose largest
// error, times x, is least on [-5.16, 5.16]; beyond, x counts as the nearer end but for the factor
// x of large ones. As near to GELU as erf in float32 comes, 1e-6. NaN stays NaN.
template <class Number>
TORCHQUANT_HOST_DEVICE Number gelu(Number x) {
  const float kEnd = 5.16f;
  x = larger(-kEnd, x);
  const Number y = smaller(kEnd, x), t = fused(y, y, -kEnd * kEnd / 2);
  Number p = fused(t, 2.48857254e-17f, -9.75586714e-16f);
  p = fused(p, t, 1.52582516e-14f);
  p = fused(p, t, -2.59001588e-13f);
  p = fused(p, t, 7.37838523e-12f);
  p = fused(p, t, -1.70929576e-10f);
  p = fused(p, t, 3.23765126e-09f);
  p = fused(p, t, -5.82912634e-08f);
  p = fused(p, t, 1.01374269e-06f);
  p = fused(p, t, -1.69782707e-05f);
  p = fused(p, t, 2.83994596e-04f);
  p = fused(p, t, -5.12613868e-03f);
  p = fused(p, t, 0.137000039f);
  return x * fused(y, p, 0.5f);
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
