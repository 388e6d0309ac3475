#include <csrc/kernels/attention_operand.h>

#include <ATen/ops/empty.h>
#include <csrc/core/check.h>
#include <csrc/core/parallel.h>
#include <csrc/core/strided.h>
#include <csrc/kernels/attention_levels.h>
#include <csrc/kernels/prepacked.h>

#include <algorithm>
#include <string>
#include <utility>

namespace torchquant {
namespace {

template <class T>
std::unique_ptr<T[]> buffer(int64_t count) {
  return std::make_unique_for_overwrite<T[]>(static_cast<size_t>(count));
}

constexpr int32_t kMiddle = 128;

// A code that adds nothing to integer sums, where there is one.
int32_t origin_of(float zero_point) {
  if (!(zero_point >= 0.0f && zero_point <= 255.0f)) return kMiddle;
  const auto whole = static_cast<int32_t>(zero_point);
  return static_cast<float>(whole) == zero_point ? whole : kMiddle;
}

// Where row `first` of one head begins.
int64_t offset_of(const at::Tensor& x, int64_t head, int64_t first) {
  return matrix_offset(x, head) + first * x.stride(-2);
}

// Codes, each row on its own grid.
void dequantize_rows(const HeadRows& x, int64_t head, QuantizeOperand operand) {
  const int64_t rows = operand.rows;
  const auto scales = buffer<float>(rows), zero_points = buffer<float>(rows);
  x.copy_grids(head, 0, rows, scales.get(), zero_points.get());
  operand.rows = 1;
  for (int64_t r = 0; r < rows; ++r) {
    operand.grid = {scales[r], zero_points[r]};
    dequantize_operand(operand);
    operand.codes += operand.row_stride;
    operand.values += operand.columns;
  }
}

OperandGrid grid_of_rows(const char* op, const std::string& name, const at::Tensor& scale,
                         const at::Tensor& zero_point, int64_t bits, const at::Tensor& x) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = 1;
  for (const auto& [part, tensor] : {std::pair{"_scale", &scale}, {"_zero_point", &zero_point}}) {
    TORCH_CHECK_TYPE(tensor->scalar_type() == at::kFloat, op, ": ", name, part,
                     " must be float32, got ", tensor->scalar_type());
    TORCH_CHECK_VALUE(tensor->sizes() == shape, op, ": ", name, part,
                      " must hold one value or one for each row of codes, ", at::IntArrayRef(shape),
                      ", got shape ", tensor->sizes());
    check_finite(op, (name + part).c_str(), *tensor);
  }
  const at::Tensor scales = scale.contiguous();
  const float* const first = scales.const_data_ptr<float>();
  const auto bad = std::find_if(first, first + scales.numel(), [](float s) { return !(s > 0); });
  TORCH_CHECK_VALUE(bad == first + scales.numel(), op, ": ", name, "_scale must be positive, got ",
                    *bad);
  return {{}, bits, scales, zero_point};
}

}  // namespace

std::optional<OperandGrid> operand_grid(const char* op, const char* operand,
                                        const std::optional<at::Tensor>& scale,
                                        const std::optional<at::Tensor>& zero_point, int64_t bits,
                                        const at::Tensor* x) {
  TORCH_CHECK_VALUE(scale.has_value() == zero_point.has_value(), op, ": ", operand, "_scale and ",
                    operand, "_zero_point must be given together, got only one of them");
  if (!scale.has_value()) return std::nullopt;
  check_bits(op, bits);
  const std::string name = operand;
  if (x != nullptr && x->scalar_type() == at::kByte && scale->numel() != 1)
    return grid_of_rows(op, name, *scale, *zero_point, bits, *x);
  const Grid grid{one_value(op, (name + "_scale").c_str(), *scale),
                  one_value(op, (name + "_zero_point").c_str(), *zero_point)};
  TORCH_CHECK_VALUE(grid.scale > 0, op, ": ", operand, "_scale must be positive, got ", grid.scale);
  return OperandGrid{grid, bits, {}, {}};
}

at::Tensor codes_of(const at::Tensor& values, const OperandGrid& grid) {
  const at::Tensor x = values.div(grid.grid.scale).add_(grid.grid.zero_point);
  return x.clamp_(0, max_code_of(grid.bits)).nan_to_num_(0).round_().to(at::kByte);
}

HeadRows::HeadRows(const at::Tensor& x, at::IntArrayRef leading, const OperandGrid& grid)
    : grid_(grid), x_(x.scalar_type() == at::kByte ? x : x.to(at::kFloat)) {
  if (x_.stride(-1) != 1) x_ = x_.contiguous();
  std::vector<int64_t> shape = leading.vec();
  shape.insert(shape.end(), {x.size(-2), x.size(-1)});
  x_ = x_.expand(shape);
  if (!grid.of_rows()) return;
  shape.back() = 1;
  grid_.scale = grid.scale.expand(shape);
  grid_.zero_point = grid.zero_point.expand(shape);
}

QuantizeOperand HeadRows::operand(int64_t head, int64_t first) const {
  const int64_t offset = offset_of(x_, head, first);
  QuantizeOperand work{};
  if (x_.scalar_type() == at::kByte) {
    work.codes = x_.const_data_ptr<uint8_t>() + offset;
  } else {
    work.x = x_.const_data_ptr<float>() + offset;
  }
  work.rows = x_.size(-2) - first;
  work.columns = x_.size(-1);
  work.row_stride = x_.stride(-2);
  work.grid = grid_.grid;
  work.max_code = max_code_of(grid_.bits);
  return work;
}

void HeadRows::copy_grids(int64_t head, int64_t first, int64_t count, float* scales,
                          float* zero_points) const {
  if (!grid_.of_rows()) {
    std::fill_n(scales, count, grid_.grid.scale);
    std::fill_n(zero_points, count, grid_.grid.zero_point);
    return;
  }
  for (const auto& [from, to] :
       {std::pair{&grid_.scale, scales}, {&grid_.zero_point, zero_points}}) {
    const float* const column = from->const_data_ptr<float>() + offset_of(*from, head, first);
    for (int64_t r = 0; r < count; ++r) to[r] = column[r * from->stride(-2)];
  }
}

PackedHeads::PackedHeads(const HeadRows& x, int64_t heads, Order order, std::atomic<bool>& finite)
    : layout_(block_layout(order == Order::keys ? x.columns() : x.rows(), 0, 8, false)),
      outputs_(order == Order::keys ? x.rows() : x.columns()),
      stride_(padded(outputs_, kPanelOutputs)),
      scale_(x.grid().of_rows() ? 1.0f : x.grid().grid.scale),
      own_grids_(x.grid().of_rows()),
      packed_(at::empty({heads, padded(outputs_, kTileOutputs) / kTileOutputs, layout_.blocks,
                         layout_.bits, kLine},
                        at::kByte)),
      sums_(at::empty({heads, stride_}, at::kFloat)) {
  set_grids(x, heads);
  for_each_chunk(heads, [&](int64_t head) {
    if (!pack(x, head, order)) finite = false;
  });
}

void PackedHeads::set_grids(const HeadRows& x, int64_t heads) {
  const int64_t size = layout_.groups * stride_;
  scales_.assign(static_cast<size_t>(own_grids_ ? heads * size : size), 1.0f);
  zero_points_.assign(scales_.size(), x.grid().grid.zero_point);
  for (int64_t head = 0; own_grids_ && head < heads; ++head) {
    for (int64_t g = 0; g < layout_.groups; ++g) {
      const int64_t at = grids_of(head) + g * stride_;
      float* const zero_points = zero_points_.data() + at;
      x.copy_grids(head, 0, outputs_, scales_.data() + at, zero_points);
      std::fill(zero_points + outputs_, zero_points + stride_, zero_points[0]);
    }
  }
  const float first = zero_points_.front();
  const bool same = std::all_of(zero_points_.begin(), zero_points_.end(),
                                [first](float zero) { return zero == first; });
  origin_ = same ? origin_of(first) : kMiddle;
  const auto origin = static_cast<float>(origin_);
  if (same && origin == first) return;
  offsets_.resize(zero_points_.size());
  std::transform(zero_points_.begin(), zero_points_.end(), offsets_.begin(),
                 [origin](float zero) { return origin - zero; });
}

bool PackedHeads::pack(const HeadRows& x, int64_t head, Order order) {
  const auto work = buffer<uint8_t>(4 * padded(x.columns(), kBlockInputs));
  const auto sums = buffer<int32_t>(stride_);
  bool finite = true;
  QuantizeOperand operand = x.operand(head, 0);
  operand.layout = layout_;
  operand.packed = packed_.mutable_data_ptr<uint8_t>() + head * packed_.stride(0);
  operand.sums = sums.get();
  operand.work = work.get();
  operand.finite = &finite;
  order == Order::keys ? pack_keys(operand) : pack_values(operand);
  float* const values = sums_.mutable_data_ptr<float>() + head * stride_;
  const float* const zero_points = zero_points_.data() + grids_of(head);
  const float* const scales = scales_.data() + grids_of(head);
  const auto columns = static_cast<double>(layout_.columns);
  std::fill_n(values, stride_, 0.0f);
  for (int64_t o = 0; o < outputs_; ++o)
    values[o] = static_cast<float>((sums[o] - zero_points[o] * columns) * scales[o]);
  return finite;
}

PackedWeight PackedHeads::view(int64_t head) const {
  return {layout_,
          outputs_,
          stride_,
          origin_,
          packed_.const_data_ptr<uint8_t>() + head * packed_.stride(0),
          scales_.data() + grids_of(head),
          offsets_.empty() ? nullptr : offsets_.data() + grids_of(head),
          sums_.const_data_ptr<float>() + head * stride_,
          nullptr,
          0};
}

at::Tensor dequantized_heads(const HeadRows& x, int64_t heads, std::atomic<bool>& finite) {
  const at::Tensor values = at::empty({heads, x.rows(), x.columns()}, at::kFloat);
  float* const first = values.mutable_data_ptr<float>();
  for_each_chunk(heads, [&](int64_t head) {
    bool own = true;
    QuantizeOperand operand = x.operand(head, 0);
    operand.values = first + head * x.rows() * x.columns();
    operand.finite = &own;
    x.grid().of_rows() ? dequantize_rows(x, head, operand) : dequantize_operand(operand);
    if (!own) finite = false;
  });
  return values;
}

IntegerRows::IntegerRows(const BlockLayout& layout, int64_t rows)
    : layout_(layout),
      rows_(rows),
      sums_(buffer<int32_t>(rows * layout.groups)),
      scale_(buffer<float>(rows)),
      zero_(buffer<float>(rows)),
      work_(buffer<uint8_t>(layout.blocks * kBlockInputs)) {
  const int64_t count = rows * layout.blocks * kBlockInputs;
  if (bytes_need_wide()) {
    wide_ = buffer<int16_t>(count);
  } else {
    narrow_ = buffer<int8_t>(count);
  }
}

bool IntegerRows::quantize(const HeadRows& x, int64_t head, int64_t row, int64_t count,
                           float unit) {
  rows_ = count;
  bool finite = true;
  QuantizeOperand operand = x.operand(head, row);
  operand.rows = rows_;
  operand.layout = layout_;
  operand.shift = 1 << (x.grid().bits - 1);
  operand.narrow = narrow_.get();
  operand.wide = wide_.get();
  operand.sums = sums_.get();
  operand.work = work_.get();
  operand.finite = &finite;
  quantize_queries(operand);
  x.copy_grids(head, row, rows_, scale_.get(), zero_.get());
  for (int64_t r = 0; r < rows_; ++r) {
    scale_[r] *= unit;
    zero_[r] -= static_cast<float>(operand.shift);
  }
  return finite;
}

ProbabilityRows IntegerRows::probabilities(int64_t count, float unit) {
  rows_ = count;
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

void IntegerRows::multiply(const PackedWeight& weight, float* out, int64_t stride) const {
  PackedProduct whole = product(weight);
  whole.out = out;
  whole.out_stride = stride;
  packed_product(whole);
}

void IntegerRows::multiply(const PackedWeight& weight, uint8_t* codes, int64_t stride,
                           const CodeGrid& grid) const {
  PackedProduct whole = product(weight);
  whole.codes = codes;
  whole.out_stride = stride;
  grid.apply_to(whole);
  packed_product(whole);
}

}  // namespace torchquant
