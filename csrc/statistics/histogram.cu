#include <csrc/statistics/histogram.h>

#include <csrc/core/warp.cuh>

namespace torchquant {
namespace {

constexpr int64_t kValuesPerWarp = 1024;

__device__ void add_to(uint64_t* word, uint64_t x) {
  atomicAdd(reinterpret_cast<unsigned long long*>(word), static_cast<unsigned long long>(x));
}

// Integers: the order in which the atomic additions land does not matter.
__global__ void histogram_count_kernel(const HistogramCount work) {
  const uint64_t one = uint64_t{1} << count_shift(work.mantissa);
  const uint32_t low_mask = (1u << low_bits_of(work.mantissa)) - 1;
  for (int64_t row = first_row(); row * kValuesPerWarp < work.count; row += row_step()) {
    const int64_t first = row * kValuesPerWarp;
    const int64_t end = first + kValuesPerWarp < work.count ? first + kValuesPerWarp : work.count;
    for (int64_t i = first + warp_lane(); i < end; i += kWarpSize) {
      const float x = work.values[i];
      HistogramWords& words = work.table[bin_of(x, work.mantissa)];
      const uint64_t low = __builtin_bit_cast(uint32_t, x) & low_mask;
      add_to(&words.count_and_low, one + low);
      add_to(&words.low_squares, low * low);
    }
  }
}

__global__ void histogram_merge_kernel(const HistogramMerge merge) {
  for (int64_t row = first_row(); row * kWarpSize < merge.bins; row += row_step()) {
    const int64_t bin = row * kWarpSize + warp_lane();
    if (bin < merge.bins) merge_bin(merge, merge.first + bin);
  }
}

}  // namespace

void launch_histogram_count(const HistogramCount& work, void* stream) {
  launch_rows("histogram_count", histogram_count_kernel, work,
              (work.count + kValuesPerWarp - 1) / kValuesPerWarp, stream);
}

void launch_histogram_merge(const HistogramMerge& merge, void* stream) {
  launch_rows("histogram_merge", histogram_merge_kernel, merge,
              (merge.bins + kWarpSize - 1) / kWarpSize, stream);
}

}  // namespace torchquant
