#include <csrc/solvers/rtn.h>

#include <csrc/core/grid.cuh>

namespace torchquant {
namespace {

static_assert(kRtnLanes == kHalfWarp);
constexpr int kHalves = 2;  // of a warp: each tries a factor of its own

// One lane for each partial sum of the CPU leaf, which are then added in its order.
__device__ float squared_error(const float* weight, int64_t length, float scale, float zero_point,
                               float max_code) {
  float partial = 0.0f;
  for (int64_t i = warp_lane() % kRtnLanes; i < length; i += kRtnLanes) {
    const float e =
        weight[i] - to_value(to_code(weight[i], scale, zero_point, max_code), scale, zero_point);
    partial += e * e;
  }
  return sum_in_order(partial, kRtnLanes);
}

__global__ void rtn_shrink_kernel(const RtnShrink search) {
  const GridRows& rows = search.grid;
  for_each_group(rows, [&](int64_t first, int64_t length, int64_t group) {
    const float full_scale = rows.scale[group];
    float best_error = 0.0f;
    float best_scale = full_scale;
    for (int64_t s = 0; s < search.shrinks; s += kHalves) {
      const int64_t mine = s + warp_lane() / kRtnLanes;
      const float scale =
          full_scale *
          search.shrink[mine < search.shrinks ? mine : s];  // a spare half repeats s: no gain
      const float error =
          squared_error(rows.weight + first, length, scale, rows.zero_point[group], rows.max_code);
      for (int half = 0; half < kHalves; ++half) {
        const float candidate = __shfl_sync(kFullWarp, error, half * kRtnLanes);
        const float candidate_scale = __shfl_sync(kFullWarp, scale, half * kRtnLanes);
        if (s + half > 0 && !(candidate < best_error)) continue;
        best_error = candidate;
        best_scale = candidate_scale;
      }
    }
    if (warp_lane() == 0) rows.scale[group] = best_scale;
  });
}

}  // namespace

void launch_rtn_shrink(const RtnShrink& search, void* stream) {
  launch_rows("rtn_shrink", rtn_shrink_kernel, search,
              search.grid.rows * groups_per_row(search.grid), stream);
}

}  // namespace torchquant
