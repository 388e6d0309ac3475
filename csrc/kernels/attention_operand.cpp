#include <csrc/kernels/attention_operand.h>

#include <ATen/ops/empty.h>
#include <csrc/core/check.h>
#include <csrc/core/parallel.h>
#include <csrc/kernels/attention_levels.h>
#include <csrc/kernels/prepacked.h>

#include <algorithm>
#include <string>

namespace torchquant {
namespace {

template <class T>
std::unique_ptr<T[]> buffer(int64_t count) {
  return std::make_unique_for_overwrite<T[]>(static_cast<size_t>(count));
}

// A code that adds nothing to integer sums, where there is one.
int32_t origin_of(float zero_point) {
  constexpr int32_t kMiddle = 128;
  if (!(zero_point >= 0.0f && zero_point <= 255.0f)) return kMiddle;
  const auto whole = static_cast<int32_t>(zero_point);
  return static_cast<float>(whole) == zero_point ? whole : kMiddle;
}

}  // namespace

std::optional<OperandGrid> operand_grid(const char* op, const char* operand,
                                        const std::optional<at::Tensor>& scale,
                                        const std::optional<at::Tensor>& zero_point, int64_t bits) {
  TORCH_CHECK_VALUE(scale.has_value() == zero_point.has_value(), op, ": ", operand, "_scale and ",
                    operand, "_zero_point must be given together, got only one of them");
  if (!scale.has_value()) return std::nullopt;
  check_bits(op, bits);
  const std::string name = operand;
  const Grid grid{one_value(op, (name + "_scale").c_str(), *scale),
                  one_value(op, (name + "_zero_point").c_str(), *zero_point)};
  TORCH_CHECK_VALUE(grid.scale > 0, op, ": ", operand, "_scale must be positive, got ", grid.scale);
  return OperandGrid{grid, bits};
}

at::Tensor codes_of(const at::Tensor& values, const OperandGrid& grid) {
  const at::Tensor x = values.div(grid.grid.scale).add_(grid.grid.zero_point);
  return x.clamp_(0, max_code_of(grid.bits)).nan_to_num_(0).round_().to(at::kByte);
}

HeadRows::HeadRows(const at::Tensor& x, at::IntArrayRef leading)
    : x_(x.scalar_type() == at::kByte ? x : x.to(at::kFloat)) {
  if (x_.stride(-1) != 1) x_ = x_.contiguous();
  std::vector<int64_t> shape = leading.vec();
  shape.insert(shape.end(), {x.size(-2), x.size(-1)});
  x_ = x_.expand(shape);
}

QuantizeOperand HeadRows::operand(int64_t head, int64_t first, const OperandGrid& grid) const {
  int64_t offset = first * x_.stride(-2);
  for (int64_t d = x_.dim() - 3; d >= 0; --d) {
    offset += head % x_.size(d) * x_.stride(d);
    head /= x_.size(d);
  }
  QuantizeOperand work{};
  if (x_.scalar_type() == at::kByte) {
    work.codes = x_.const_data_ptr<uint8_t>() + offset;
  } else {
    work.x = x_.const_data_ptr<float>() + offset;
  }
  work.rows = x_.size(-2) - first;
  work.columns = x_.size(-1);
  work.row_stride = x_.stride(-2);
  work.grid = grid.grid;
  work.max_code = max_code_of(grid.bits);
  return work;
}

PackedHeads::PackedHeads(const HeadRows& x, int64_t heads, const OperandGrid& grid, Order order,
                         std::atomic<bool>& finite)
    : layout_(block_layout(order == Order::keys ? x.columns() : x.rows(), 0, 8, false)),
      outputs_(order == Order::keys ? x.rows() : x.columns()),
      stride_(padded(outputs_, kPanelOutputs)),
      scale_(grid.grid.scale),
      origin_(origin_of(grid.grid.zero_point)),
      packed_(at::empty({heads, padded(outputs_, kTileOutputs) / kTileOutputs, layout_.blocks,
                         layout_.bits, kLine},
                        at::kByte)),
      ones_(static_cast<size_t>(layout_.groups * stride_), 1.0f),
      sums_(at::empty({heads, stride_}, at::kFloat)) {
  const float offset = static_cast<float>(origin_) - grid.grid.zero_point;
  if (offset != 0.0f) offsets_.assign(ones_.size(), offset);
  for_each_chunk(heads, [&](int64_t head) {
    if (!pack(x, head, grid, order)) finite = false;
  });
}

bool PackedHeads::pack(const HeadRows& x, int64_t head, const OperandGrid& grid, Order order) {
  const auto work = buffer<uint8_t>(4 * padded(x.columns(), kBlockInputs));
  const auto sums = buffer<int32_t>(stride_);
  bool finite = true;
  QuantizeOperand operand = x.operand(head, 0, grid);
  operand.layout = layout_;
  operand.packed = packed_.mutable_data_ptr<uint8_t>() + head * packed_.stride(0);
  operand.sums = sums.get();
  operand.work = work.get();
  operand.finite = &finite;
  order == Order::keys ? pack_keys(operand) : pack_values(operand);
  float* const values = sums_.mutable_data_ptr<float>() + head * stride_;
  const double zeros = static_cast<double>(grid.grid.zero_point) * layout_.columns;
  for (int64_t o = 0; o < stride_; ++o)
    values[o] = o < outputs_ ? static_cast<float>(sums[o] - zeros) : 0.0f;
  return finite;
}

PackedWeight PackedHeads::view(int64_t head) const {
  return {layout_,
          outputs_,
          stride_,
          origin_,
          packed_.const_data_ptr<uint8_t>() + head * packed_.stride(0),
          ones_.data(),
          offsets_.empty() ? nullptr : offsets_.data(),
          sums_.const_data_ptr<float>() + head * stride_,
          nullptr,
          0};
}

at::Tensor dequantized_heads(const HeadRows& x, int64_t heads, const OperandGrid& grid,
                             std::atomic<bool>& finite) {
  const at::Tensor values = at::empty({heads, x.rows(), x.columns()}, at::kFloat);
  float* const first = values.mutable_data_ptr<float>();
  for_each_chunk(heads, [&](int64_t head) {
    bool own = true;
    QuantizeOperand operand = x.operand(head, 0, grid);
    operand.values = first + head * x.rows() * x.columns();
    operand.finite = &own;
    dequantize_operand(operand);
    if (!own) finite = false;
  });
  return values;
}

IntegerRows::IntegerRows(const BlockLayout& layout, int64_t rows)
    : layout_(layout),
      rows_(rows),
      sums_(buffer<int32_t>(rows * layout.groups)),
      scale_(buffer<float>(rows)),
      zero_(buffer<float>(rows)) {
  const int64_t count = rows * layout.blocks * kBlockInputs;
  if (bytes_need_wide()) {
    wide_ = buffer<int16_t>(count);
  } else {
    narrow_ = buffer<int8_t>(count);
  }
}

bool IntegerRows::quantize(const HeadRows& x, int64_t head, int64_t row, const OperandGrid& grid,
                           float scale) {
  const auto work = buffer<uint8_t>(layout_.blocks * kBlockInputs);
  bool finite = true;
  QuantizeOperand operand = x.operand(head, row, grid);
  operand.rows = rows_;
  operand.layout = layout_;
  operand.shift = 1 << (grid.bits - 1);
  operand.narrow = narrow_.get();
  operand.wide = wide_.get();
  operand.sums = sums_.get();
  operand.work = work.get();
  operand.finite = &finite;
  quantize_queries(operand);
  const float zero = grid.grid.zero_point - static_cast<float>(operand.shift);
  std::fill_n(scale_.get(), rows_, scale);
  std::fill_n(zero_.get(), rows_, zero);
  return finite;
}

ProbabilityRows IntegerRows::probabilities(float unit) const {
  return {layout_.groups, layout_.group_size, narrow_.get(), wide_.get(),
          sums_.get(),    scale_.get(),       zero_.get(),   unit};
}

PackedProduct IntegerRows::product(const PackedWeight& weight) const {
  const bool shifted =
      std::any_of(zero_.get(), zero_.get() + rows_, [](float zero) { return zero != 0.0f; });
  const auto same = [&](const float* numbers) {
    return std::all_of(numbers, numbers + rows_, [&](float number) { return number == *numbers; });
  };
  PackedProduct product{};
  product.weight = weight;
  product.last_tile = (weight.outputs + kTileOutputs - 1) / kTileOutputs;
  product.rows = rows_;
  product.narrow = narrow_.get();
  product.wide = wide_.get();
  product.sums = sums_.get();
  product.a_scale = scale_.get();
  product.a_zero = shifted ? zero_.get() : nullptr;
  product.one_grid = same(scale_.get()) && same(zero_.get());
  product.tier = cpu_tier();
  return product;
}

void IntegerRows::multiply(const PackedWeight& weight, float* out) const {
  PackedProduct whole = product(weight);
  whole.out = out;
  packed_product(whole);
}

void IntegerRows::multiply(const PackedWeight& weight, uint8_t* codes, const CodeGrid& grid) const {
  PackedProduct whole = product(weight);
  whole.codes = codes;
  grid.apply_to(whole);
  packed_product(whole);
}

}  // namespace torchquant
