// The best levels out of a universe, exactly. With m(a, b) = (u_a + u_b) / 2, and N(m), S(m) the
// number and the sum of the values <= m, the squared error of levels u_1 < .. < u_k is
//   sum of squares + sum over neighbours (u_b - u_a) (2 S(m) - (u_a + u_b) N(m)) + u_k^2 N - 2 u_k
//   S:
// a path of k - 1 edges. Edges satisfy the quadrangle inequality (each value's cost does, case by
// case), so the best predecessor never moves left, and a layer of the path costs |U| log |U|.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/core/histogram.h>
#include <csrc/core/parallel.h>
#include <csrc/quantizers/subset.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace torchquant {
namespace {

constexpr int64_t kValuesPerTable = 1 << 18;
constexpr int32_t kMaxGridBits = 16;       // of a universe whose elements are multiples of 2^-bits,
constexpr double kMaxGridCells = 1 << 16;  // with so many cells between their midpoints
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Elements of the universe as multiples of 1 / units; units = 0 when there is no such grid.
struct Universe {
  std::vector<double> elements;
  int64_t zero = -1;  // index of the element that must be chosen; -1: none
  double units = 0;

  int64_t size() const { return static_cast<int64_t>(elements.size()); }
  double low() const { return 2 * units * elements.front(); }
  double high() const { return 2 * units * elements.back(); }
};

double grid_units(const std::vector<double>& elements) {
  for (int32_t bits = 0; bits <= kMaxGridBits; ++bits) {
    const double units = std::exp2(bits);
    if (2 * units * (elements.back() - elements.front()) > kMaxGridCells) return 0;
    const auto on_grid = [&](double u) { return u * units == std::trunc(u * units); };
    if (!std::all_of(elements.begin(), elements.end(), on_grid)) continue;
    return std::max(std::abs(elements.front()), std::abs(elements.back())) * units < kMaxGridCells
               ? units
               : 0;
  }
  return 0;
}

Universe universe_of(const char* op, const at::Tensor& tensor, int64_t levels, bool keep_zero) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, op, ": universe must be float32, got ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.dim() == 1, op, ": universe must be a vector [U], got ", tensor.sizes());
  check_finite(op, "universe", tensor);
  TORCH_CHECK_VALUE(levels >= 1 && levels <= std::min(tensor.size(0), kSubsetMaxLevels), op,
                    ": levels must be 1 .. min(U, ", kSubsetMaxLevels, ") for U=", tensor.size(0),
                    ", got ", levels);
  const at::Tensor values = tensor.to(at::kCPU).contiguous();
  const float* const first = values.const_data_ptr<float>();
  Universe universe;
  universe.elements.assign(first, first + values.size(0));
  for (int64_t i = 0; i < universe.size(); ++i) {
    TORCH_CHECK_VALUE(i == 0 || first[i - 1] < first[i], op, ": universe must rise, got ",
                      first[std::max<int64_t>(i - 1, 0)], " before ", first[i]);
    if (first[i] == 0 && keep_zero) universe.zero = i;
  }
  universe.units = grid_units(universe.elements);
  return universe;
}

// Values behind one another, as the path needs them: before[i] = number and sum of the first i.
struct Values {
  std::vector<SubsetCell> before;
  bool cells = false;          // between the universe's midpoints, in place of points
  std::vector<double> points;  // [values], rising
  double square_sum = 0;
};

void accumulate(std::vector<SubsetCell>& before) {
  SubsetCell sum{0, 0};
  for (SubsetCell& cell : before) {
    const SubsetCell own = cell;
    cell = sum = {sum.count + own.count, sum.sum + own.sum};
  }
}

Values count_cells(const Universe& universe, const float* x, int64_t count) {
  const auto cells = static_cast<size_t>(universe.high() - universe.low()) + 1;
  const int64_t tables = std::max<int64_t>((count + kValuesPerTable - 1) / kValuesPerTable, 1);
  std::vector<Values> parts(static_cast<size_t>(tables));
  for_each_chunk(tables, [&](int64_t t) {
    Values& part = parts[static_cast<size_t>(t)];
    part.before.assign(cells + 1, {0, 0});
    const int64_t first = t * kValuesPerTable;
    subset_count({x + first, std::min(kValuesPerTable, count - first),
                  static_cast<float>(2 * universe.units), static_cast<float>(universe.low()),
                  static_cast<float>(universe.high()), part.before.data() + 1, &part.square_sum});
  });
  Values all = std::move(parts[0]);
  all.cells = true;
  for (size_t t = 1; t < parts.size(); ++t) {
    all.square_sum += parts[t].square_sum;
    for (size_t i = 0; i <= cells; ++i) {
      all.before[i].count += parts[t].before[i].count;
      all.before[i].sum += parts[t].before[i].sum;
    }
  }
  accumulate(all.before);
  return all;
}

Values sort_values(const float* x, int64_t count) {
  Values values;
  values.points.assign(x, x + count);
  std::sort(values.points.begin(), values.points.end());
  values.before.push_back({0, 0});
  for (const double point : values.points) {
    values.before.push_back({1, point});
    values.square_sum += point * point;
  }
  accumulate(values.before);
  return values;
}

// A bin goes as a whole to the level nearest to its mean.
Values bins_of(const double* histogram, int64_t bins) {
  Values values;
  values.before.push_back({0, 0});
  for (int64_t b = 0; b < bins; ++b) {
    const double count = histogram[b], sum = histogram[bins + b];
    if (count == 0) continue;
    values.points.push_back(sum / count);
    values.before.push_back({count, sum});
    values.square_sum += histogram[2 * bins + b];
  }
  accumulate(values.before);
  return values;
}

class Path {
 public:
  Path(const Universe& universe, const Values& values, int64_t levels)
      : universe_(universe),
        values_(values),
        levels_(levels),
        size_(universe.size()),
        from_(static_cast<size_t>(levels * size_), 0) {}

  // Fills the indices of the levels; returns the squared error.
  double shortest(std::vector<int64_t>& chosen) {
    cost_.assign(static_cast<size_t>(size_), 0);
    for (layer_ = 1; layer_ < levels_; ++layer_) {
      next_.assign(static_cast<size_t>(size_), kInfinity);
      const int64_t zero = universe_.zero;
      // A predecessor has layer_ - 1 elements before it; after zero, it must not be before zero.
      const int64_t split = zero < 0 ? size_ : zero + 1;
      advance(layer_, split, layer_ - 1, split - 1);
      if (zero >= 0) {
        const int64_t first = std::max(zero, layer_ - 1);
        advance(std::max(split, layer_), size_, first, layer_ == 1 ? zero : size_ - 1);
      }
      cost_.swap(next_);
    }
    return trace(chosen);
  }

 private:
  double element(int64_t i) const { return universe_.elements[static_cast<size_t>(i)]; }

  const SubsetCell& before(int64_t a, int64_t b) const {
    const double sum = element(a) + element(b);
    if (values_.cells)
      return values_.before[static_cast<size_t>(sum * universe_.units - universe_.low()) + 1];
    const auto& points = values_.points;
    const auto end = std::upper_bound(points.begin(), points.end(), sum / 2);
    return values_.before[static_cast<size_t>(end - points.begin())];
  }

  double edge(int64_t a, int64_t b) const {
    const SubsetCell& cell = before(a, b);
    return (element(b) - element(a)) * (2 * cell.sum - (element(a) + element(b)) * cell.count);
  }

  // next_[begin .. end-1], each from the best predecessor in low .. high.
  void advance(int64_t begin, int64_t end, int64_t low, int64_t high) {
    if (begin >= end) return;
    const int64_t middle = begin + (end - begin) / 2;
    int64_t best = low;
    double least = kInfinity;
    for (int64_t a = low; a <= std::min(high, middle - 1); ++a) {
      const double cost = cost_[static_cast<size_t>(a)] + edge(a, middle);
      if (!(cost < least)) continue;
      least = cost;
      best = a;
    }
    next_[static_cast<size_t>(middle)] = least;
    from_[static_cast<size_t>(layer_ * size_ + middle)] = static_cast<int32_t>(best);
    advance(begin, middle, low, best);
    advance(middle + 1, end, best, high);
  }

  double trace(std::vector<int64_t>& chosen) const {
    const SubsetCell& all = values_.before.back();
    const int64_t first = std::max(universe_.zero, levels_ - 1);
    int64_t last = first;
    double least = kInfinity;
    for (int64_t i = first; i < (levels_ == 1 && universe_.zero >= 0 ? first + 1 : size_); ++i) {
      const double u = element(i);
      const double cost = cost_[static_cast<size_t>(i)] + u * (u * all.count - 2 * all.sum);
      if (!(cost < least)) continue;
      least = cost;
      last = i;
    }
    chosen.assign(static_cast<size_t>(levels_), last);
    for (int64_t layer = levels_ - 1; layer > 0; --layer) {
      last = from_[static_cast<size_t>(layer * size_ + last)];
      chosen[static_cast<size_t>(layer - 1)] = last;
    }
    return std::max(values_.square_sum + least, 0.0);
  }

  const Universe& universe_;
  const Values& values_;
  const int64_t levels_;
  const int64_t size_;
  int64_t layer_ = 0;
  std::vector<double> cost_;  // of the best path to each element
  std::vector<double> next_;
  std::vector<int32_t> from_;  // [levels, size]
};

// Rows of values: [C, T] float32, or [C, 3, B] histograms.
at::Tensor rows_of(const char* op, const at::Tensor& x, std::optional<int64_t> axis) {
  if (x.scalar_type() == at::kDouble) return histogram_rows(op, x);
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, op,
                   ": x must be float32, float16, bfloat16 or a float64 histogram, got ", type);
  check_finite(op, "x", x);
  const at::Tensor host = x.to(at::kCPU, at::kFloat);
  if (!axis) return host.reshape({1, host.numel()}).contiguous();
  TORCH_CHECK_VALUE(*axis >= -x.dim() && *axis < x.dim(), op, ": axis must be one of x's ", x.dim(),
                    " dimensions, got ", *axis);
  const int64_t channels = x.size(*axis), length = x.numel() / std::max<int64_t>(channels, 1);
  return host.movedim(*axis, 0).reshape({channels, length}).contiguous();
}

Values values_of(const at::Tensor& rows, int64_t row, const Universe& universe) {
  if (rows.dim() == 3) {
    const int64_t bins = rows.size(2);
    return bins_of(rows.const_data_ptr<double>() + row * 3 * bins, bins);
  }
  const float* const x = rows.const_data_ptr<float>() + row * rows.size(1);
  return universe.units > 0 ? count_cells(universe, x, rows.size(1)) : sort_values(x, rows.size(1));
}

std::tuple<at::Tensor, at::Tensor> subset_select(const at::Tensor& x, const at::Tensor& universe,
                                                 int64_t levels, std::optional<int64_t> axis,
                                                 bool keep_zero) {
  const char* op = "subset_select";
  check_device(op, x);
  check_same_device(op, "universe", universe, x);
  const Universe all = universe_of(op, universe, levels, keep_zero);
  const c10::DeviceGuard guard(x.device());
  // The search is done once a layer and walks a small graph: on the host, whatever the device.
  const at::Tensor rows = rows_of(op, x, axis);
  const bool channels = rows.dim() == 3 ? x.dim() == 3 : axis.has_value();
  const at::Tensor out = at::empty({rows.size(0), levels}, at::kFloat);
  const at::Tensor errors = at::empty({rows.size(0)}, at::kDouble);
  const auto select = [&](int64_t row) {
    std::vector<int64_t> chosen;
    const Values values = values_of(rows, row, all);
    errors.mutable_data_ptr<double>()[row] = Path(all, values, levels).shortest(chosen);
    for (int64_t i = 0; i < levels; ++i)
      out.mutable_data_ptr<float>()[row * levels + i] =
          static_cast<float>(all.elements[static_cast<size_t>(chosen[static_cast<size_t>(i)])]);
  };
  if (rows.size(0) == 1) {
    select(0);  // its values are counted in parallel
  } else {
    for_each_chunk(rows.size(0), select);
  }
  return {(channels ? out : out.select(0, 0)).to(x.device()),
          (channels ? errors : errors.select(0, 0)).to(x.device())};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "subset_select(Tensor x, Tensor universe, *, int levels, int? axis=None, "
      "bool keep_zero=True) -> (Tensor levels, Tensor sse)");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) { m.impl("subset_select", subset_select); }
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) { m.impl("subset_select", subset_select); }
#endif

}  // namespace torchquant
