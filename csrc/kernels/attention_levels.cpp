#include <csrc/kernels/attention_levels.h>

#include <ATen/core/Formatting.h>
#include <csrc/core/check.h>

#include <cmath>
#include <limits>

namespace torchquant {
namespace {

constexpr int64_t kMaxLevels = 256;  // a code is a byte
// So many thresholds are fastest compared one by one; with vectors of 4, few.
constexpr int64_t kMaxCounted = 15, kMaxCountedScalar = 3;
constexpr int64_t kMaxBuckets = 4096;  // 48 KB; a row's probabilities use few of them
constexpr int32_t kMantissa = 23;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

void check_vector(const char* op, const char* argument, const at::Tensor& table, int64_t largest) {
  TORCH_CHECK_TYPE(table.scalar_type() == at::kFloat, op, ": ", argument, " must be float32, got ",
                   table.scalar_type());
  TORCH_CHECK_VALUE(table.dim() == 1 && table.size(0) <= largest, op, ": ", argument,
                    " must be a vector of at most ", largest, " entries, got shape ",
                    table.sizes());
}

}  // namespace

float one_value(const char* op, const char* argument, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, op, ": ", argument, " must be float32, got ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.numel() == 1, op, ": ", argument, " must hold one value, got shape ",
                    tensor.sizes());
  const float value = tensor.is_cpu() ? *tensor.const_data_ptr<float>() : tensor.item<float>();
  TORCH_CHECK_VALUE(std::isfinite(value), op, ": ", argument, " must be finite, got ", value);
  return value;
}

void check_quantizer(const char* op, const Quantizer& quantizer) {
  const bool table = quantizer.thresholds.has_value(), grid = quantizer.scale.has_value();
  TORCH_CHECK_VALUE(
      table == quantizer.exponents.has_value() && table == quantizer.eta.has_value(), op,
      ": thresholds, exponents and eta must be given together, got only some of them");
  TORCH_CHECK_VALUE(
      grid == quantizer.zero_point.has_value(), op,
      ": softmax_scale and softmax_zero_point must be given together, got only one of them");
  TORCH_CHECK_VALUE(!(table && grid), op, ": softmax_scale must be None with thresholds, got both");
  if (grid) check_bits(op, quantizer.bits);
  if (!table) return;
  check_vector(op, "thresholds", *quantizer.thresholds, kMaxLevels - 1);
  check_vector(op, "exponents", *quantizer.exponents, kMaxLevels);
  TORCH_CHECK_VALUE(quantizer.exponents->size(0) == quantizer.thresholds->size(0) + 1, op,
                    ": exponents must be one more than the thresholds, got ",
                    quantizer.exponents->size(0), " for ", quantizer.thresholds->size(0));
}

// Thresholds that every probability exceeds, or none, are left out.
void Table::read(const char* op, const Quantizer& quantizer) {
  const at::Tensor table = quantizer.thresholds->contiguous();
  const at::Tensor exponents = quantizer.exponents->contiguous();
  const float* const t = table.const_data_ptr<float>();
  const float* const exponent = exponents.const_data_ptr<float>();
  const double eta = one_value(op, "eta", *quantizer.eta);
  // In float64, so that one rounding makes the value.
  const auto value = [&](int64_t code) {
    return static_cast<float>(std::exp2(static_cast<double>(exponent[code])) - eta);
  };
  levels.of_nan = value(0);
  values_.assign(1, value(0));
  for (int64_t i = 0; i < table.numel(); ++i) {
    TORCH_CHECK_VALUE(i == 0 ? !std::isnan(t[0]) : t[i - 1] <= t[i], op,
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

Table::Table(const char* op, const Quantizer& quantizer) : levels{} {
  levels.of_nan = kNaN;
  if (quantizer.scale.has_value()) {
    levels.kind = LevelKind::uniform;
    levels.grid = {one_value(op, "softmax_scale", *quantizer.scale),
                   one_value(op, "softmax_zero_point", *quantizer.zero_point)};
    TORCH_CHECK_VALUE(levels.grid.scale > 0, op, ": softmax_scale must be positive, got ",
                      levels.grid.scale);
    levels.max_code = max_code_of(quantizer.bits);
  }
  if (!quantizer.thresholds.has_value()) return;
  read(op, quantizer);
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

}  // namespace torchquant
