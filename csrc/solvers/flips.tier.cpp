#include <csrc/solvers/flips.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

// As many columns at a time as fit a register of the tier: wider vectors are taken apart. The first
// column with the least score does not depend on it.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using UnalignedFloats =
    float __attribute__((vector_size(4 * kLanes), aligned(alignof(float)), may_alias));

#define LOAD(pointer) (static_cast<Floats>(*reinterpret_cast<const UnalignedFloats*>(pointer)))
#define STORE(pointer, value) (*reinterpret_cast<UnalignedFloats*>(pointer) = (value))

// Into each lane what comes first of it and the lane n behind it.
template <int64_t n>
inline void fold(Floats& score, Ints& column) {
  Floats other = {};
  Ints its = {};
  for (int64_t l = 0; l < kLanes; ++l) {
    other[l] = score[(l + n) % kLanes];
    its[l] = column[(l + n) % kLanes];
  }
  const Ints before = (other < score) | ((other == score) & (its < column));
  score = before ? other : score;
  column = before ? its : column;
  if constexpr (n > 1) fold<n / 2>(score, column);
}

// One row: what it carries, gains or gradient, and the steps of its flips.
template <bool kBest>
struct Row {
  int64_t columns;
  float* __restrict__ carried;
  float* __restrict__ step;

  // Carries on by factor * gram and finds the next flip on the way: the first column with the least
  // score, or -1 where no score is below 0.
  int64_t find_flip(float factor, const float* __restrict__ gram) const {
    Floats least = {};
    Ints column = {}, now = {};
    for (int64_t l = 0; l < kLanes; ++l) now[l] = static_cast<int32_t>(l);
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes, now += static_cast<int32_t>(kLanes)) {
      const Floats d = LOAD(step + i);
      Floats change = factor * LOAD(gram + i);
      if constexpr (kBest) change *= d;
      const Floats sum = LOAD(carried + i) + change;
      STORE(carried + i, sum);
      Floats score = sum;
      if constexpr (!kBest) {
        const Floats size = sum < 0.0f ? sum : -sum;
        score = sum * d < 0.0f ? size : Floats{};
      }
      const Ints lower = score < least;
      least = lower ? score : least;
      column = lower ? now : column;
    }
    for (; i < columns; ++i) {
      const float change = factor * gram[i];
      carried[i] += kBest ? change * step[i] : change;
      const float score = kBest ? carried[i] : gradient_score(carried[i], step[i]);
      const int64_t lane = i % kLanes;
      if (score < least[lane]) {
        least[lane] = score;
        column[lane] = static_cast<int32_t>(i);
      }
    }
    fold<kLanes / 2>(least, column);
    return least[0] < 0.0f ? column[0] : -1;
  }
};

template <bool kBest>
int64_t flip_row(const FlipRows& all, float* carried, float* step) {
  const Row<kBest> row{all.columns, carried, step};
  if (kBest) {
    for (int64_t i = 0; i < all.columns; ++i)
      carried[i] = flip_gain(carried[i], all.diagonal[i], step[i]);
  }
  int64_t flips = 0;
  int64_t i = row.find_flip(0.0f, all.gram);
  for (; flips < all.steps; ++flips) {
    if (i < 0 || (!kBest && !(flip_gain(carried[i], all.diagonal[i], step[i]) < 0.0f))) break;
    const float factor = 2.0f * step[i];
    if (kBest) carried[i] = gain_of_flip_back(carried[i], all.diagonal[i], step[i]);
    step[i] = -step[i];
    i = row.find_flip(factor, all.gram + i * all.gram_stride);
  }
  return flips;
}

}  // namespace

void flip_rows(const FlipRows& all) {
  for (int64_t row = 0; row < all.rows; ++row) {
    float* carried = all.gradient + row * all.columns;
    float* step = all.step + row * all.columns;
    all.flips[row] +=
        all.best ? flip_row<true>(all, carried, step) : flip_row<false>(all, carried, step);
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
