#include <csrc/solvers/magr.h>

#include <csrc/core/lanes.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

constexpr float kNoClamp = 3.40282347e38f;

using Int8 = int32_t __attribute__((vector_size(32)));
static_assert(kMagrLanes == 2 * kFloat8);

// What sticks out of [-c, c].
struct Excess {
  float sum;      // of max(|z| - c, 0)
  int64_t count;  // of |z| > c
};

struct ExcessLanes {
  Float8 sum[2] = {};
  Int8 count[2] = {};
};

inline __attribute__((always_inline)) void add_excess(const float* z, float c, ExcessLanes& lanes) {
#pragma GCC unroll 2
  for (int64_t half = 0; half < 2; ++half) {
    const Float8 value = TORCHQUANT_LOAD8(z + half * kFloat8);
    const Float8 over = (value < 0 ? -value : value) - c;
    const Int8 outside = over > 0;
    lanes.sum[half] += outside ? over : Float8{};
    lanes.count[half] -= outside;
  }
}

Excess excess_over(const float* z, int64_t length, float c) {
  ExcessLanes lanes;
  int64_t i = 0;
  for (; i + kMagrLanes <= length; i += kMagrLanes) add_excess(z + i, c, lanes);
  if (i < length) {
    float rest[kMagrLanes] = {};  // zeros do not stick out
    for (int64_t l = 0; i + l < length; ++l) rest[l] = z[i + l];
    add_excess(rest, c, lanes);
  }
  const Float8 sum = lanes.sum[0] + lanes.sum[1];
  const Int8 count = lanes.count[0] + lanes.count[1];
  Excess e{0.0f, 0};
  for (int64_t l = 0; l < kFloat8; ++l) {
    e.sum += sum[l];
    e.count += count[l];
  }
  return e;
}

// The c >= 0 with sum max(|z| - c, 0) = t, or 0 if even that leaves less than t. The sum is convex,
// falling and piecewise linear in c: Newton's first step from the right of the root lands on its
// left, and from there every step stays on the left and drops at least one element until none is
// left to drop.
float clamp_for(const float* z, int64_t length, float t, float start) {
  if (t <= 0.0f) return kNoClamp;
  float c = start;
  Excess e = excess_over(z, length, c);
  if (e.sum < t) {
    c = e.count > 0 ? c - (t - e.sum) / static_cast<float>(e.count) : 0.0f;
    c = c > 0.0f ? c : 0.0f;
    e = excess_over(z, length, c);
    if (e.sum <= t) return c;
  }
  while (true) {
    const float next = c + (e.sum - t) / static_cast<float>(e.count);
    if (!(next > c)) return c;
    const Excess left = excess_over(z, length, next);
    if (left.count == e.count || left.count == 0) return next;
    c = next;
    e = left;
  }
}

// z = prox(z), group by group.
void clamp_row(const MagrRows& rows, int64_t n, float* z) {
  const int64_t groups = (rows.columns + rows.group_size - 1) / rows.group_size;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * rows.group_size;
    const int64_t rest = rows.columns - first;
    const int64_t length = rest < rows.group_size ? rest : rows.group_size;
    float& last = rows.clamp[n * groups + g];
    const float c = clamp_for(z + first, length, rows.threshold[n], kMagrWarmStart * last);
    last = c == kNoClamp ? 0.0f : c;
    for (int64_t i = first; i < first + length; ++i) {
      const float upper = z[i] < c ? z[i] : c;
      z[i] = upper > -c ? upper : -c;
    }
  }
}

// offset = point - weight; did it change?
int32_t move(const float* __restrict__ point, const float* __restrict__ weight,
             float* __restrict__ offset, int64_t columns) {
  int32_t changed = 0;
  for (int64_t i = 0; i < columns; ++i) {
    const float moved = point[i] - weight[i];
    changed |= moved != offset[i] ? 1 : 0;
    offset[i] = moved;
  }
  return changed;
}

// (last point - new value) . (new value - last value): positive where the momentum points uphill.
float uphill(const float* __restrict__ weight, const float* __restrict__ offset,
             const float* __restrict__ next, const float* __restrict__ value, int64_t columns) {
  float lanes[kMagrLanes] = {};
  const int64_t whole = columns - columns % kMagrLanes;
  for (int64_t i = 0; i < whole; i += kMagrLanes) {
    for (int64_t l = 0; l < kMagrLanes; ++l)
      lanes[l] += (offset[i + l] + weight[i + l] - next[i + l]) * (next[i + l] - value[i + l]);
  }
  for (int64_t i = whole; i < columns; ++i)
    lanes[i - whole] += (offset[i] + weight[i] - next[i]) * (next[i] - value[i]);
  float sum = 0.0f;
  for (int64_t l = 0; l < kMagrLanes; ++l) sum += lanes[l];
  return sum;
}

void add_momentum(float momentum, float* __restrict__ point, float* __restrict__ value,
                  int64_t columns) {
  for (int64_t i = 0; i < columns; ++i) {
    const float next = point[i];
    point[i] = next + momentum * (next - value[i]);
    value[i] = next;
  }
}

void ista_row(const MagrRows& rows, int64_t n) {
  clamp_row(rows, n, rows.point + n * rows.columns);
}

void fista_row(const MagrRows& rows, int64_t n) {
  const int64_t row = n * rows.columns;
  float* point = rows.point + row;
  clamp_row(rows, n, point);
  float& t = rows.inertia[n];
  if (uphill(rows.weight + row, rows.offset + row, point, rows.value + row, rows.columns) > 0.0f)
    t = 1.0f;
  const float next = (1.0f + __builtin_sqrtf(1.0f + 4.0f * t * t)) / 2.0f;
  add_momentum((t - 1.0f) / next, point, rows.value + row, rows.columns);
  t = next;
}

void admm_row(const MagrRows& rows, int64_t n) {
  const int64_t row = n * rows.columns;
  float* __restrict__ point = rows.point + row;
  float* __restrict__ dual = rows.dual + row;
  float* __restrict__ value = rows.value + row;
  for (int64_t i = 0; i < rows.columns; ++i) {
    dual[i] += point[i];
    value[i] = dual[i];
  }
  clamp_row(rows, n, value);
  for (int64_t i = 0; i < rows.columns; ++i) {
    dual[i] -= value[i];
    point[i] = value[i] - dual[i];
  }
}

}  // namespace

void magr_rows(const MagrRows& rows) {
  for (int64_t n = 0; n < rows.rows; ++n) {
    if (rows.solver == MagrSolver::ista) ista_row(rows, n);
    if (rows.solver == MagrSolver::fista) fista_row(rows, n);
    if (rows.solver == MagrSolver::admm) admm_row(rows, n);
    const int64_t row = n * rows.columns;
    rows.changed[n] = move(rows.point + row, rows.weight + row, rows.offset + row, rows.columns);
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
