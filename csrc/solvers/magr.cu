#include <csrc/core/quant_math.h>
#include <csrc/solvers/magr.h>

#include <csrc/core/warp.cuh>

namespace torchquant {
namespace {

// One warp a row. Elements are written by lane i % 32 of their row or group, but sums are made as
// in magr.tier.cpp, lane l of each half of the warp taking l, l + 16, ...: a __syncwarp lies
// between. Every lane knows every sum, so all take the same branches.
static_assert(kMagrLanes == kHalfWarp);

constexpr float kNoClamp = 3.40282347e38f;

// visit(i) for the elements that this lane writes.
template <class Visit>
__device__ void for_each_own(int64_t length, const Visit& visit) {
  for (int64_t i = warp_lane(); i < length; i += kWarpSize) visit(i);
}

// What sticks out of [-c, c].
struct Excess {
  float sum;    // of max(|z| - c, 0)
  float count;  // of |z| > c
};

__device__ Excess excess_over(const float* z, int64_t length, float c) {
  float sum = 0.0f;
  float count = 0.0f;
  for (int64_t i = warp_lane() % kMagrLanes; i < length; i += kMagrLanes) {
    const float over = absolute(z[i]) - c;
    sum += over > 0.0f ? over : 0.0f;
    count += over > 0.0f ? 1.0f : 0.0f;
  }
  sum += __shfl_xor_sync(kFullWarp, sum, kMagrLanes / 2);
  return {sum_in_order(sum, kMagrLanes / 2), sum_in_order(count, kMagrLanes)};
}

// Newton's method, see magr.tier.cpp.
__device__ float clamp_for(const float* z, int64_t length, float t, float start) {
  if (t <= 0.0f) return kNoClamp;
  float c = start;
  Excess e = excess_over(z, length, c);
  if (e.sum < t) {
    c = e.count > 0.0f ? c - (t - e.sum) / e.count : 0.0f;
    c = c > 0.0f ? c : 0.0f;
    e = excess_over(z, length, c);
    if (e.sum <= t) return c;
  }
  while (true) {
    const float next = c + (e.sum - t) / e.count;
    if (!(next > c)) return c;
    const Excess left = excess_over(z, length, next);
    if (left.count == e.count || left.count == 0.0f) return next;
    c = next;
    e = left;
  }
}

// z = prox(z), group by group.
__device__ void clamp_row(const MagrRows& rows, int64_t n, float* z) {
  __syncwarp();
  const int64_t groups = (rows.columns + rows.group_size - 1) / rows.group_size;
  for (int64_t g = 0; g < groups; ++g) {
    float* group = z + g * rows.group_size;
    const int64_t rest = rows.columns - g * rows.group_size;
    const int64_t length = rest < rows.group_size ? rest : rows.group_size;
    float* last = rows.clamp + n * groups + g;
    const float c = clamp_for(group, length, rows.threshold[n], kMagrWarmStart * *last);
    for_each_own(length, [&](int64_t i) {
      const float upper = group[i] < c ? group[i] : c;
      group[i] = upper > -c ? upper : -c;
    });
    if (warp_lane() == 0) *last = c == kNoClamp ? 0.0f : c;
  }
  __syncwarp();
}

// (last point - new value) . (new value - last value): positive where the momentum points uphill.
__device__ float uphill(const float* weight, const float* offset, const float* next,
                        const float* value, int64_t columns) {
  float partial = 0.0f;
  for (int64_t i = warp_lane() % kMagrLanes; i < columns; i += kMagrLanes) {
    partial += (offset[i] + weight[i] - next[i]) * (next[i] - value[i]);
  }
  return sum_in_order(partial, kMagrLanes);
}

__device__ void fista_row(const MagrRows& rows, int64_t n) {
  const int64_t row = n * rows.columns;
  float* point = rows.point + row;
  float* value = rows.value + row;
  clamp_row(rows, n, point);
  float t = rows.inertia[n];
  if (uphill(rows.weight + row, rows.offset + row, point, value, rows.columns) > 0.0f) t = 1.0f;
  const float next_t = (1.0f + sqrtf(1.0f + 4.0f * t * t)) / 2.0f;
  const float momentum = (t - 1.0f) / next_t;
  for_each_own(rows.columns, [&](int64_t i) {
    const float next = point[i];
    point[i] = next + momentum * (next - value[i]);
    value[i] = next;
  });
  if (warp_lane() == 0) rows.inertia[n] = next_t;
}

__device__ void admm_row(const MagrRows& rows, int64_t n) {
  float* point = rows.point + n * rows.columns;
  float* dual = rows.dual + n * rows.columns;
  float* value = rows.value + n * rows.columns;
  for_each_own(rows.columns, [&](int64_t i) {
    dual[i] += point[i];
    value[i] = dual[i];
  });
  clamp_row(rows, n, value);
  for_each_own(rows.columns, [&](int64_t i) {
    dual[i] -= value[i];
    point[i] = value[i] - dual[i];
  });
}

// offset = point - weight; did it change?
__device__ bool move(const float* point, const float* weight, float* offset, int64_t columns) {
  bool changed = false;
  for_each_own(columns, [&](int64_t i) {
    const float moved = point[i] - weight[i];
    changed = changed || moved != offset[i];
    offset[i] = moved;
  });
  return __ballot_sync(kFullWarp, changed) != 0;
}

__global__ void magr_rows_kernel(const MagrRows rows) {
  for (int64_t n = first_row(); n < rows.rows; n += row_step()) {
    const int64_t row = n * rows.columns;
    if (rows.solver == MagrSolver::ista) clamp_row(rows, n, rows.point + row);
    if (rows.solver == MagrSolver::fista) fista_row(rows, n);
    if (rows.solver == MagrSolver::admm) admm_row(rows, n);
    const bool changed = move(rows.point + row, rows.weight + row, rows.offset + row, rows.columns);
    if (warp_lane() == 0) rows.changed[n] = changed ? 1 : 0;
  }
}

}  // namespace

void launch_magr_rows(const MagrRows& rows, void* stream) {
  launch_rows("magr_rows", magr_rows_kernel, rows, rows.rows, stream);
}

}  // namespace torchquant
