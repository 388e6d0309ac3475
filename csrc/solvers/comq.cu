#include <csrc/solvers/comq.h>

#include <csrc/core/warp.cuh>

namespace torchquant {
namespace {

static_assert(kComqMaxBlock <= WarpRow::kColumns);
static_assert(kComqDotLanes == 2 * kWarpSize);

// One warp a row, in the order of comq.tier.cpp. The columns already rounded are updated along with
// the others: nobody reads them.
__device__ void block_row(const ComqBlock& block, int64_t row) {
  const int width = static_cast<int>(block.width);
  const float* weight = block.weight + row * block.stride;
  const int32_t* order = block.order == nullptr ? nullptr : block.order + row * block.stride;
  WarpRow gradient, codes, changes;
  gradient.load(block.gradient + row * block.stride, width);
  for (int t = 0; t < width; ++t) {
    const int j = order == nullptr ? t : order[t] - static_cast<int>(block.first_column);
    const int64_t grid = row * block.grids.row_stride + j * block.grids.column_stride;
    const float scale = block.grids.scale[grid];
    const float zero_point = block.grids.zero_point[grid];
    const float inverse = block.inverse_diagonal[j];
    const float code =
        to_code(weight[j] + gradient.at(j) * inverse, scale, zero_point, block.grids.max_code);
    const float change = inverse > 0.0f ? weight[j] - to_value(code, scale, zero_point) : 0.0f;
    gradient.add(change, block.gram + j * block.gram_stride, width);
    codes.set(j, code);
    changes.set(j, change);
  }
  codes.for_each_own(width, [&](int k, float code) {
    block.codes[row * block.stride + k] = static_cast<uint8_t>(code);
  });
  changes.for_each_own(width,
                       [&](int k, float change) { block.change[row * block.width + k] = change; });
}

__global__ void comq_block_kernel(const ComqBlock block) {
  for (int64_t row = first_row(); row < block.rows; row += row_step()) block_row(block, row);
}

// The CPU leaf's kComqDotLanes partial sums, two a lane, and the first step of its tree; warp_sum
// does the rest. A lane reads columns lane, lane + 32, ... of `a` only.
__device__ float dot(const float* a, const float* b, int64_t length) {
  float low = 0.0f;
  float high = 0.0f;
  int64_t k = warp_lane();
  for (; k + kWarpSize < length; k += kComqDotLanes) {
    low += a[k] * __ldg(b + k);
    high += a[k + kWarpSize] * __ldg(b + k + kWarpSize);
  }
  if (k < length) low += a[k] * __ldg(b + k);
  return warp_sum(low + high);
}

// Where a warp keeps the row that it works on: shared memory if it fits, else the row's own place
// in global memory.
__host__ __device__ int64_t shared_row_bytes(int64_t columns) {
  const int64_t bytes = columns * static_cast<int64_t>(sizeof(float));
  return bytes <= kMaxSharedBytes ? bytes : 0;
}
__device__ float* work_row(int64_t columns, float* home) {
  return shared_row_bytes(columns) > 0 ? warp_buffer(columns) : home;
}

// Left-looking: while coordinate t is rounded, the product for coordinate t + 1 is summed without
// it. change[k] is read and written by lane k % 32 alone, so no lane waits for another.
__device__ void greedy_row(const ComqGreedy& all, int64_t row) {
  const int64_t columns = all.columns;
  float* result = all.change + row * columns;
  float* change = work_row(columns, result);
  const float* weight = all.weight + row * columns;
  const int32_t* order = all.order + row * columns;
  for (int64_t k = warp_lane(); k < columns; k += kWarpSize) change[k] = 0.0f;
  float product = 0.0f;  // sum over visited k of change_k H_jk for the current j
  for (int64_t t = 0; t < columns; ++t) {
    const int64_t j = order[t];
    const float* next_gram = t + 1 < columns ? all.gram + order[t + 1] * columns : nullptr;
    const float next_product = next_gram != nullptr ? dot(change, next_gram, columns) : 0.0f;
    const int64_t grid = row * all.grids.row_stride + j * all.grids.column_stride;
    const float scale = all.grids.scale[grid];
    const float zero_point = all.grids.zero_point[grid];
    const float inverse = all.inverse_diagonal[j];
    const float gradient = all.gradient[row * columns + j] + product;
    const float code =
        to_code(weight[j] + gradient * inverse, scale, zero_point, all.grids.max_code);
    const float step = inverse > 0.0f ? weight[j] - to_value(code, scale, zero_point) : 0.0f;
    if (warp_lane() == j % kWarpSize) {
      change[j] = step;
      all.codes[row * columns + j] = static_cast<uint8_t>(code);
    }
    if (next_gram != nullptr) product = next_product + step * next_gram[j];
  }
  if (change == result) return;
  for (int64_t k = warp_lane(); k < columns; k += kWarpSize) result[k] = change[k];
}

__global__ void comq_greedy_kernel(const ComqGreedy all) {
  for (int64_t row = first_row(); row < all.rows; row += row_step()) greedy_row(all, row);
}

struct Trial {  // one coordinate's move, were it the next to move
  int64_t column;
  float code;
  float change;  // of the value, negated: what G gains times H_j
  bool moves;
};

__device__ Trial try_coordinate(const ComqSweep& sweep, int64_t row, int64_t t,
                                const float* gradient) {
  const int64_t j = sweep.order == nullptr ? t : sweep.order[row * sweep.columns + t];
  const int64_t grid = row * sweep.grids.row_stride + j * sweep.grids.column_stride;
  const float scale = sweep.grids.scale[grid];
  const float zero_point = sweep.grids.zero_point[grid];
  const float inverse = sweep.inverse_diagonal[j];
  const float before = static_cast<float>(sweep.codes[row * sweep.columns + j]);
  const float best = to_value(before, scale, zero_point) + gradient[j] * inverse;
  const float code = to_code(best, scale, zero_point, sweep.grids.max_code);
  return {j, code, (before - code) * scale, inverse > 0.0f && code != before};
}

// Codes change rarely after the first sweep: every lane tries a coordinate, and only the first that
// moves is applied.
__device__ int64_t sweep_row(const ComqSweep& sweep, int64_t row) {
  const int64_t columns = sweep.columns;
  float* home = sweep.gradient + row * columns;
  float* gradient = work_row(columns, home);
  for (int64_t k = warp_lane(); k < columns && gradient != home; k += kWarpSize)
    gradient[k] = home[k];
  __syncwarp();
  int64_t changed = 0;
  for (int64_t t = 0; t < columns;) {
    Trial trial = {};
    if (t + warp_lane() < columns) trial = try_coordinate(sweep, row, t + warp_lane(), gradient);
    const unsigned moving = __ballot_sync(kFullWarp, trial.moves);
    if (moving == 0) {
      t += kWarpSize;
      continue;
    }
    const int first = __ffs(static_cast<int>(moving)) - 1;
    t += first + 1;
    if (warp_lane() == first)
      sweep.codes[row * columns + trial.column] = static_cast<uint8_t>(trial.code);
    const float change = __shfl_sync(kFullWarp, trial.change, first);
    const float* gram = sweep.gram + __shfl_sync(kFullWarp, trial.column, first) * columns;
    for (int64_t k = warp_lane(); k < columns; k += kWarpSize)
      gradient[k] += change * __ldg(gram + k);
    __syncwarp();
    ++changed;
  }
  for (int64_t k = warp_lane(); k < columns && gradient != home; k += kWarpSize)
    home[k] = gradient[k];
  return changed;
}

__global__ void comq_sweep_kernel(const ComqSweep sweep) {
  for (int64_t row = first_row(); row < sweep.rows; row += row_step()) {
    const int64_t changed = sweep_row(sweep, row);
    if (changed > 0 && warp_lane() == 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(sweep.changed),
                static_cast<unsigned long long>(changed));
    }
  }
}

}  // namespace

void launch_comq_block(const ComqBlock& block, void* stream) {
  launch_rows("comq_block", comq_block_kernel, block, block.rows, stream);
}

void launch_comq_greedy(const ComqGreedy& all, void* stream) {
  launch_rows("comq_greedy", comq_greedy_kernel, all, all.rows, stream,
              shared_row_bytes(all.columns));
}

void launch_comq_sweep(const ComqSweep& sweep, void* stream) {
  launch_rows("comq_sweep", comq_sweep_kernel, sweep, sweep.rows, stream,
              shared_row_bytes(sweep.columns));
}

}  // namespace torchquant
