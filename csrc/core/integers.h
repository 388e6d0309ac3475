// Integers of activations, for the tier files of every kernel that makes them.
#pragma once
#include <csrc/core/quant_math.h>

#include <cstdint>

namespace torchquant {

// a = round(x * factor), or with a given grid to_code(x) - shift.
struct IntegerGrid {
  float scale;  // 0: symmetric, by factor
  float factor;
  float zero_point;
  float max_code;
  int32_t shift;
};

struct SymmetricScale {
  float scale;
  float factor;  // 1 / scale
};

// Integers in [-limit, limit] for values up to `largest`. Under the smallest normal number 1 /
// scale would overflow: such values count as zeros.
TORCHQUANT_HOST_DEVICE SymmetricScale symmetric_scale(float largest, float limit) {
  const float kSmallest = 1.17549435e-38f;
  if (!(largest >= kSmallest * limit)) return {0.0f, 0.0f};
  return {largest / limit, limit / largest};
}

// Bits of the largest magnitude of x: beyond kFiniteBits where x holds a NaN or Inf.
constexpr int32_t kFiniteBits = 0x7f7fffff;

static inline __attribute__((always_inline)) int32_t magnitude_bits(const float* __restrict__ x,
                                                                    int64_t count) {
  using Bits = int32_t __attribute__((may_alias));
  const auto* __restrict__ bits = reinterpret_cast<const Bits*>(x);
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t magnitude = bits[i] & 0x7fffffff;
    largest = largest > magnitude ? largest : magnitude;
  }
  return largest;
}

// a[i] = integer_of(i); the sum of all.
template <class To, class IntegerOf>
static inline __attribute__((always_inline)) int32_t fill_integers(To* __restrict__ a,
                                                                   int64_t count,
                                                                   const IntegerOf& integer_of) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t integer = integer_of(i);
    a[i] = static_cast<To>(integer);
    sum += integer;
  }
  return sum;
}

}  // namespace torchquant
