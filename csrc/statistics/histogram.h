// Histograms of activations over the log-spaced bins of core/float_bins.h, float64 [3, B]: count,
// sum and sum of squares of every bin.
// Note [exact histograms]: inside a bin x = base + low * unit with an integer low, so the leaf adds
// integers only: count and sum of low packed into one word, sum of low^2 in another. Integers do
// not mind their order: the same sums for any number of threads, on every tier and device.
#pragma once
#include <csrc/core/cpu_tier.h>
#include <csrc/core/float_bins.h>

namespace torchquant {

// Values that one table of words can take without overflow, for every merge of up to
// kHistogramTables tables: with l bits of low, the packed word needs 2 log2(values) + l + 1 <= 64,
// and the sums of squares of all tables log2(values) + 2 l + 5 <= 64.
constexpr int64_t kHistogramTables = 32;
TORCHQUANT_HOST_DEVICE int32_t low_bits_of(int32_t mantissa) { return kFloatMantissa - mantissa; }
TORCHQUANT_HOST_DEVICE int64_t values_per_table(int32_t mantissa) {
  const int32_t low = low_bits_of(mantissa);
  const int32_t by_count = (63 - low) / 2, by_squares = 59 - 2 * low;
  const int32_t power = by_count < by_squares ? by_count : by_squares;
  return int64_t{1} << (power < 21 ? power : 21);  // 2^21 values: 8 MB read for a table of 256 KB
}

struct HistogramWords {
  uint64_t count_and_low;  // count << count_shift, sum of low below it
  uint64_t low_squares;
};

TORCHQUANT_HOST_DEVICE int32_t count_shift(int32_t mantissa) {
  int32_t power = 0;
  while (int64_t{1} << power < values_per_table(mantissa)) ++power;
  return power + low_bits_of(mantissa);
}

// values -> table; at most values_per_table of them in all calls on one table.
struct HistogramCount {
  const float* values;
  int64_t count;
  int32_t mantissa;
  HistogramWords* table;  // [B], in and out
};

// tables -> histogram: count, sum and sum of squares are added to bins first .. first + bins - 1.
struct HistogramMerge {
  const HistogramWords* tables;  // [tables, B]
  int64_t tables_count;
  int32_t mantissa;
  int64_t first;
  int64_t bins;
  double* histogram;  // [3, B], in and out
};

TORCHQUANT_TIER_LEAF(histogram_count, HistogramCount)
TORCHQUANT_TIER_LEAF(histogram_merge, HistogramMerge)

// What every value of a bin is made of: base + low * unit, the sign apart.
struct BinUnit {
  double base;
  double unit;
  double sign;
};

TORCHQUANT_HOST_DEVICE BinUnit unit_of_bin(int64_t bin, int32_t mantissa) {
  const uint32_t pattern = static_cast<uint32_t>(bin) << low_bits_of(mantissa);
  const bool positive = (pattern & kFloatSign) != 0;
  const uint32_t low_mask = (1u << low_bits_of(mantissa)) - 1;
  const uint32_t bits = (positive ? pattern : ~pattern) & ~kFloatSign & ~low_mask;
  const uint32_t exponent = bits >> kFloatMantissa;
  const uint32_t scale = exponent > 0 ? exponent : 1;  // subnormals have the exponent of the next
  const double unit =
      __builtin_bit_cast(double, static_cast<uint64_t>(scale + 1023 - 127 - kFloatMantissa) << 52);
  return {static_cast<double>(__builtin_bit_cast(float, bits)), unit, positive ? 1.0 : -1.0};
}

// Adds one bin of all tables, in their order.
TORCHQUANT_HOST_DEVICE void merge_bin(const HistogramMerge& merge, int64_t bin) {
  const int64_t all_bins = kFloatBinsBase << merge.mantissa;
  const int32_t shift = count_shift(merge.mantissa);
  uint64_t count = 0, low = 0, squares = 0;
  for (int64_t t = 0; t < merge.tables_count; ++t) {
    const HistogramWords& words = merge.tables[t * all_bins + bin];
    count += words.count_and_low >> shift;
    low += words.count_and_low & ((uint64_t{1} << shift) - 1);
    squares += words.low_squares;
  }
  if (count == 0) return;
  const BinUnit bin_unit = unit_of_bin(bin, merge.mantissa);
  const double n = static_cast<double>(count), base = bin_unit.base, unit = bin_unit.unit;
  const double above = static_cast<double>(low) * unit;  // sum of |x| - base
  merge.histogram[bin] += n;
  merge.histogram[all_bins + bin] += bin_unit.sign * (n * base + above);
  merge.histogram[2 * all_bins + bin] +=
      n * base * base + 2.0 * base * above + static_cast<double>(squares) * unit * unit;
}

}  // namespace torchquant
