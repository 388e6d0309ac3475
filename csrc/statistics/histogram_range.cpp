// Ranges of uniform quantizers, found on the occupied bins of a histogram: every candidate range
// costs one walk over the bins, whatever the number of values.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/core/histogram.h>
#include <csrc/core/parallel.h>
#include <csrc/statistics/histogram_bins.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

namespace torchquant {
namespace {

enum class RangeRule { mse, entropy, percentile, minmax };

struct RangeOptions {
  RangeRule rule;
  GridType type;
  float max_code;
  double percentile;
};

struct Range {
  double low;
  double high;
};

using Bins = std::vector<OccupiedBin>;

Grid grid_of(const Range& range, const RangeOptions& options) {
  return fit_grid(options.type, static_cast<float>(range.low), static_cast<float>(range.high),
                  options.max_code);
}

// Integral of (u - nearest code)^2 from 0 to u: 1/12 for every whole cell, a cubic inside a cell
// and beyond the outermost codes.
double squared_distance_to(double u, float max_code) {
  const double code = to_code(static_cast<float>(u), 1.0f, 0.0f, max_code);
  const double rest = u - code;
  return code / 12 + rest * rest * rest / 3;
}

// Exact where a bin's values share a code; where they do not, they count as spread evenly.
double bin_error(const OccupiedBin& bin, const Grid& grid, float max_code) {
  const float low = to_code(static_cast<float>(bin.low), grid.scale, grid.zero_point, max_code);
  const float high = to_code(static_cast<float>(bin.high), grid.scale, grid.zero_point, max_code);
  const double scale = grid.scale;
  if (low == high) {
    const double value = to_value(low, grid.scale, grid.zero_point);
    const double error = bin.squares - 2 * value * bin.sum + bin.count * value * value;
    return error > 0 ? error : 0;
  }
  const double from = bin.low / scale + grid.zero_point, to = bin.high / scale + grid.zero_point;
  return bin.count * scale * scale *
         (squared_distance_to(to, max_code) - squared_distance_to(from, max_code)) / (to - from);
}

double squared_error(const Bins& bins, const Range& range, const RangeOptions& options) {
  const Grid grid = grid_of(range, options);
  double error = 0;
  for (const OccupiedBin& bin : bins) error += bin_error(bin, grid, options.max_code);
  return error;
}

// The Kullback-Leibler divergence KL(P || Q) of TensorRT's calibration, on log-spaced bins. P: the
// values in range, with the values beyond it added to its outermost bins. Q: the values in range,
// those of each code spread evenly over the widths of its occupied bins. Zero is left out: it has
// a code of its own, and no density.
double divergence(const Bins& bins, const Range& range, const RangeOptions& options) {
  const Grid grid = grid_of(range, options);
  constexpr size_t kCodes = 256;
  double mass[kCodes] = {}, width[kCodes] = {};
  double inside = 0, below = 0, above = 0;
  std::vector<std::pair<const OccupiedBin*, size_t>> kept;
  for (const OccupiedBin& bin : bins) {
    if (bin.zero) continue;
    const double mean = bin.sum / bin.count;
    if (bin.high < range.low || bin.low > range.high) {
      (bin.high < range.low ? below : above) += bin.count;
      continue;
    }
    const size_t code = static_cast<size_t>(
        to_code(static_cast<float>(mean), grid.scale, grid.zero_point, options.max_code));
    kept.emplace_back(&bin, code);
    mass[code] += bin.count;
    width[code] += bin.width;
    inside += bin.count;
  }
  if (kept.empty()) return below + above > 0 ? std::numeric_limits<double>::infinity() : 0;
  const double total = inside + below + above;
  double sum = 0;
  for (size_t i = 0; i < kept.size(); ++i) {
    const auto& [bin, code] = kept[i];
    const double p =
        (bin->count + (i == 0 ? below : 0) + (i + 1 == kept.size() ? above : 0)) / total;
    const double q = mass[code] * (bin->width / width[code]) / inside;
    sum += p * std::log(p / q);
  }
  return sum;
}

// Narrows the range from its full extent towards zero, or (asymmetric) towards the mean of values
// on one side of zero: both ends together and each alone, then each in turn in ever finer steps.
// The full range is the first candidate, so the result is never worse.
class RangeSearch {
 public:
  RangeSearch(const Bins& bins, const Range& full, const RangeOptions& options)
      : bins_(bins), options_(options), full_(full), best_{1, 1} {
    const bool spans_zero = full.low <= 0 && full.high >= 0;
    double sum = 0;
    for (const OccupiedBin& bin : bins) sum += bin.sum;
    const bool about_zero = spans_zero || options.type != GridType::asymmetric;
    center_ = about_zero ? 0 : std::clamp(sum / count_of(bins), full.low, full.high);
    best_score_ = score(range_of(best_));
  }

  Range run() {
    constexpr int kCoarseSteps = 40;  // of 2^(1/4): down to 1/1024 of the full range
    for (int i = 1; i <= kCoarseSteps; ++i) {
      const double factor = std::exp2(-i / 4.0);
      consider({factor, factor});
      if (options_.type != GridType::asymmetric) continue;
      consider({1, factor});
      consider({factor, 1});
    }
    for (const double step : {1.0 / 8, 1.0 / 32, 1.0 / 128}) refine(step);
    return range_of(best_);
  }

 private:
  struct Factors {
    double low;
    double high;
  };

  Range range_of(const Factors& f) const {
    return {center_ + f.low * (full_.low - center_), center_ + f.high * (full_.high - center_)};
  }

  double score(const Range& range) const {
    return options_.rule == RangeRule::mse ? squared_error(bins_, range, options_)
                                           : divergence(bins_, range, options_);
  }

  void consider(const Factors& factors) {
    if (factors.low > 1 || factors.high > 1) return;
    const double candidate = score(range_of(factors));
    if (!(candidate < best_score_)) return;
    best_score_ = candidate;
    best_ = factors;
  }

  void refine(double step) {
    constexpr int kReach = 4;
    const bool together = options_.type != GridType::asymmetric;
    for (const bool high : {true, false}) {
      const Factors start = best_;
      for (int i = -kReach; i <= kReach; ++i) {
        const double factor = std::exp2(i * step);
        consider({high && !together ? start.low : start.low * factor,
                  high || together ? start.high * factor : start.high});
      }
      if (together) return;
    }
  }

  const Bins& bins_;
  const RangeOptions& options_;
  Range full_;
  double center_;
  Factors best_;
  double best_score_;
};

Range range_of(const Bins& bins, const RangeOptions& options) {
  const Range full{bins.front().low, bins.back().high};
  if (options.rule == RangeRule::minmax) return full;
  if (options.rule == RangeRule::percentile) {
    const double count = count_of(bins);
    return {quantile_of(bins, count, 1 - options.percentile),
            quantile_of(bins, count, options.percentile)};
  }
  return RangeSearch(bins, full, options).run();
}

RangeRule parse_rule(const char* op, std::string_view rule) {
  if (rule == "mse") return RangeRule::mse;
  if (rule == "entropy") return RangeRule::entropy;
  if (rule == "percentile") return RangeRule::percentile;
  TORCH_CHECK_VALUE(rule == "minmax", op,
                    ": rule must be mse, entropy, percentile or minmax, got '", rule, "'");
  return RangeRule::minmax;
}

std::tuple<at::Tensor, at::Tensor> histogram_range(
    const at::Tensor& histogram,  // [3, B], [C, 3, B]
    int64_t bits, bool symmetric, std::string_view rule, double percentile) {
  const char* op = "histogram_range";
  check_device(op, histogram);
  check_bits(op, bits);
  TORCH_CHECK_VALUE(percentile > 0.5 && percentile <= 1, op,
                    ": percentile must be a fraction in (0.5, 1], got ", percentile);
  const RangeOptions options{parse_rule(op, rule),
                             symmetric ? GridType::symmetric : GridType::asymmetric,
                             max_code_of(bits), percentile};
  const at::Tensor rows = histogram_rows(op, histogram);
  const int64_t channels = rows.size(0), bins = rows.size(2);
  const at::Tensor scale = at::empty({channels}, rows.options().dtype(at::kFloat));
  const at::Tensor zero_point = at::empty_like(scale);
  const double* const first = rows.const_data_ptr<double>();
  float *const scales = scale.mutable_data_ptr<float>(), *const zeros =
                                                             zero_point.mutable_data_ptr<float>();
  for_each_chunk(channels, [&](int64_t c) {
    const Bins occupied = occupied_bins(first + c * 3 * bins, bins);
    const Grid grid = grid_of(range_of(occupied, options), options);
    scales[c] = grid.scale;
    zeros[c] = grid.zero_point;
  });
  const auto result = [&](const at::Tensor& t) {
    return (histogram.dim() == 2 ? t.select(0, 0) : t).to(histogram.device());
  };
  return {result(scale), result(zero_point)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "histogram_range(Tensor histogram, *, int bits, bool symmetric=False, str rule=\"mse\", "
      "float percentile=0.9999) -> (Tensor scale, Tensor zero_point)");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) { m.impl("histogram_range", histogram_range); }
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) { m.impl("histogram_range", histogram_range); }
#endif

}  // namespace torchquant
