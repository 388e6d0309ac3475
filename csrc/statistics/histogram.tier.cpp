#include <csrc/statistics/histogram.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

constexpr int64_t kBlock = 256;

struct Split {
  uint32_t bin[kBlock];
  uint32_t low[kBlock];
};

// Apart from the additions, so that the compiler makes vectors of it.
void split(const float* values, int64_t count, int32_t mantissa, Split& out) {
  const uint32_t low_mask = (1u << low_bits_of(mantissa)) - 1;
  for (int64_t i = 0; i < count; ++i) {
    out.bin[i] = bin_of(values[i], mantissa);
    out.low[i] = __builtin_bit_cast(uint32_t, values[i]) & low_mask;
  }
}

}  // namespace

void histogram_count(const HistogramCount& work) {
  const uint64_t one = uint64_t{1} << count_shift(work.mantissa);
  Split block;
  for (int64_t first = 0; first < work.count; first += kBlock) {
    const int64_t count = work.count - first < kBlock ? work.count - first : kBlock;
    split(work.values + first, count, work.mantissa, block);
    for (int64_t i = 0; i < count; ++i) {
      HistogramWords& words = work.table[block.bin[i]];
      const uint64_t low = block.low[i];
      words.count_and_low += one + low;
      words.low_squares += low * low;
    }
  }
}

void histogram_merge(const HistogramMerge& merge) {
  for (int64_t bin = merge.first; bin < merge.first + merge.bins; ++bin) merge_bin(merge, bin);
}

}  // namespace torchquant::TORCHQUANT_TIER
