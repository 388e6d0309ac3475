#include <csrc/solvers/flips.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

constexpr int64_t kLanes = 16;  // the least of so many columns at a time, then the least of those

inline float gain_of(const FlipRows& all, const float* gradient, const float* step, int64_t i) {
  return step[i] * (gradient[i] + (1.0f + kFlipMargin) * all.diagonal[i] * step[i]);
}

// What is to be least: what the flip adds to the objective, or minus |g| of a flip that goes
// against the gradient. Flips that may not be are at 0.
inline float score_of(const FlipRows& all, const float* gradient, const float* step, int64_t i) {
  if (all.best) return gain_of(all, gradient, step, i);
  return gradient[i] * step[i] < 0.0f ? -absolute(gradient[i]) : 0.0f;
}

// The first column with the least score, or -1 where no score is below 0.
int64_t find_flip(const FlipRows& all, const float* gradient, const float* step) {
  float least[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= all.columns; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const float score = score_of(all, gradient, step, i + l);
      least[l] = score < least[l] ? score : least[l];
    }
  }
  for (; i < all.columns; ++i) {
    const float score = score_of(all, gradient, step, i);
    least[0] = score < least[0] ? score : least[0];
  }
  float lowest = 0.0f;
  for (int64_t l = 0; l < kLanes; ++l) lowest = least[l] < lowest ? least[l] : lowest;
  if (!(lowest < 0.0f)) return -1;
  i = 0;
  while (score_of(all, gradient, step, i) != lowest) ++i;
  return i;
}

int64_t flip_row(const FlipRows& all, float* __restrict__ gradient, float* __restrict__ step) {
  int64_t flips = 0;
  for (; flips < all.steps; ++flips) {
    const int64_t i = find_flip(all, gradient, step);
    if (i < 0 || !(gain_of(all, gradient, step, i) < 0.0f)) break;
    const float factor = 2.0f * step[i];
    const float* __restrict__ gram = all.gram + i * all.gram_stride;
    for (int64_t k = 0; k < all.columns; ++k) gradient[k] += factor * gram[k];
    step[i] = -step[i];
  }
  return flips;
}

}  // namespace

void flip_rows(const FlipRows& all) {
  for (int64_t row = 0; row < all.rows; ++row) {
    all.flips[row] += flip_row(all, all.gradient + row * all.columns, all.step + row * all.columns);
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
