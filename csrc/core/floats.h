// Single floats, for host and device.
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

// b where one is NaN.
TORCHQUANT_HOST_DEVICE float larger(float a, float b) { return a > b ? a : b; }
TORCHQUANT_HOST_DEVICE float smaller(float a, float b) { return a < b ? a : b; }

// a * b + c, rounded once. Without an instruction for it, a function of the C library.
TORCHQUANT_HOST_DEVICE float fused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return fmaf(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

}  // namespace torchquant
