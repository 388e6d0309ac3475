// What the 32 lanes of a warp do together.
#pragma once
#include <csrc/core/launch.cuh>

namespace torchquant {

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ inline int warp_lane() { return static_cast<int>(threadIdx.x % kWarpSize); }

// The same bits in every lane, for a combine(a, b) that does not mind the order of its two
// arguments. The pairs are those of a tree over 32 lanes that halves from the top, the order in
// which the CPU leaves add their partial sums.
template <class Combine>
__device__ float warp_reduce(float x, const Combine& combine) {
  for (int half = kWarpSize / 2; half > 0; half /= 2)
    x = combine(x, __shfl_xor_sync(kFullWarp, x, half));
  return x;
}

__device__ inline float warp_sum(float x) {
  return warp_reduce(x, [](float a, float b) { return a + b; });
}

// x of the first `lanes` lanes of a half warp, added in their order; the two halves are apart.
constexpr int kHalfWarp = kWarpSize / 2;
__device__ inline float sum_in_order(float x, int lanes) {
  float sum = 0.0f;
  for (int l = 0; l < lanes; ++l) sum += __shfl_sync(kFullWarp, x, l, kHalfWarp);
  return sum;
}

// Up to 128 floats of a row in registers: lane l holds columns l, l + 32, l + 64 and l + 96.
struct WarpRow {
  static constexpr int kSlots = 4;
  static constexpr int kColumns = kSlots * kWarpSize;
  float values[kSlots] = {};

  __device__ void load(const float* row, int width) {
    for_each_own(width, [&](int k, float& value) { value = row[k]; });
  }

  // Column j, for every lane.
  __device__ float at(int j) const {
    float mine = values[0];
    for (int s = 1; s < kSlots; ++s)
      mine = j / kWarpSize == s ? values[s] : mine;  // an index would move values out of registers
    return __shfl_sync(kFullWarp, mine, j % kWarpSize);
  }

  __device__ void set(int j, float x) {
    for_each_own(kColumns, [&](int k, float& value) { value = k == j ? x : value; });
  }

  // this += factor * row
  __device__ void add(float factor, const float* row, int width) {
    for_each_own(width, [&](int k, float& value) { value += factor * __ldg(row + k); });
  }

  template <class Visit>
  __device__ void for_each_own(int width, const Visit& visit) {
    for (int s = 0; s < kSlots; ++s) {
      const int k = warp_lane() + s * kWarpSize;
      if (k < width) visit(k, values[s]);
    }
  }
};

}  // namespace torchquant
