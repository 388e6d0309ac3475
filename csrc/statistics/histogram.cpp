// Log-binned histograms of activations: one pass, exact sums, merged by adding; and their
// quantiles.
#include <csrc/statistics/histogram.h>

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/core/histogram.h>
#include <csrc/core/parallel.h>
#include <csrc/statistics/histogram_bins.h>
#include <torch/library.h>

#include <functional>

namespace torchquant {
namespace {

constexpr int64_t kBinsPerChunk = 1024;
constexpr int64_t kConvertedAtOnce = 1 << 15;  // float32 copies of half types stay in L2
// Values of each channel that are made contiguous at once: 32 channels of these are 16 MB.
constexpr int64_t kChannelValues = 1 << 17;

// Adds one table's worth of values [n].
void count_values(const at::Tensor& values, int32_t mantissa, HistogramWords* table) {
  const bool whole = values.is_cuda() || values.scalar_type() == at::kFloat;
  const int64_t step = whole ? std::max<int64_t>(values.size(0), 1) : kConvertedAtOnce;
  for (int64_t first = 0; first < values.size(0); first += step) {
    const at::Tensor part =
        values.narrow(0, first, std::min(step, values.size(0) - first)).to(at::kFloat).contiguous();
    const HistogramCount work{part.const_data_ptr<float>(), part.size(0), mantissa, table};
    TORCHQUANT_RUN(histogram_count, values, work);
  }
}

// One table a task; values_of(t) gives the values [n] of table t.
at::Tensor count_tables(const at::Tensor& like, int64_t tables, int64_t bins,
                        const std::function<at::Tensor(int64_t)>& values_of) {
  static_assert(sizeof(HistogramWords) == 2 * sizeof(int64_t));
  const at::Tensor words = at::zeros({tables, bins, 2}, like.options().dtype(at::kLong));
  auto* const first = static_cast<HistogramWords*>(words.mutable_data_ptr());
  const auto count = [&](int64_t t) {
    count_values(values_of(t), bin_mantissa_of(bins), first + t * bins);
  };
  if (like.is_cuda()) {
    for (int64_t t = 0; t < tables; ++t) count(t);
  } else {
    for_each_chunk(tables, count);
  }
  return words;
}

// Adds words [T, B, 2] to one histogram [3, B].
void merge_tables(const at::Tensor& words, const at::Tensor& histogram) {
  const int64_t bins = words.size(1);
  HistogramMerge all{static_cast<const HistogramWords*>(words.const_data_ptr()),
                     words.size(0),
                     bin_mantissa_of(bins),
                     0,
                     bins,
                     histogram.mutable_data_ptr<double>()};
  if (words.is_cuda()) {
    TORCHQUANT_LAUNCH(histogram_merge, all);
    return;
  }
  for_each_chunk((bins + kBinsPerChunk - 1) / kBinsPerChunk, [&](int64_t chunk) {
    HistogramMerge part = all;
    part.first = chunk * kBinsPerChunk;
    part.bins = std::min(kBinsPerChunk, bins - part.first);
    histogram_merge(part);
  });
}

// The order of values does not matter, so any dense layout is read as it lies.
at::Tensor flatten(const at::Tensor& x) {
  if (x.is_non_overlapping_and_dense()) return x.as_strided({x.numel()}, {1});
  return x.reshape({-1});
}

void accumulate_tensor(const at::Tensor& histogram, const at::Tensor& x) {
  const at::Tensor values = flatten(x);
  const int64_t bins = histogram.size(-1), per_table = values_per_table(bin_mantissa_of(bins));
  const int64_t count = values.size(0), step = per_table * kHistogramTables;
  for (int64_t first = 0; first < count; first += step) {
    const int64_t here = std::min(step, count - first);
    const auto part = [&](int64_t t) {
      const int64_t begin = t * per_table;
      return values.narrow(0, first + begin, std::min(per_table, here - begin));
    };
    merge_tables(count_tables(x, (here + per_table - 1) / per_table, bins, part), histogram);
  }
}

void accumulate_channels(const at::Tensor& histogram,  // [C, 3, B]
                         const at::Tensor& x, int64_t axis) {
  const int64_t bins = histogram.size(-1), channels = histogram.size(0);
  const at::Tensor rows = x.movedim(axis, 0).reshape({channels, -1});  // [C, L]
  const int64_t step = std::min(values_per_table(bin_mantissa_of(bins)), kChannelValues);
  for (int64_t channel = 0; channel < channels; channel += kHistogramTables) {
    const int64_t here = std::min(kHistogramTables, channels - channel);
    for (int64_t first = 0; first < rows.size(1); first += step) {
      const at::Tensor block = rows.narrow(0, channel, here)
                                   .narrow(1, first, std::min(step, rows.size(1) - first))
                                   .contiguous();
      const at::Tensor words =
          count_tables(x, here, bins, [&](int64_t t) { return block.select(0, t); });
      const auto merge = [&](int64_t t) {
        merge_tables(words.narrow(0, t, 1), histogram.select(0, channel + t));
      };
      if (x.is_cuda()) {
        for (int64_t t = 0; t < here; ++t) merge(t);
      } else {
        for_each_chunk(here, merge);
      }
    }
  }
}

void check_values(const char* op, const at::Tensor& x, const at::Tensor& histogram, int64_t axis) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, op,
                   ": x must be float32, float16 or bfloat16, got ", type);
  TORCH_CHECK_VALUE(x.device() == histogram.device(), op, ": x must be on ", histogram.device(),
                    ", got ", x.device());
  if (histogram.dim() == 2) return;
  TORCH_CHECK_VALUE(axis >= -x.dim() && axis < x.dim() && x.size(axis) == histogram.size(0), op,
                    ": x must have the C=", histogram.size(0), " channels of histogram along axis ",
                    axis, ", got ", x.sizes());
}

// NaN and Inf have bins of their own: the outermost 2^m on both sides.
void check_counted_finite(const char* op, const at::Tensor& histogram) {  // [3, B]
  const int64_t bins = histogram.size(1), side = bins / kFloatBinsBase;
  const at::Tensor counts = histogram.select(0, 0);
  const at::Tensor outermost =
      at::cat({counts.narrow(0, 0, side), counts.narrow(0, bins - side, side)});
  const auto bad = static_cast<int64_t>(outermost.sum().item<double>());
  TORCH_CHECK_VALUE(bad == 0, op, ": x must be finite, got ", bad, " NaN or Inf");
}

void histogram_accumulate_(const at::Tensor& histogram,  // [3, B] or [C, 3, B]
                           const at::Tensor& x, int64_t axis) {
  const char* op = "histogram_accumulate_";
  check_device(op, histogram);
  check_histogram(op, histogram);
  check_values(op, x, histogram, axis);
  if (x.numel() == 0) return;

  const c10::DeviceGuard guard(x.device());
  if (histogram.dim() == 3) {
    check_finite(op, "x", x);  // costs less than a second set of so many bins
    const at::Tensor total = histogram.contiguous();
    accumulate_channels(total, x, axis);
    if (!total.is_same(histogram)) histogram.copy_(total);
    return;
  }
  const at::Tensor fresh = at::zeros(histogram.sizes(), histogram.options());
  accumulate_tensor(fresh, x);
  check_counted_finite(op, fresh);
  histogram.add_(fresh);
}

at::Tensor histogram_quantile(const at::Tensor& histogram,  // [3, B] or [C, 3, B]
                              at::ArrayRef<double> quantiles) {
  const char* op = "histogram_quantile";
  check_device(op, histogram);
  for (const double q : quantiles)
    TORCH_CHECK_VALUE(q >= 0 && q <= 1, op, ": quantiles must be in [0, 1], got ", q);
  const at::Tensor rows = histogram_rows(op, histogram);
  const int64_t count = static_cast<int64_t>(quantiles.size()), bins = rows.size(2);
  const at::Tensor out = at::empty({rows.size(0), count}, rows.options().dtype(at::kFloat));
  const double* const first = rows.const_data_ptr<double>();
  float* const values = out.mutable_data_ptr<float>();
  for_each_chunk(rows.size(0), [&](int64_t row) {
    const std::vector<OccupiedBin> occupied = occupied_bins(first + row * 3 * bins, bins);
    for (int64_t i = 0; i < count; ++i)
      values[row * count + i] =
          static_cast<float>(quantile_of(occupied, count_of(occupied), quantiles[i]));
  });
  return (histogram.dim() == 2 ? out.select(0, 0) : out).to(histogram.device());
}

// Value number rank (from 0) of the values in the bins.
double value_at(const std::vector<OccupiedBin>& bins, double rank) {
  for (const OccupiedBin& bin : bins) {
    if (rank < bin.count)
      return bin.low + (bin.count > 1 ? rank / (bin.count - 1) * (bin.high - bin.low) : 0);
    rank -= bin.count;
  }
  return bins.back().high;
}

}  // namespace

double quantile_of(const std::vector<OccupiedBin>& bins, double count, double q) {
  const double rank = q * (count - 1), below = std::floor(rank);
  const double low = value_at(bins, below);
  return low + (rank - below) * (value_at(bins, below + 1) - low);
}

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def("histogram_accumulate_(Tensor(a!) histogram, Tensor x, *, int axis=-1) -> ()");
  m.def("histogram_quantile(Tensor histogram, float[] quantiles) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("histogram_accumulate_", histogram_accumulate_);
  m.impl("histogram_quantile", histogram_quantile);
}
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) {
  m.impl("histogram_accumulate_", histogram_accumulate_);
  m.impl("histogram_quantile", histogram_quantile);
}
#endif

}  // namespace torchquant
