#include <csrc/solvers/flips.h>

#include <csrc/core/warp.cuh>

namespace torchquant {
namespace {

// A row carries what its next flip is chosen by: gains or its gradient.
__device__ float score_of(const FlipRows& all, const float* carried, const float* step, int64_t i) {
  return all.best ? carried[i] : gradient_score(carried[i], step[i]);
}

// The first column with the least score, for every lane, or -1 where no score is below 0: the rule
// of flips.tier.cpp.
__device__ int64_t find_flip(const FlipRows& all, const float* carried, const float* step) {
  float least = 0.0f;
  int column = -1;
  for (int64_t i = warp_lane(); i < all.columns; i += kWarpSize) {
    const float score = score_of(all, carried, step, i);
    if (score < least) {
      least = score;
      column = static_cast<int>(i);
    }
  }
  const float lowest = warp_reduce(least, [](float a, float b) { return a < b ? a : b; });
  if (!(lowest < 0.0f)) return -1;
  const unsigned mine = column >= 0 && least == lowest ? static_cast<unsigned>(column) : ~0u;
  unsigned first = mine;
  for (int half = kWarpSize / 2; half > 0; half /= 2) {
    const unsigned other = __shfl_xor_sync(kFullWarp, first, half);
    first = other < first ? other : first;
  }
  return first;
}

__device__ bool gains(const FlipRows& all, const float* carried, const float* step, int64_t i) {
  return all.best || flip_gain(carried[i], __ldg(all.diagonal + i), step[i]) < 0.0f;
}

__device__ void start_from_gains(const FlipRows& all, float* carried, const float* step) {
  for (int64_t k = warp_lane(); k < all.columns; k += kWarpSize)
    carried[k] = flip_gain(carried[k], __ldg(all.diagonal + k), step[k]);
  __syncwarp();
}

// Flips column i and carries on.
__device__ void flip(const FlipRows& all, float* carried, float* step, int64_t i) {
  const float factor = 2.0f * step[i];
  const float* gram = all.gram + i * all.gram_stride;
  __syncwarp();
  if (warp_lane() == 0) {
    if (all.best) carried[i] = gain_of_flip_back(carried[i], __ldg(all.diagonal + i), step[i]);
    step[i] = -step[i];
  }
  __syncwarp();
  for (int64_t k = warp_lane(); k < all.columns; k += kWarpSize) {
    const float change = factor * __ldg(gram + k);
    carried[k] += all.best ? change * step[k] : change;
  }
  __syncwarp();
}

// One warp a row.
__device__ int64_t flip_row(const FlipRows& all, float* carried, float* step) {
  if (all.best) start_from_gains(all, carried, step);
  int64_t flips = 0;
  for (; flips < all.steps; ++flips) {
    const int64_t i = find_flip(all, carried, step);
    if (i < 0 || !gains(all, carried, step, i)) break;
    flip(all, carried, step, i);
  }
  return flips;
}

__global__ void flip_rows_kernel(const FlipRows all) {
  for (int64_t row = first_row(); row < all.rows; row += row_step()) {
    const int64_t flips =
        flip_row(all, all.gradient + row * all.columns, all.step + row * all.columns);
    if (warp_lane() == 0) all.flips[row] += flips;
  }
}

}  // namespace

void launch_flip_rows(const FlipRows& all, void* stream) {
  launch_rows("flip_rows", flip_rows_kernel, all, all.rows, stream);
}

}  // namespace torchquant
