// Some vectors that take every step side by side. One alone waits for each of its steps, and soon
// the steps that wait are all that a CPU keeps in view. A number in a step stands for all lanes.
#pragma once
#include <csrc/core/vectors.h>

#include <algorithm>

namespace torchquant {
namespace {

template <int kCount, class Vector = Floats>
struct Bundle {
  Vector of[kCount];
};

// A bundle of what step(i) gives.
template <int kCount, class Step>
inline __attribute__((always_inline)) auto each(const Step& step) {
  Bundle<kCount, decltype(step(0))> result;
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) result.of[i] = step(i);
  return result;
}

template <class Operand>
constexpr int kBundled = 0;
template <int kCount, class Vector>
constexpr int kBundled<Bundle<kCount, Vector>> = kCount;

template <class... Operands>
concept SomeBundled = std::max({kBundled<Operands>...}) > 0;

inline __attribute__((always_inline)) Floats part_of(float x, int) { return Floats{} + x; }
template <int kCount, class Vector>
inline __attribute__((always_inline)) Vector part_of(const Bundle<kCount, Vector>& x, int i) {
  return x.of[i];
}

template <class Step, class... Operands>
inline __attribute__((always_inline)) auto side_by_side(const Step& step, const Operands&... x) {
  return each<std::max({kBundled<Operands>...})>(
      [&](int i) __attribute__((always_inline)) { return step(part_of(x, i)...); });
}

template <class A, class B>
  requires SomeBundled<A, B>
inline __attribute__((always_inline)) auto operator+(const A& a, const B& b) {
  return side_by_side([](Floats x, Floats y) { return x + y; }, a, b);
}
template <class A, class B>
  requires SomeBundled<A, B>
inline __attribute__((always_inline)) auto operator-(const A& a, const B& b) {
  return side_by_side([](Floats x, Floats y) { return x - y; }, a, b);
}
template <class A, class B>
  requires SomeBundled<A, B>
inline __attribute__((always_inline)) auto operator*(const A& a, const B& b) {
  return side_by_side([](Floats x, Floats y) { return x * y; }, a, b);
}
template <class A, class B>
  requires SomeBundled<A, B>
inline __attribute__((always_inline)) auto operator/(const A& a, const B& b) {
  return side_by_side([](Floats x, Floats y) { return x / y; }, a, b);
}
template <class A, class B>
  requires SomeBundled<A, B>
inline __attribute__((always_inline)) auto larger(const A& a, const B& b) {
  return side_by_side([](Floats x, Floats y) { return larger(x, y); }, a, b);
}
template <class A, class B>
  requires SomeBundled<A, B>
inline __attribute__((always_inline)) auto smaller(const A& a, const B& b) {
  return side_by_side([](Floats x, Floats y) { return smaller(x, y); }, a, b);
}
template <class A, class B, class C>
  requires SomeBundled<A, B, C>
inline __attribute__((always_inline)) auto fused(const A& a, const B& b, const C& c) {
  return side_by_side([](Floats x, Floats y, Floats z) { return fused(x, y, z); }, a, b, c);
}

template <int kCount>
inline __attribute__((always_inline)) auto rounded(const Bundle<kCount>& x, int32_t shift) {
  return each<kCount>([&](int i) { return rounded(x.of[i], shift); });
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

template <int kCount, class To>
inline __attribute__((always_inline)) void store_narrow(const Bundle<kCount, Ints>& x, To* to) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) store_narrow(x.of[i], to + i * kVectorLanes);
}

}  // namespace
}  // namespace torchquant
