// Calibration of the log family: one log-binned histogram serves every candidate, and the best
// one's formula becomes a table of thresholds that is exact to the last float.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/core/histogram.h>
#include <csrc/quantizers/sulq.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace torchquant {
namespace {

constexpr int64_t kBins = 16384;  // of the histogram that is made here: 32 per octave
// eta is 2^-1 .. 2^-20 of the power of two that bounds the largest value, which is 1 for a softmax.
constexpr int64_t kEtas = 20;
constexpr double kReferenceEtas[] = {1e-3, .005, .01, .02, .03, .04, .05, .1, .2, .5, 1};
constexpr int64_t kTops = 24;      // largest levels tried by log2 and log_sqrt2
constexpr int64_t kShrinks = 100;  // ranges tried by uniform
constexpr double kLeastStep = 1e-6;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

enum class Variant { zero_exact, paper, reference, log2, log_sqrt2, uniform };

Variant parse_variant(const char* op, std::string_view name) {
  if (name == "zero_exact") return Variant::zero_exact;
  if (name == "paper") return Variant::paper;
  if (name == "reference") return Variant::reference;
  if (name == "log2") return Variant::log2;
  if (name == "log_sqrt2") return Variant::log_sqrt2;
  TORCH_CHECK_VALUE(name == "uniform", op,
                    ": variant must be zero_exact, paper, reference, log2, log_sqrt2 or uniform, "
                    "got '",
                    name, "'");
  return Variant::uniform;
}

// --- what is known of the data ---

struct Bin {
  double count;
  double sum;
  double squares;
  double mean;
};

struct Data {
  std::vector<Bin> bins;  // those that hold something, rising
  double lo = 0;          // mean of the first bin
  double hi = 1;          // mean of the last bin; 1 when everything is zero: any grid will do
};

Data data_of(const char* op, const at::Tensor& histogram) {  // float64 [1, 3, B], on the CPU
  const int64_t width = histogram.size(2);
  const double* counts = histogram.const_data_ptr<double>();
  Data data;
  double negative = 0;
  for (int64_t b = 0; b < width; ++b) {
    const double count = counts[b], sum = counts[width + b];
    if (count <= 0) continue;
    negative += b < width / 2 ? count : 0;
    data.bins.push_back({count, sum, counts[2 * width + b], sum / count});
  }
  TORCH_CHECK_VALUE(negative == 0, op, ": x must not be negative, got ", negative,
                    " negative values");
  data.lo = data.bins.front().mean;
  data.hi = data.bins.back().mean > 0 ? data.bins.back().mean : 1;
  return data;
}

at::Tensor histogram_of(const char* op, const at::Tensor& x) {
  if (x.scalar_type() == at::kDouble) {
    check_histogram(op, x);
    TORCH_CHECK_VALUE(x.dim() == 2, op, ": a histogram (float64) must be [3, B], got ", x.sizes());
    return x;
  }
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, op,
                   ": x must be float32, float16 or bfloat16, or a float64 histogram, got ", type);
  TORCH_CHECK_VALUE(x.numel() > 0, op, ": x must hold at least one value, got none");
  check_finite(op, "x", x);
  const at::Tensor histogram = at::zeros({3, kBins}, x.options().dtype(at::kDouble));
  static const auto accumulate = c10::Dispatcher::singleton()
                                     .findSchemaOrThrow("torchquant::histogram_accumulate_", "")
                                     .typed<void(const at::Tensor&, const at::Tensor&, int64_t)>();
  accumulate.call(histogram, x.reshape(-1), -1);
  return histogram;
}

// --- candidates ---

// w = sign log2(x + eta); q = round((w - offset) / step) within low .. high;
// exponent = sign (step q + offset), rounded to multiples of unit. With a zero code the last q is
// zero. Uniform: the level of x on a grid of `scale`.
struct Staircase {
  double sign = -1;
  double eta = 0;
  double offset = 0;
  double step = 1;
  double low = 0;
  double high = 0;
  double unit = 1;
  bool zero_code = false;
  float scale = 0;  // of uniform, which has no other fields but high

  // Rises with x: the value of a uniform level, the exponent of any other.
  double level(float x) const {
    if (scale > 0) return to_value(to_code(x, scale, 0.0f, static_cast<float>(high)), scale, 0.0f);
    const double w = sign * std::log2(x + eta);
    const double q = round_to_integer(std::clamp((w - offset) / step, low, high));
    if (zero_code && q == high) return -kInfinity;
    return sign * unit * round_to_integer((step * q + offset) / unit);
  }
  double exponent(double level) const { return scale > 0 ? std::log2(level) : level; }
};

double step_of(double lo, double hi, double steps) {
  const double step = (hi - lo) / steps;
  return step > kLeastStep ? step : 1;  // data in one point: the plain log2 grid around it
}

// x = 0 is an end of the range, and a float offset keeps the ends exact: 0 is a level.
Staircase zero_exact(const Data& data, double eta, double steps) {
  const double offset = -std::log2(data.hi + eta);
  return {
      .eta = eta, .offset = offset, .step = step_of(offset, -std::log2(eta), steps), .high = steps};
}

// Eq. 13 and 14: the range of the data, an integral zero point.
Staircase paper(const Data& data, double eta, double steps) {
  const double lo = -std::log2(data.hi + eta), hi = -std::log2(data.lo + eta);
  const double step = step_of(lo, hi, steps);
  const double zero_point = round_to_integer(-lo / step);
  return {.eta = eta, .step = step, .low = -zero_point, .high = steps - zero_point};
}

// The released code: +log2 with a float offset.
Staircase reference(const Data& data, double eta, double steps) {
  const double lo = std::log2(data.lo + eta), hi = std::log2(data.hi + eta);
  return {.sign = 1, .eta = eta, .offset = lo, .step = step_of(lo, hi, steps), .high = steps};
}

double ceiling_exponent(const Data& data, double unit) {
  return std::ceil(std::log2(data.hi) / unit) * unit;
}

std::vector<double> etas_of(const Data& data, Variant variant) {
  std::vector<double> etas;
  if (variant == Variant::reference) {
    for (const double eta : kReferenceEtas)
      etas.push_back(static_cast<float>(eta));  // as it is returned
    return etas;
  }
  for (int64_t k = 1; k <= kEtas; ++k)
    etas.push_back(std::exp2(std::max(ceiling_exponent(data, 1) - k, -126.0)));
  return etas;
}

std::vector<Staircase> sulq_candidates(const Data& data, Variant variant, double steps) {
  std::vector<Staircase> candidates;
  for (const double eta : etas_of(data, variant)) {
    candidates.push_back(variant == Variant::zero_exact ? zero_exact(data, eta, steps)
                         : variant == Variant::paper    ? paper(data, eta, steps)
                                                        : reference(data, eta, steps));
  }
  return candidates;
}

std::vector<Staircase> log_candidates(const Data& data, double unit, double steps) {
  std::vector<Staircase> candidates;
  for (int64_t i = 0; i < kTops; ++i) {
    candidates.push_back({.offset = static_cast<double>(i) * unit - ceiling_exponent(data, unit),
                          .step = unit,
                          .high = steps,
                          .unit = unit,
                          .zero_code = true});
  }
  return candidates;
}

std::vector<Staircase> uniform_candidates(const Data& data, double steps) {
  std::vector<Staircase> candidates;
  for (int64_t i = kShrinks; i > 0; --i) {
    const double range = data.hi * static_cast<double>(i) / kShrinks;
    const float least = std::numeric_limits<float>::min();
    candidates.push_back(
        {.high = steps, .scale = std::max(static_cast<float>(range / steps), least)});
  }
  return candidates;
}

std::vector<Staircase> candidates_of(const Data& data, Variant variant, double steps) {
  switch (variant) {
    case Variant::log2:
      return log_candidates(data, 1, steps);
    case Variant::log_sqrt2:
      return log_candidates(data, 0.5, steps);
    case Variant::uniform:
      return uniform_candidates(data, steps);
    default:
      return sulq_candidates(data, variant, steps);
  }
}

// --- the table ---

struct Table {
  double eta = 0;
  std::vector<float> thresholds;
  std::vector<float> exponents;
};

// The levels that some x >= 0 has, in rising order; between two of them the largest float that
// still has the lower one, found by bisecting the bit patterns.
Table table_of(const Staircase& stairs) {
  const float largest = std::numeric_limits<float>::max();
  Table table = {stairs.eta, {}, {}};
  for (uint32_t first = ordered_pattern(0.0f);;) {
    const double level = stairs.level(float_of_pattern(first));
    table.exponents.push_back(static_cast<float>(stairs.exponent(level)) + 0.0f);  // no -0
    if (stairs.level(largest) == level) return table;
    uint32_t same = first, other = ordered_pattern(largest);
    while (other - same > 1) {
      const uint32_t middle = same + (other - same) / 2;
      (stairs.level(float_of_pattern(middle)) == level ? same : other) = middle;
    }
    table.thresholds.push_back(float_of_pattern(same));
    first = other;
  }
}

// The values of a bin that a threshold cuts are taken as evenly spread, with the bin's own mean and
// variance; any other bin is exact.
double squared_error(const Bin& bin, const std::vector<float>& thresholds,
                     const std::vector<double>& values) {
  const double variance = std::max(bin.squares / bin.count - bin.mean * bin.mean, 0.0);
  const double half = std::sqrt(3 * variance), lo = bin.mean - half, hi = bin.mean + half;
  const auto first = std::lower_bound(thresholds.begin(), thresholds.end(), lo);
  size_t code = static_cast<size_t>(first - thresholds.begin());
  if (code == thresholds.size() || hi <= thresholds[code]) {
    const double v = values[code];
    return bin.squares - 2 * v * bin.sum + v * v * bin.count;
  }
  double integral = 0;  // of (x - value)^2 over lo .. hi
  for (double from = lo; from < hi; ++code) {
    const double to = code < thresholds.size() ? std::min<double>(thresholds[code], hi) : hi;
    const double a = from - values[code], b = to - values[code];
    integral += (b * b * b - a * a * a) / 3;
    from = to;
  }
  return bin.count * integral / (hi - lo);
}

double squared_error(const Data& data, const Table& table) {
  std::vector<double> values;
  for (const float exponent : table.exponents) values.push_back(std::exp2(exponent) - table.eta);
  double error = 0;
  for (const Bin& bin : data.bins) error += squared_error(bin, table.thresholds, values);
  return error;
}

Table best_table(const Data& data, Variant variant, double steps) {
  Table best;
  double least = kInfinity;
  for (const Staircase& candidate : candidates_of(data, variant, steps)) {
    Table table = table_of(candidate);
    const double error = squared_error(data, table);
    if (!(error < least)) continue;
    least = error;
    best = std::move(table);
  }
  // The released code searches with 2^b codes and then runs with one more.
  return variant == Variant::reference ? table_of(reference(data, best.eta, steps + 1)) : best;
}

at::Tensor tensor_of(const std::vector<float>& values, const at::Tensor& like) {
  const at::Tensor out = at::empty({static_cast<int64_t>(values.size())}, at::kFloat);
  std::copy(values.begin(), values.end(), out.mutable_data_ptr<float>());
  return out.to(like.device());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> sulq_fit(const at::Tensor& x, int64_t bits,
                                                        std::string_view variant_name) {
  const char* op = "sulq_fit";
  check_device(op, x);
  check_bits(op, bits);
  const Variant variant = parse_variant(op, variant_name);
  const c10::DeviceGuard guard(x.device());
  const Data data = data_of(op, histogram_rows(op, histogram_of(op, x)));

  Table table = best_table(data, variant, max_code_of(bits));
  const int64_t all = (int64_t{1} << bits) + (variant == Variant::reference ? 1 : 0);
  const size_t levels = static_cast<size_t>(std::min(all, kSulqMaxLevels));
  table.exponents.resize(levels, table.exponents.back());
  table.thresholds.resize(levels - 1, std::numeric_limits<float>::infinity());
  return {at::scalar_tensor(table.eta, x.options().dtype(at::kFloat)),
          tensor_of(table.thresholds, x), tensor_of(table.exponents, x)};
}

std::vector<float> floats_of(const char* op, const char* argument, const at::Tensor& tensor,
                             const at::Tensor& histogram) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, op, ": ", argument, " must be float32, got ",
                   tensor.scalar_type());
  check_same_device(op, argument, tensor, histogram);
  const at::Tensor here = tensor.to(at::kCPU).contiguous();
  return {here.const_data_ptr<float>(), here.const_data_ptr<float>() + here.numel()};
}

at::Tensor sulq_error(const at::Tensor& histogram,    // [3, B]
                      const at::Tensor& eta,          // []
                      const at::Tensor& thresholds,   // [L - 1]
                      const at::Tensor& exponents) {  // [L]
  const char* op = "sulq_error";
  check_device(op, histogram);
  check_histogram(op, histogram);
  TORCH_CHECK_VALUE(histogram.dim() == 2, op, ": histogram must be [3, B], got ",
                    histogram.sizes());
  TORCH_CHECK_VALUE(eta.numel() == 1, op, ": eta must hold one value, got shape ", eta.sizes());
  TORCH_CHECK_VALUE(
      exponents.dim() == 1 && thresholds.dim() == 1 && exponents.size(0) == thresholds.size(0) + 1,
      op, ": exponents must be one more than thresholds, got ", exponents.sizes(), " and ",
      thresholds.sizes());
  const Table table = {floats_of(op, "eta", eta, histogram)[0],
                       floats_of(op, "thresholds", thresholds, histogram),
                       floats_of(op, "exponents", exponents, histogram)};
  const Data data = data_of(op, histogram_rows(op, histogram));
  double count = 0;
  for (const Bin& bin : data.bins) count += bin.count;
  // Rounding may leave an exact one below zero.
  const double error = std::max(squared_error(data, table) / count, 0.0);
  return at::scalar_tensor(error, histogram.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "sulq_fit(Tensor x, *, int bits, str variant=\"zero_exact\") -> (Tensor eta, Tensor "
      "thresholds, Tensor exponents)");
  m.def("sulq_error(Tensor histogram, Tensor eta, Tensor thresholds, Tensor exponents) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("sulq_fit", sulq_fit);
  m.impl("sulq_error", sulq_error);
}
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) {
  m.impl("sulq_fit", sulq_fit);
  m.impl("sulq_error", sulq_error);
}
#endif

}  // namespace torchquant
