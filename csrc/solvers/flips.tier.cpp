#include <csrc/solvers/flips.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

constexpr int64_t kLanes = 16;  // the least of so many columns at a time, then the least of those

inline float gain_of(float gradient, float diagonal, float step) {
  return step * (gradient + (1.0f + kFlipMargin) * diagonal * step);
}

// What is to be least: what the flip adds to the objective, or minus |g| of a flip that goes
// against the gradient. Flips that may not be are at 0.
template <bool kBest>
inline float score_of(float gradient, float diagonal, float step) {
  if constexpr (kBest) return gain_of(gradient, diagonal, step);
  return gradient * step < 0.0f ? -absolute(gradient) : 0.0f;
}

// The least score and the first column that has it.
struct Least {
  float score[kLanes] = {};
  int32_t column[kLanes] = {};

  void see(int64_t lane, float other, int64_t other_column) {
    const bool lower = other < score[lane];
    score[lane] = lower ? other : score[lane];
    column[lane] = lower ? static_cast<int32_t>(other_column) : column[lane];
  }

  int64_t first() const {  // -1 where no score is below 0
    float lowest = 0.0f;
    for (int64_t l = 0; l < kLanes; ++l) lowest = score[l] < lowest ? score[l] : lowest;
    if (!(lowest < 0.0f)) return -1;
    int32_t least = INT32_MAX;
    for (int64_t l = 0; l < kLanes; ++l)
      least = score[l] == lowest && column[l] < least ? column[l] : least;
    return least;
  }
};

// gradient += factor * gram on the way to the next flip.
template <bool kBest>
int64_t find_flip(int64_t columns, const float* __restrict__ diagonal,
                  const float* __restrict__ step, const float* __restrict__ gram, float factor,
                  float* __restrict__ gradient) {
  Least least;
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const float g = gradient[i + l] + factor * gram[i + l];
      gradient[i + l] = g;
      least.see(l, score_of<kBest>(g, diagonal[i + l], step[i + l]), i + l);
    }
  }
  for (; i < columns; ++i) {
    gradient[i] += factor * gram[i];
    least.see(i % kLanes, score_of<kBest>(gradient[i], diagonal[i], step[i]), i);
  }
  return least.first();
}

template <bool kBest>
int64_t flip_row(const FlipRows& all, float* gradient, float* step) {
  int64_t flips = 0;
  int64_t i = find_flip<kBest>(all.columns, all.diagonal, step, all.gram, 0.0f, gradient);
  for (; flips < all.steps; ++flips) {
    if (i < 0 || !(gain_of(gradient[i], all.diagonal[i], step[i]) < 0.0f)) break;
    const float factor = 2.0f * step[i];
    step[i] = -step[i];
    i = find_flip<kBest>(all.columns, all.diagonal, step, all.gram + i * all.gram_stride, factor,
                         gradient);
  }
  return flips;
}

}  // namespace

void flip_rows(const FlipRows& all) {
  for (int64_t row = 0; row < all.rows; ++row) {
    float* gradient = all.gradient + row * all.columns;
    float* step = all.step + row * all.columns;
    all.flips[row] +=
        all.best ? flip_row<true>(all, gradient, step) : flip_row<false>(all, gradient, step);
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
