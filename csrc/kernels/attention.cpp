#include <csrc/kernels/attention.h>

#include <ATen/ExpandUtils.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <csrc/core/check.h>
#include <csrc/core/parallel.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

namespace torchquant {
namespace {

constexpr const char* kOp = "quantized_attention";
constexpr int64_t kMaxLevels = 256;  // a code is a byte
// Scores of a task, in floats: they stay in the second-level cache. Fewer rows cost the products
// more than they save; small heads share a task.
constexpr int64_t kMaxScores = 3 << 15, kMinRows = 64, kSharedScores = 1 << 15;
// So many thresholds are fastest compared one by one; with vectors of 4, few.
constexpr int64_t kMaxCounted = 15, kMaxCountedScalar = 3;
constexpr int64_t kMaxBuckets = 4096;  // 48 KB; a row's probabilities use few of them
constexpr int32_t kMantissa = 23;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

using OptionalTensor = std::optional<at::Tensor>;

// What quantizes the probabilities: a table, a grid or nothing.
struct Quantizer {
  const OptionalTensor& thresholds;  // [T], rising
  const OptionalTensor& exponents;   // [T + 1]
  const OptionalTensor& eta;         // []
  const OptionalTensor& scale;       // []
  const OptionalTensor& zero_point;  // []
  int64_t bits;                      // of the grid
};

// --- checks ---

void check_operand(const char* argument, const at::Tensor& x, const at::Tensor& q) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, kOp, ": ",
                   argument, " must be float32, float16 or bfloat16, got ", type);
  TORCH_CHECK_TYPE(type == q.scalar_type(), kOp, ": ", argument, " must have q's dtype ",
                   q.scalar_type(), ", got ", type);
  TORCH_CHECK_VALUE(x.dim() >= 2, kOp, ": ", argument, " must have at least 2 dimensions, got ",
                    x.sizes());
}

void check_shapes(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  TORCH_CHECK_VALUE(k.size(-1) == q.size(-1), kOp, ": k must have q's last dimension ", q.size(-1),
                    ", got ", k.sizes());
  TORCH_CHECK_VALUE(v.size(-2) == k.size(-2), kOp, ": v must have a row for each of k's ",
                    k.size(-2), ", got ", v.sizes());
}

void check_mask(const at::Tensor& mask, bool is_causal) {
  const auto type = mask.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kBool || type == at::kFloat || type == at::kHalf || type == at::kBFloat16, kOp,
      ": mask must be bool, float32, float16 or bfloat16, got ", type);
  TORCH_CHECK_VALUE(!is_causal, kOp, ": mask must be None with is_causal, got shape ",
                    mask.sizes());
}

void check_vector(const char* argument, const at::Tensor& table, int64_t largest) {
  TORCH_CHECK_TYPE(table.scalar_type() == at::kFloat, kOp, ": ", argument, " must be float32, got ",
                   table.scalar_type());
  TORCH_CHECK_VALUE(table.dim() == 1 && table.size(0) <= largest, kOp, ": ", argument,
                    " must be a vector of at most ", largest, " entries, got shape ",
                    table.sizes());
}

float one_value(const char* argument, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, kOp, ": ", argument,
                   " must be float32, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.numel() == 1, kOp, ": ", argument, " must hold one value, got shape ",
                    tensor.sizes());
  const float value = tensor.item<float>();
  TORCH_CHECK_VALUE(std::isfinite(value), kOp, ": ", argument, " must be finite, got ", value);
  return value;
}

// --- levels ---

// The table that `Levels` points to.
class Table {
 public:
  explicit Table(const Quantizer& quantizer);
  Levels levels;

 private:
  void read(const Quantizer& quantizer);
  bool make_buckets(int32_t shift);

  std::vector<float> thresholds_;
  std::vector<float> values_;
  std::vector<Bucket> buckets_;
};

// Thresholds that every probability exceeds, or none, are left out.
void Table::read(const Quantizer& quantizer) {
  const at::Tensor table = quantizer.thresholds->contiguous();
  const at::Tensor exponents = quantizer.exponents->contiguous();
  const float* const t = table.const_data_ptr<float>();
  const float* const exponent = exponents.const_data_ptr<float>();
  const double eta = one_value("eta", *quantizer.eta);
  // In float64, so that one rounding makes the value.
  const auto value = [&](int64_t code) {
    return static_cast<float>(std::exp2(static_cast<double>(exponent[code])) - eta);
  };
  levels.of_nan = value(0);
  values_.assign(1, value(0));
  for (int64_t i = 0; i < table.numel(); ++i) {
    TORCH_CHECK_VALUE(i == 0 ? !std::isnan(t[0]) : t[i - 1] <= t[i], kOp,
                      ": thresholds must rise, got ", table);
    if (t[i] >= 1.0f) continue;
    if (t[i] < 0.0f) {
      values_.back() = value(i + 1);
      continue;
    }
    thresholds_.push_back(t[i] + 0.0f);  // -0 counts as 0
    values_.push_back(value(i + 1));
  }
}

// Buckets of 2^shift neighbouring floats; false when there would be too many, or two thresholds in
// one.
bool Table::make_buckets(int32_t shift) {
  const auto bucket_of = [&](float x) { return __builtin_bit_cast(int32_t, x) >> shift; };
  levels.bucket_shift = shift;
  levels.first_bucket = bucket_of(thresholds_.front());
  levels.last_bucket = bucket_of(thresholds_.back());
  if (levels.last_bucket - levels.first_bucket >= kMaxBuckets) return false;
  buckets_.clear();
  size_t t = 0;
  for (int32_t bucket = levels.first_bucket; bucket <= levels.last_bucket; ++bucket) {
    const bool cut = t < thresholds_.size() && bucket_of(thresholds_[t]) == bucket;
    buckets_.push_back(
        {cut ? thresholds_[t] : kInfinity, {values_[t], values_[t + (cut ? 1 : 0)]}});
    t += cut ? 1 : 0;
    if (t < thresholds_.size() && bucket_of(thresholds_[t]) == bucket) return false;
  }
  return true;
}

Table::Table(const Quantizer& quantizer) : levels{} {
  levels.of_nan = kNaN;
  if (quantizer.scale.has_value()) {
    levels.kind = LevelKind::uniform;
    levels.grid = {one_value("softmax_scale", *quantizer.scale),
                   one_value("softmax_zero_point", *quantizer.zero_point)};
    TORCH_CHECK_VALUE(levels.grid.scale > 0, kOp, ": softmax_scale must be positive, got ",
                      levels.grid.scale);
    levels.max_code = max_code_of(quantizer.bits);
  }
  if (!quantizer.thresholds.has_value()) return;
  read(quantizer);
  levels.kind = LevelKind::counted;
  levels.threshold_count = static_cast<int64_t>(thresholds_.size());
  // Thresholds that no buckets can tell apart are counted, however many there are.
  const bool few =
      levels.threshold_count <= (cpu_tier() == CpuTier::scalar ? kMaxCountedScalar : kMaxCounted);
  for (int32_t shift = kMantissa; shift >= 0 && !few; --shift) {
    if (!make_buckets(shift)) continue;
    levels.kind = LevelKind::bucketed;
    break;
  }
  levels.thresholds = thresholds_.data();
  levels.values = values_.data();
  levels.buckets = buckets_.data();
}

float level_of_zero(const Levels& levels) {
  if (levels.kind == LevelKind::none) return 0.0f;
  if (levels.kind != LevelKind::uniform) return levels.values[0];
  const Grid grid = levels.grid;
  return to_value(to_code(0.0f, grid.scale, grid.zero_point, levels.max_code), grid.scale,
                  grid.zero_point);
}

void check_quantizer(const Quantizer& quantizer) {
  const bool table = quantizer.thresholds.has_value(), grid = quantizer.scale.has_value();
  TORCH_CHECK_VALUE(
      table == quantizer.exponents.has_value() && table == quantizer.eta.has_value(), kOp,
      ": thresholds, exponents and eta must be given together, got only some of them");
  TORCH_CHECK_VALUE(
      grid == quantizer.zero_point.has_value(), kOp,
      ": softmax_scale and softmax_zero_point must be given together, got only one of them");
  TORCH_CHECK_VALUE(!(table && grid), kOp,
                    ": softmax_scale must be None with thresholds, got both");
  if (grid) check_bits(kOp, quantizer.bits);
  if (!table) return;
  check_vector("thresholds", *quantizer.thresholds, kMaxLevels - 1);
  check_vector("exponents", *quantizer.exponents, kMaxLevels);
  TORCH_CHECK_VALUE(quantizer.exponents->size(0) == quantizer.thresholds->size(0) + 1, kOp,
                    ": exponents must be one more than the thresholds, got ",
                    quantizer.exponents->size(0), " for ", quantizer.thresholds->size(0));
}

// --- the product ---

// Broadcasts the leading dimensions of x with those so far.
void join(std::vector<int64_t>& leading, const char* argument, const at::Tensor& x) {
  const int64_t count = x.dim() - 2, known = static_cast<int64_t>(leading.size());
  if (count > known) leading.insert(leading.begin(), static_cast<size_t>(count - known), 1);
  for (int64_t d = 1; d <= count; ++d) {
    int64_t& size = leading[leading.size() - static_cast<size_t>(d)];
    const int64_t own = x.size(-2 - d);
    TORCH_CHECK_VALUE(own == size || own == 1 || size == 1, kOp, ": ", argument,
                      " must broadcast to the leading dimensions ", at::IntArrayRef(leading),
                      ", got ", x.sizes());
    if (size == 1) size = own;
  }
}

// [..., R, C] -> float32 [heads, R, C], contiguous, over the leading dimensions that all share.
at::Tensor per_head(const at::Tensor& x, at::IntArrayRef leading, int64_t heads) {
  std::vector<int64_t> shape = leading.vec();
  shape.insert(shape.end(), {x.size(-2), x.size(-1)});
  return x.to(at::kFloat).expand(shape).reshape({heads, x.size(-2), x.size(-1)}).contiguous();
}

// A mask that is broadcast to [..., L, S], where a head's rows lie.
class Mask {
 public:
  Mask(const OptionalTensor& mask, at::IntArrayRef shape) {
    if (!mask.has_value()) return;
    at::Tensor rows = mask->scalar_type() == at::kBool ? *mask : mask->to(at::kFloat);
    if (rows.dim() == 0) rows = rows.unsqueeze(0);
    TORCH_CHECK_VALUE(at::is_expandable_to(rows.sizes(), shape), kOp,
                      ": mask must broadcast to the scores ", shape, ", got ", mask->sizes());
    std::vector<int64_t> wide = rows.sizes().vec();
    wide.back() = shape.back();
    mask_ = rows.expand(wide).contiguous().expand(shape);
  }
  void apply_to(AttentionRows& work, int64_t head, int64_t first_row) const {
    if (!mask_.defined()) return;
    int64_t offset = first_row * mask_.stride(-2);
    for (int64_t d = mask_.dim() - 3; d >= 0; --d) {
      offset += head % mask_.size(d) * mask_.stride(d);
      head /= mask_.size(d);
    }
    work.mask_stride = mask_.stride(-2);
    if (mask_.scalar_type() == at::kBool) {
      work.allowed = mask_.const_data_ptr<bool>() + offset;
    } else {
      work.mask = mask_.const_data_ptr<float>() + offset;
    }
  }

 private:
  at::Tensor mask_;  // [..., L, S]
};

// Attention of every head, cut into tasks: some heads whole, or some rows of one.
class Product {
 public:
  Product(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Mask& mask,
          const Levels& levels, float scale, bool is_causal)
      : q_(q), k_(k), v_(v), mask_(mask), levels_(levels), scale_(scale), is_causal_(is_causal) {
    out_ = at::empty({q.size(0), q.size(1), v.size(2)}, q.options());
    const int64_t area = q.size(1) * k.size(1);
    rows_ = std::clamp(kMaxScores / k.size(1), std::min(kMinRows, q.size(1)), q.size(1));
    const int64_t parts = (q.size(1) + rows_ - 1) / rows_;
    rows_ = (q.size(1) + parts - 1) / parts;  // of one size
    heads_ = std::clamp<int64_t>(kSharedScores / area, 1, q.size(0));
  }
  at::Tensor run() const {
    const int64_t parts = (q_.size(1) + rows_ - 1) / rows_;
    const int64_t groups = (q_.size(0) + heads_ - 1) / heads_;
    for_each_chunk(groups * parts,
                   [&](int64_t task) { attend(task / parts * heads_, task % parts * rows_); });
    return out_;
  }

 private:
  void attend(int64_t head, int64_t row) const;
  void quantize(const at::Tensor& scores, int64_t head, int64_t row) const;

  const at::Tensor &q_, &k_, &v_;  // [heads, L, D], [heads, S, D], [heads, S, Dv]
  const Mask& mask_;
  const Levels& levels_;
  float scale_;
  bool is_causal_;
  at::Tensor out_;     // [heads, L, Dv]
  int64_t rows_ = 0;   // of a task
  int64_t heads_ = 0;  // of a task; more than one only with all their rows
};

void Product::attend(int64_t head, int64_t row) const {
  const int64_t heads = std::min(heads_, q_.size(0) - head);
  const int64_t rows = std::min(rows_, q_.size(1) - row);
  // Keys that no row of the task may see add nothing, if probability 0 is level 0.
  const bool skip = is_causal_ && level_of_zero(levels_) == 0.0f;
  const int64_t keys = skip ? std::min(k_.size(1), row + rows) : k_.size(1);
  const auto part = [&](const at::Tensor& x, int64_t first, int64_t count) {
    return x.narrow(0, head, heads).narrow(1, first, count);
  };
  at::Tensor scores = at::empty({heads, rows, keys}, q_.options());
  at::bmm_out(scores, part(q_, row, rows), part(k_, 0, keys).transpose(1, 2));
  quantize(scores, head, row);
  at::Tensor out = part(out_, row, rows);
  at::bmm_out(out, scores, part(v_, 0, keys));
}

void Product::quantize(const at::Tensor& scores, int64_t head, int64_t row) const {
  const int64_t rows = scores.size(1), keys = scores.size(2);
  std::vector<float> buffer(static_cast<size_t>(keys + kRowPad));
  for (int64_t h = 0; h < scores.size(0); ++h) {
    AttentionRows work{};
    work.scores = scores.mutable_data_ptr<float>() + h * rows * keys;
    work.rows = rows;
    work.keys = keys;
    work.scale = scale_;
    work.causal_keys = is_causal_ ? row + 1 : keys;
    work.levels = levels_;
    work.row = buffer.data();
    mask_.apply_to(work, head + h, row);
    attention_rows(work);
  }
}

at::Tensor attention_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const OptionalTensor& mask, const Levels& levels, double scale,
                        bool is_causal) {
  std::vector<int64_t> shape;
  join(shape, "q", q);
  join(shape, "k", k);
  join(shape, "v", v);
  if (mask.has_value() && mask->dim() > 2) join(shape, "mask", *mask);
  const int64_t rows = q.size(-2), keys = k.size(-2), width = v.size(-1);
  const std::vector<int64_t> leading = shape;
  int64_t heads = 1;
  for (const int64_t size : leading) heads *= size;
  shape.insert(shape.end(), {rows, keys});
  const Mask of_scores(mask, shape);
  shape.back() = width;
  if (heads * rows * keys * width == 0) return at::zeros(shape, q.options());
  const at::Tensor a = per_head(q, leading, heads), b = per_head(k, leading, heads),
                   c = per_head(v, leading, heads);
  const Product product(a, b, c, of_scores, levels, static_cast<float>(scale), is_causal);
  return product.run().view(shape).to(q.scalar_type());
}

at::Tensor quantized_attention(const at::Tensor& q,                       // [..., L, D]
                               const at::Tensor& k,                       // [..., S, D]
                               const at::Tensor& v,                       // [..., S, Dv]
                               const OptionalTensor& mask,                // [..., L, S]
                               const OptionalTensor& thresholds,          // [T], rising
                               const OptionalTensor& exponents,           // [T + 1]
                               const OptionalTensor& eta,                 // []
                               const OptionalTensor& softmax_scale,       // []
                               const OptionalTensor& softmax_zero_point,  // []
                               int64_t softmax_bits, std::optional<double> scale, bool is_causal) {
  check_operand("q", q, q);
  check_operand("k", k, q);
  check_operand("v", v, q);
  check_shapes(q, k, v);
  if (mask.has_value()) check_mask(*mask, is_causal);
  const Quantizer quantizer{thresholds,    exponents,          eta,
                            softmax_scale, softmax_zero_point, softmax_bits};
  check_quantizer(quantizer);
  const Table table(quantizer);
  const double factor = scale.value_or(1.0 / std::sqrt(static_cast<double>(q.size(-1))));
  return attention_of(q, k, v, mask, table.levels, factor, is_causal);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "quantized_attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, *, Tensor? "
      "thresholds=None, "
      "Tensor? exponents=None, Tensor? eta=None, Tensor? softmax_scale=None, "
      "Tensor? softmax_zero_point=None, int softmax_bits=8, float? scale=None, "
      "bool is_causal=False) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) { m.impl("quantized_attention", quantized_attention); }

}  // namespace torchquant
