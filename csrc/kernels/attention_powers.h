// Rows of scores to powers of 2 and their sums, for attention.tier.cpp.
#pragma once
#include <csrc/core/bundle.h>
#include <csrc/kernels/attention.h>
#include <csrc/kernels/linear_plain.h>

namespace torchquant {
namespace {

constexpr int64_t kParts = kRowPad / kVectorLanes;
constexpr float kInfinity = __builtin_inff();
// Scores are exponents of 2: e^x = 2^(x log2(e)).
constexpr float kLog2E = 1.44269504f;

inline int64_t padded(int64_t keys) { return (keys + kRowPad - 1) / kRowPad * kRowPad; }

// visit(j) for the vectors of kRowPad neighbours.
template <class Visit>
inline __attribute__((always_inline)) void for_each_part(const Visit& visit) {
#pragma GCC unroll 8
  for (int64_t j = 0; j < kParts; ++j) visit(j);
}

// 2^x for x <= 0, within an ulp, 0 below 2^-126: 2^n 2^f with |f| <= 1 / 2, by the polynomial
// 1 + f (...) of degree 6 whose largest relative error there is least, 2e-9. NaN stays NaN.
template <int kCount>
inline __attribute__((always_inline)) Bundle<kCount> power_of_2(Bundle<kCount> x) {
  constexpr float kBias = 127.0f, kRound = kMagic + kBias;
  x = larger(-kBias, x);
  // The low bits of x + kRound are n + 127, the exponent of 2^n as it is stored.
  const auto moved = each<kCount>([&](int i) { return x.of[i] + kRound; });
  const auto f = each<kCount>([&](int i) { return x.of[i] - (moved.of[i] - kRound); });
  auto sum = fused(f, 1.53264613e-4f, 1.33908063e-3f);
  sum = fused(sum, f, 9.61850584e-3f);
  sum = fused(sum, f, 5.55035993e-2f);
  sum = fused(sum, f, 0.240226477f);
  sum = fused(sum, f, 0.693147182f);
  sum = fused(sum, f, 1.0f);
  return each<kCount>([&](int i) { return sum.of[i] * (Floats)((Ints)moved.of[i] << 23); });
}

inline float scale_of(const AttentionRows& work) { return work.scale * kLog2E; }

// What a mask adds. The lowest of floats, with which masks are filled, stays finite.
inline float exponent_of(float mask) {
  const float exponent = mask * kLog2E;
  return exponent == -kInfinity && mask != exponent ? -kLargestFloat : exponent;
}

// The first `count` of kRowPad scores times `scale`, -inf behind them.
inline void load_block(const float* scores, int64_t count, float scale, float* row) {
  for_each_part([&](int64_t j) __attribute__((always_inline)) {
    const int64_t at = j * kVectorLanes, left = count - at;
    const Floats x = load_first(scores + at, left) * scale;
    store(first_lanes(left) ? x : Floats{} - kInfinity, row + at);
  });
}

// The exponents of 2, -inf for keys that take no part and behind the last one, from the first key
// on that is not left where it is.
inline void load_row(const AttentionRows& work, int64_t r, int64_t first, float* __restrict__ row) {
  const int64_t causal = work.causal_keys + r, keys = causal < work.keys ? causal : work.keys;
  for (int64_t i = first; i < padded(work.keys); i += kRowPad)
    load_block(work.scores + r * work.stride + i, keys - i, scale_of(work), row + i);
  if (work.mask != nullptr) {
    const float* __restrict__ mask = work.mask + r * work.mask_stride;
    for (int64_t i = 0; i < keys; ++i) row[i] += exponent_of(mask[i]);
  }
  if (work.allowed != nullptr) {
    const bool* __restrict__ allowed = work.allowed + r * work.mask_stride;
    for (int64_t i = 0; i < keys; ++i) row[i] = allowed[i] ? row[i] : -kInfinity;
  }
}

// Where all keys take part, whole blocks of scores are read where they lie: all of them where rows
// have room for -inf behind their keys.
inline int64_t keys_left(const AttentionRows& work) {
  const bool all = work.mask == nullptr && work.allowed == nullptr && work.causal_keys >= work.keys;
  if (!all || !(scale_of(work) > 0.0f)) return 0;
  const int64_t room = padded(work.keys);
  return work.stride >= room ? room : room - kRowPad;
}

// -inf behind the first `keys` scores of a row that has room for it.
inline void fill_behind(float* scores, int64_t keys) {
  const int64_t last = padded(keys) - kRowPad;
  for_each_part([&](int64_t j) __attribute__((always_inline)) {
    float* const at = scores + last + j * kVectorLanes;
    const Ints there = first_lanes(keys - last - j * kVectorLanes);
    store(there ? load<Floats>(at) : Floats{} - kInfinity, at);
  });
}

// Of each row a vector for every part of kRowPad neighbours.
template <class Vector>
using RowParts = Vector[kRowGroup][kParts];

template <class Vector>
inline __attribute__((always_inline)) void clear(RowParts<Vector>& parts) {
#pragma GCC unroll 4
  for (int64_t r = 0; r < kRowGroup; ++r) for_each_part([&](int64_t j) { parts[r][j] = Vector{}; });
}

// The largest of scale * scores for the first `left` keys, and of what is in `row` for the others.
inline void largest_of(const float* scores, int64_t left, float scale, const float* row,
                       int64_t count, Floats (&most)[kParts]) {
  const auto take = [&](const float* from) __attribute__((always_inline)) {
    for_each_part([&](int64_t j) __attribute__((always_inline)) {
      most[j] = larger(load<Floats>(from + j * kVectorLanes), most[j]);
    });
  };
  for_each_part([&](int64_t j) { most[j] = Floats{} - kInfinity; });
  for (int64_t i = 0; i < left; i += kRowPad) take(scores + i);
  if (left > 0) for_each_part([&](int64_t j) { most[j] *= scale; });
  for (int64_t i = left; i < count; i += kRowPad) take(row + i);
}

// 2^(x * factor - shift); adds to the sums.
inline void powers(const float* x, float factor, float shift, int64_t count, float* e,
                   Floats (&sums)[kParts]) {
  const auto take = [&](auto vectors, int64_t at) __attribute__((always_inline)) {
    constexpr int kCount = decltype(vectors)::value;
    const auto power = power_of_2(each<kCount>(
        [&](int i) { return load<Floats>(x + at + i * kVectorLanes) * factor - shift; }));
    store(power, e + at);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) sums[i % kParts] += power.of[i];
  };
  constexpr int kMost = kParts < 4 ? 4 : kParts;
  int64_t i = 0;
  for (; i + kMost * kVectorLanes <= count; i += kMost * kVectorLanes) take(Known<kMost>(), i);
  for (; i < count; i += kRowPad) take(Known<int{kParts}>(), i);
}

}  // namespace
}  // namespace torchquant
