// What quantiles and range searches read of a histogram: its occupied bins.
#pragma once
#include <csrc/statistics/histogram.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace torchquant {

struct OccupiedBin {
  double count;
  double sum;
  double squares;
  double low;  // bounds of the values in the bin
  double high;
  double width;  // of the whole bin
  bool zero;     // the bin that begins at 0
};

// No value of n lies further from their mean than their deviation times sqrt(n - 1) (Samuelson):
// with the edges, that bounds one or two values exactly and constant data to float32's last bit.
inline OccupiedBin occupied_bin(const double* histogram, int64_t bins, int64_t bin) {
  // Sums of squares are rounded; a relative deviation below 1e-7 means equal values.
  constexpr double kRoundingVariance = 1e-14;
  const int32_t mantissa = bin_mantissa_of(bins);
  const double count = histogram[bin], sum = histogram[bins + bin];
  const double squares = histogram[2 * bins + bin];
  const double lower = bin_lower_edge(static_cast<uint32_t>(bin), mantissa);
  const double upper = bin_upper_edge(static_cast<uint32_t>(bin), mantissa);
  const double mean = std::clamp(sum / count, lower, upper);
  const double variance = squares / count - mean * mean;
  const bool constant = count <= 1 || !(variance > kRoundingVariance * mean * mean);
  const double reach = constant ? 0.0 : std::sqrt(variance * (count - 1));
  return {count,
          sum,
          squares,
          std::max(lower, mean - reach),
          std::min(upper, mean + reach),
          upper - lower,
          bin == zero_bin(mantissa)};
}

inline std::vector<OccupiedBin> occupied_bins(const double* histogram, int64_t bins) {
  std::vector<OccupiedBin> occupied;
  for (int64_t bin = 0; bin < bins; ++bin) {
    if (histogram[bin] > 0) occupied.push_back(occupied_bin(histogram, bins, bin));
  }
  return occupied;
}

inline double count_of(const std::vector<OccupiedBin>& bins) {
  double count = 0;
  for (const OccupiedBin& bin : bins) count += bin.count;
  return count;
}

// As torch.quantile: linear between the two values around rank q (n - 1). The values of a bin are
// taken as evenly spread between its bounds.
double quantile_of(const std::vector<OccupiedBin>& bins, double count, double q);

}  // namespace torchquant
