// Random packed linear layers for the leaves of csrc/kernels/linear.h, every array guarded. Any
// bytes are valid lines of codes, so none are packed here.
#pragma once
#include <csrc/kernels/linear_multipliers.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <ostream>
#include <random>
#include <vector>

#include "guarded.h"

namespace torchquant {

enum class Kind { uniform, offset, levels, row_levels, multiplied, multiplied_offset };
enum class Input { dynamic, grid, codes };

struct LinearCase {
  int64_t rows;
  int64_t outputs;
  int64_t columns;
  int64_t bits;
  int64_t group_size;
  Kind kind;
  Input input;
  bool wide;
  Epilogue epilogue;
  bool extras;         // bias and residual
  bool codes = false;  // as outputs

  bool has_levels() const { return kind == Kind::levels || kind == Kind::row_levels; }
  bool has_multipliers() const {
    return kind == Kind::multiplied || kind == Kind::multiplied_offset;
  }
  BlockLayout layout() const {
    const BlockLayout groups = block_layout(columns, group_size, bits, has_levels());
    return has_multipliers() ? span_layout(groups, wide) : groups;
  }
  int64_t tiles() const { return (outputs + kTileOutputs - 1) / kTileOutputs; }
  // Of the levels' magnitudes: all of int8, or what kernels without vpdpbusd treat apart.
  int32_t largest_level() const {
    return std::array{128, kSmallLevel, 32}[static_cast<size_t>(rows + outputs) % 3];
  }
};

inline std::ostream& operator<<(std::ostream& out, const LinearCase& c) {
  return out << c.rows << " rows, " << c.outputs << " outputs, " << c.columns << " columns, "
             << c.bits << " bits, groups of " << c.group_size << ", kind "
             << static_cast<int>(c.kind) << ", input " << static_cast<int>(c.input)
             << (c.wide ? ", wide" : ", narrow") << ", epilogue " << static_cast<int>(c.epilogue)
             << (c.extras ? ", extras" : "") << (c.codes ? ", to codes" : "");
}

// `count` cases of odd sizes, the same in every run.
inline std::vector<LinearCase> linear_cases(int64_t count, const std::vector<int64_t>& rows = {
                                                               1, 1, 2, 3, 4, 5, 6, 7, 13}) {
  std::mt19937 engine(11);
  const auto pick = [&](std::vector<int64_t> from) { return from[engine() % from.size()]; };
  std::vector<LinearCase> cases;
  for (int64_t i = 0; i < count; ++i) {
    LinearCase c{pick(rows),
                 pick({1, 15, 16, 17, 64, 70, 131}),
                 pick({1, 3, 31, 32, 33, 100, 257, 600}),
                 pick({2, 3, 4, 6, 8}),
                 pick({0, 0, 1, 24, 32, 48, 128}),
                 static_cast<Kind>(pick({0, 1, 2, 3})),
                 static_cast<Input>(pick({0, 1, 2})),
                 pick({0, 1}) == 1,
                 static_cast<Epilogue>(pick({0, 0, 1, 2})),
                 pick({0, 1}) == 1,
                 pick({0, 0, 1}) == 1};
    if (c.has_levels() && c.bits > 4) c.bits = 4;
    if (c.group_size == 1) c.columns = c.columns < 33 ? c.columns : 33;
    cases.push_back(c);
  }
  return cases;
}

// The same with integer multipliers of groups.
inline std::vector<LinearCase> multiplied_cases(int64_t count, const std::vector<int64_t>& rows) {
  std::mt19937 engine(12);
  const auto pick = [&](std::vector<int64_t> from) { return from[engine() % from.size()]; };
  std::vector<LinearCase> cases = linear_cases(count, rows);
  for (LinearCase& c : cases) {
    c.kind = static_cast<Kind>(pick({4, 5}));
    c.bits = pick({2, 3, 4});
    c.group_size = pick({32, 64, 96, 128, 512});
    c.columns = c.group_size + pick({1, 31, 32, 33, 100, 257, 600, 1100});
  }
  return cases;
}

class LinearProblem {
 public:
  explicit LinearProblem(const LinearCase& c)
      : c_(c), layout_(c.layout()), engine_(static_cast<uint32_t>(c.columns * 131 + c.outputs)) {
    const int64_t stride = (c.outputs + kPanelOutputs - 1) / kPanelOutputs * kPanelOutputs;
    packed_ = Guarded<uint8_t>(c.tiles() * layout_.blocks * layout_.bits * kLine);
    for (int64_t i = 0; i < packed_.size(); ++i) packed_[i] = static_cast<uint8_t>(engine_());
    scale_ = floats(layout_.groups * stride);
    offset_ = floats(c.kind == Kind::offset ? layout_.groups * stride : 0);
    sum_ = floats(stride);
    if (c.has_multipliers()) fill_multipliers(stride);
    levels_ = Guarded<int8_t>(!c.has_levels() ? 0 : c.kind == Kind::levels ? 16 : c.tiles() * 256);
    for (int64_t i = 0; i < levels_.size(); ++i) {
      const int32_t level = static_cast<int8_t>(engine_()), most = c.largest_level();
      levels_[i] = static_cast<int8_t>(std::clamp(level, -most, most));
    }
    x_ = floats(c.input == Input::codes ? 0 : c.rows * c.columns);
    codes_ = Guarded<uint8_t>(c.input == Input::codes ? c.rows * c.columns : 0);
    for (int64_t i = 0; i < codes_.size(); ++i) codes_[i] = static_cast<uint8_t>(engine_());
    a_scale_ = floats(c.rows);
    a_zero_ = floats(c.input == Input::dynamic ? 0 : c.rows);
    bias_ = floats(c.extras ? c.outputs : 0);
    residual_ = floats(c.extras ? c.rows * c.outputs : 0);
    const int64_t depth = layout_.blocks * kBlockInputs;
    narrow_ = Guarded<int8_t>(c.wide ? 0 : c.rows * depth);
    wide_ = Guarded<int16_t>(c.wide ? c.rows * depth : 0);
    sums_ = Guarded<int32_t>(c.rows * layout_.groups);
    out_ = Guarded<float>(c.codes ? 0 : c.rows * c.outputs);
    out_codes_ = Guarded<uint8_t>(c.codes ? c.rows * c.outputs : 0);
    code_scale_ = floats(c.codes ? stride : 0);
    code_zero_point_ = floats(c.codes ? stride : 0);
    for (int64_t i = 0; i < code_scale_.size(); ++i) {
      code_scale_[i] = 1.0f + 1000.0f * std::abs(code_scale_[i]);
      code_zero_point_[i] = 128.0f + 64.0f * code_zero_point_[i];
    }
    values_ = Guarded<uint16_t>(c.outputs * c.columns);
    wide_values_ = Guarded<float>(c.outputs * c.columns);
    bytes_ = Guarded<int8_t>(c.tiles() * kTileOutputs * depth);
    largest_ = Guarded<uint32_t>(c.rows);
  }

  // Everything is overwritten first with what no leaf leaves there.
  bool quantize(void (*leaf)(const QuantizeRows&), CpuTier tier = CpuTier::scalar) {
    bool finite = true;
    group_starts_ = group_starts(weight(), tier, c_.wide, c_.rows);
    starts_ =
        Guarded<int32_t>(group_starts_.blocks == 0 ? 0 : group_starts_.count(layout_) * c_.rows);
    fill(starts_);
    fill(narrow_), fill(wide_), fill(sums_);
    if (c_.input == Input::dynamic) fill(a_scale_);
    QuantizeRows q{};
    q.layout = layout_;
    q.rows = c_.rows;
    q.x = x_.data_or_null();
    q.codes = codes_.data_or_null();
    q.narrow = narrow_.data_or_null();
    q.wide = wide_.data_or_null();
    q.sums = sums_.data();
    q.group_starts = group_starts_;
    q.starts = starts_.data_or_null();
    q.largest = largest_.data();
    q.finite = &finite;
    q.shift = 128;
    q.max_code = 255;
    if (c_.input == Input::dynamic) {
      q.shift = 0;
      q.limit = c_.wide ? 32767.0f : 127.0f;
      q.a_scale = a_scale_.data();
    } else if (c_.input == Input::grid) {
      q.scale = 0.03f;
      q.zero_point = 117.0f;
    }
    leaf(q);
    return finite;
  }

  void multiply(void (*leaf)(const PackedProduct&), int64_t first_tile = 0,
                CpuTier tier = CpuTier::scalar) {
    fill(out_), fill(out_codes_);
    PackedProduct p{};
    p.weight = weight();
    p.first_tile = first_tile;
    p.last_tile = c_.tiles();
    p.rows = c_.rows;
    p.narrow = narrow_.data_or_null();
    p.wide = wide_.data_or_null();
    p.sums = sums_.data();
    p.group_starts = group_starts_;
    p.starts = starts_.data_or_null();
    p.a_scale = a_scale_.data();
    p.a_zero = a_zero_.data_or_null();
    p.bias = bias_.data_or_null();
    p.residual = residual_.data_or_null();
    p.epilogue = c_.epilogue;
    p.tier = tier;
    p.out_stride = p.weight.outputs;
    p.out = out_.data_or_null();
    p.codes = out_codes_.data_or_null();
    p.code_scale = code_scale_.data_or_null();
    p.code_zero_point = code_zero_point_.data_or_null();
    p.max_code = 255;
    leaf(p);
  }

  void unpack(void (*leaf)(const UnpackWeight&), UnpackType type) {
    fill(values_), fill(wide_values_), fill(bytes_);
    void* const out = type == UnpackType::float32 ? static_cast<void*>(wide_values_.data())
                      : type == UnpackType::bytes ? static_cast<void*>(bytes_.data())
                                                  : static_cast<void*>(values_.data());
    leaf({weight(), 0, c_.tiles(), type, out});
  }

  PackedWeight weight() const {
    const int64_t stride = sum_.size();
    PackedWeight weight{layout_,
                        c_.outputs,
                        stride,
                        c_.has_levels() ? 128 : 1 << (c_.bits - 1),
                        packed_.data(),
                        scale_.data(),
                        c_.has_multipliers() ? nullptr : offset_.data_or_null(),
                        sum_.data(),
                        levels_.data_or_null(),
                        c_.kind == Kind::row_levels ? 16 : 0};
    if (c_.has_multipliers())
      weight.multipliers = {multipliers_.data(), offset_.data_or_null(),
                            c_.group_size / kBlockInputs};
    return weight;
  }

  // What a quantize, multiply or unpack left, NaN included.
  struct Integers {
    std::vector<int8_t> narrow;
    std::vector<int16_t> wide;
    std::vector<int32_t> sums;
    std::vector<float> a_scale;
    bool operator==(const Integers&) const = default;
  };
  Integers integers() const {
    return {narrow_.values(), wide_.values(), sums_.values(), a_scale_.values()};
  }
  const Guarded<float>& out() const { return out_; }
  bool same_outputs(const LinearProblem& other) const {
    return out_.same_bytes(other.out_) && out_codes_.same_bytes(other.out_codes_);
  }
  const Guarded<float>& values() const { return wide_values_; }
  const Guarded<uint16_t>& half_values() const { return values_; }
  const Guarded<int8_t>& bytes() const { return bytes_; }
  Guarded<float>& x() { return x_; }
  Guarded<uint8_t>& codes() { return codes_; }
  Guarded<int8_t>& levels() { return levels_; }

 private:
  // Zero points, the largest multipliers that fit and smaller ones.
  void fill_multipliers(int64_t stride) {
    const int64_t groups = (c_.columns + c_.group_size - 1) / c_.group_size;
    const int64_t origin = 1 << (c_.bits - 1);
    multipliers_ = Guarded<uint8_t>(groups * stride);
    offset_ = Guarded<float>(c_.kind == Kind::multiplied_offset ? groups * stride : 0);
    for (int64_t i = 0; i < groups * stride; ++i) {
      const int64_t zero = offset_.size() == 0 ? origin : engine_() % (2 * origin);
      const int64_t limit = multiplier_limit(c_.bits, static_cast<float>(zero));
      if (offset_.size() > 0) offset_[i] = static_cast<float>(origin - zero);
      multipliers_[i] = static_cast<uint8_t>(engine_() % 2 == 0 ? limit : engine_() % (limit + 1));
    }
  }

  Guarded<float> floats(int64_t size) {
    std::normal_distribution<float> normal;
    Guarded<float> array(size);
    for (int64_t i = 0; i < size; ++i) array[i] = normal(engine_);
    return array;
  }

  template <class T>
  static void fill(Guarded<T>& array) {
    for (int64_t i = 0; i < array.size(); ++i) array[i] = T(77);
  }

  LinearCase c_;
  BlockLayout layout_;
  std::mt19937 engine_;
  Guarded<uint8_t> packed_, codes_, out_codes_, multipliers_;
  Guarded<float> scale_, offset_, sum_, x_, a_scale_, a_zero_, bias_, residual_, out_, wide_values_;
  Guarded<float> code_scale_, code_zero_point_;
  Guarded<int8_t> levels_, narrow_, bytes_;
  Guarded<uint32_t> largest_;
  Guarded<int16_t> wide_;
  Guarded<int32_t> sums_, starts_;
  GroupStarts group_starts_;
  Guarded<uint16_t> values_;
};

}  // namespace torchquant
