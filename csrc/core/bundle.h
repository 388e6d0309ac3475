// Some vectors that take every step side by side. One alone waits for each of its steps, and soon
// the steps that wait are all that a CPU keeps in view.
#pragma once
#include <csrc/core/vectors.h>

namespace torchquant {
namespace {

template <int kCount>
struct Bundle {
  Floats of[kCount];
};

template <int kCount, class Step>
inline __attribute__((always_inline)) Bundle<kCount> each(const Step& step) {
  Bundle<kCount> result;
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) result.of[i] = step(i);
  return result;
}

template <int kCount>
inline __attribute__((always_inline)) Bundle<kCount> load_bundle(const float* from) {
  return each<kCount>([&](int i) { return load<Floats>(from + i * kVectorLanes); });
}

template <int kCount>
inline __attribute__((always_inline)) void store(const Bundle<kCount>& x, float* to) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) store(x.of[i], to + i * kVectorLanes);
}

template <int kCount>
inline __attribute__((always_inline)) Bundle<kCount> operator*(const Bundle<kCount>& a,
                                                               const Bundle<kCount>& b) {
  return each<kCount>([&](int i) { return a.of[i] * b.of[i]; });
}

template <int kCount>
inline __attribute__((always_inline)) Bundle<kCount> larger(float a, const Bundle<kCount>& b) {
  return each<kCount>([&](int i) { return larger(Floats{} + a, b.of[i]); });
}

template <int kCount>
inline __attribute__((always_inline)) Bundle<kCount> smaller(float a, const Bundle<kCount>& b) {
  return each<kCount>([&](int i) { return smaller(Floats{} + a, b.of[i]); });
}

template <int kCount>
inline __attribute__((always_inline)) Bundle<kCount> fused(const Bundle<kCount>& a,
                                                           const Bundle<kCount>& b, float c) {
  return each<kCount>([&](int i) { return fused(a.of[i], b.of[i], Floats{} + c); });
}

template <int kCount>
inline __attribute__((always_inline)) Bundle<kCount> fused(const Bundle<kCount>& a, float b,
                                                           float c) {
  return each<kCount>([&](int i) { return fused(a.of[i], Floats{} + b, Floats{} + c); });
}

}  // namespace
}  // namespace torchquant
