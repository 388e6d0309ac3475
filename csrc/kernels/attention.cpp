#include <csrc/kernels/attention.h>

#include <ATen/ExpandUtils.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <csrc/core/check.h>
#include <csrc/core/parallel.h>
#include <csrc/core/strided.h>
#include <csrc/kernels/attention_levels.h>
#include <csrc/kernels/attention_operand.h>
#include <csrc/kernels/operators.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

namespace torchquant {
namespace {

constexpr const char* kOp = "quantized_attention";
// Scores of a task, in floats: they stay in the second-level cache. Fewer rows cost BLAS products
// more than they save; small heads share a task. Integer products want nothing of that kind.
constexpr int64_t kMaxScores = 3 << 15, kMinRows = 64, kSharedScores = 1 << 15;
constexpr int64_t kMaxIntegerScores = 1 << 14, kMinIntegerRows = 12;
constexpr int64_t kTileRows = 6;  // so many rows are one pass of the integer product

// Of q, k and v, which the caller has not quantized where they are given.
struct OperandGrids {
  std::optional<OperandGrid> query, key, value;
  std::optional<OperandGrid> output;
};

// --- checks ---

void check_operand(const char* argument, const at::Tensor& x, const at::Tensor& q) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kHalf || type == at::kBFloat16 || type == at::kByte, kOp,
      ": ", argument, " must be float32, float16, bfloat16 or uint8 codes, got ", type);
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
    const int64_t offset = matrix_offset(mask_, head) + first_row * mask_.stride(-2);
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

// What attention reads, of every head: float tensors, or codes where there are grids.
struct Operands {
  Operands(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
           at::IntArrayRef leading, const OperandGrids& grids, bool value_codes);

  int64_t heads = 1;
  int64_t rows, keys, width;
  at::Tensor q, k, v;  // [heads, L, D], [heads, S, D], [heads, S, Dv]
  std::optional<HeadRows> query_rows;
  std::optional<PackedHeads> key_codes, value_codes;
  mutable std::atomic<bool> finite{true};  // where there are grids
};

Operands::Operands(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                   at::IntArrayRef leading, const OperandGrids& grids, bool integer_values)
    : rows(query.size(-2)), keys(key.size(-2)), width(value.size(-1)) {
  for (const int64_t size : leading) heads *= size;
  if (heads * rows * keys * width == 0) return;
  if (grids.key.has_value()) {
    query_rows.emplace(query, leading, *grids.query);
    key_codes.emplace(HeadRows(key, leading, *grids.key), heads, PackedHeads::Order::keys, finite);
  } else {
    q = per_head(query, leading, heads);
    k = per_head(key, leading, heads);
  }
  if (!grids.value.has_value()) {
    v = per_head(value, leading, heads);
  } else {
    const HeadRows value_rows(value, leading, *grids.value);
    if (integer_values && !grids.value->of_rows()) {
      value_codes.emplace(value_rows, heads, PackedHeads::Order::values, finite);
    } else {
      v = dequantized_heads(value_rows, heads, finite);
    }
  }
}

// Some heads whole, or some rows of one.
struct Task {
  int64_t head, row;
  int64_t heads, rows;
  int64_t keys;    // that take part
  int64_t stride;  // of the rows of scores
};

// What a thread works in, task after task.
struct TaskMemory {
  TaskMemory(const Operands& x, int64_t heads, int64_t rows)
      : scores(std::make_unique_for_overwrite<float[]>(
            static_cast<size_t>(heads * rows * padded(x.keys, kRowPad)))),
        row(std::make_unique_for_overwrite<float[]>(
            static_cast<size_t>(kRowGroup * (x.keys + kRowPad)))) {
    if (x.key_codes.has_value()) queries.emplace(x.key_codes->layout(), rows);
    if (x.value_codes.has_value()) probabilities.emplace(x.value_codes->layout(), rows);
  }
  at::Tensor tensor(const Task& task) const {  // of scores, where rows are not padded
    return at::from_blob(scores.get(), {task.heads, task.rows, task.keys}, at::kFloat);
  }

  std::unique_ptr<float[]> scores;  // [heads, rows, stride]
  std::unique_ptr<float[]> row;
  std::optional<IntegerRows> queries, probabilities;
};

// Attention of every head, cut into tasks.
class Product {
 public:
  Product(const Operands& operands, at::IntArrayRef leading, const Mask& mask, const Levels& levels,
          float scale, bool is_causal, const std::optional<OperandGrid>& output);
  // [heads, L, Dv], or codes [..., heads, L, Dv]
  at::Tensor run() const {
    const int64_t parts = (x_.rows + rows_ - 1) / rows_;
    const int64_t groups = (x_.heads + heads_ - 1) / heads_;
    for_each_part(groups * parts, [&](int64_t begin, int64_t end) {
      TaskMemory memory(x_, heads_, rows_);
      for (int64_t task = begin; task < end; ++task)
        attend(task_at(task / parts * heads_, task % parts * rows_), memory);
    });
    if (stores_codes()) return out_.transpose(1, 2);
    return output_.has_value() ? codes_of(out_, *output_) : out_;
  }

 private:
  Task task_at(int64_t head, int64_t row) const;
  void attend(const Task& task, TaskMemory& memory) const;
  void score(const Task& task, TaskMemory& memory) const;
  void quantize(const Task& task, TaskMemory& memory) const;
  void mix(AttentionRows work, int64_t head, int64_t row, TaskMemory& memory) const;
  // Integer products store whole tiles.
  bool integer() const { return x_.key_codes.has_value() && x_.value_codes.has_value(); }
  // Integer products do; BLAS gives values first.
  bool stores_codes() const { return output_.has_value() && x_.value_codes.has_value(); }

  const Operands& x_;
  const Mask& mask_;
  const Levels& levels_;
  float scale_;
  bool is_causal_;
  std::optional<OperandGrid> output_;
  std::optional<CodeGrid> code_grid_;  // where stores_codes()
  int64_t together_ = 1;               // heads whose codes of one token are neighbours
  at::Tensor out_;     // [heads, L, Dv]; of codes [heads / together, L, together, Dv]
  int64_t rows_ = 0;   // of a task
  int64_t heads_ = 0;  // of a task; more than one only with all their rows
};

Product::Product(const Operands& operands, at::IntArrayRef leading, const Mask& mask,
                 const Levels& levels, float scale, bool is_causal,
                 const std::optional<OperandGrid>& output)
    : x_(operands),
      mask_(mask),
      levels_(levels),
      scale_(scale),
      is_causal_(is_causal),
      output_(output) {
  if (stores_codes()) {
    code_grid_.emplace(x_.width, std::vector<Grid>{output->grid}, output->bits);
    if (!leading.empty()) together_ = leading.back();
    out_ = at::empty({x_.heads / together_, x_.rows, together_, x_.width}, at::kByte);
  } else {
    out_ = at::empty({x_.heads, x_.rows, x_.width}, at::kFloat);
  }
  const int64_t largest = integer() ? kMaxIntegerScores : kMaxScores;
  const int64_t least = std::min(integer() ? kMinIntegerRows : kMinRows, x_.rows);
  rows_ = std::clamp(largest / x_.keys, least, x_.rows);
  const int64_t parts = (x_.rows + rows_ - 1) / rows_;
  rows_ = (x_.rows + parts - 1) / parts;  // of one size
  if (integer()) rows_ = std::min((rows_ + kTileRows - 1) / kTileRows * kTileRows, x_.rows);
  heads_ = std::clamp<int64_t>(kSharedScores / (x_.rows * x_.keys), 1, x_.heads);
  if (rows_ < x_.rows) heads_ = 1;
}

Task Product::task_at(int64_t head, int64_t row) const {
  Task task{head, row, std::min(heads_, x_.heads - head), std::min(rows_, x_.rows - row), 0, 0};
  // Keys that no row of the task may see add nothing, if probability 0 is level 0. Codes of values
  // are multiplied whole: their sums are those of all keys.
  const bool skip = is_causal_ && !x_.value_codes.has_value() && level_of_zero(levels_) == 0.0f;
  task.keys = skip ? std::min(x_.keys, row + task.rows) : x_.keys;
  task.stride = integer() ? padded(task.keys, kRowPad) : task.keys;
  return task;
}

void Product::attend(const Task& task, TaskMemory& memory) const {
  score(task, memory);
  quantize(task, memory);
  if (x_.value_codes.has_value()) return;
  at::Tensor out = out_.narrow(0, task.head, task.heads).narrow(1, task.row, task.rows);
  at::bmm_out(out, memory.tensor(task),
              x_.v.narrow(0, task.head, task.heads).narrow(1, 0, task.keys));
}

void Product::score(const Task& task, TaskMemory& memory) const {
  if (!x_.key_codes.has_value()) {
    at::Tensor out = memory.tensor(task);
    at::bmm_out(out, x_.q.narrow(0, task.head, task.heads).narrow(1, task.row, task.rows),
                x_.k.narrow(0, task.head, task.heads).narrow(1, 0, task.keys).transpose(1, 2));
    return;
  }
  const PackedHeads& codes = *x_.key_codes;
  IntegerRows& queries = *memory.queries;
  for (int64_t h = 0; h < task.heads; ++h) {
    if (!queries.quantize(*x_.query_rows, task.head + h, task.row, task.rows, codes.scale()))
      x_.finite = false;
    PackedWeight weight = codes.view(task.head + h);
    weight.outputs = std::min(padded(task.keys, kTileOutputs), task.stride);
    queries.multiply(weight, memory.scores.get() + h * task.rows * task.stride, task.stride);
  }
}

void Product::quantize(const Task& task, TaskMemory& memory) const {
  AttentionRows work{};
  work.rows = task.rows;
  work.keys = task.keys;
  work.stride = task.stride;
  work.scale = scale_;
  work.causal_keys = is_causal_ ? task.row + 1 : task.keys;
  work.levels = levels_;
  work.row = memory.row.get();
  for (int64_t h = 0; h < task.heads; ++h) {
    work.scores = memory.scores.get() + h * task.rows * task.stride;
    mask_.apply_to(work, task.head + h, task.row);
    x_.value_codes.has_value() ? mix(work, task.head + h, task.row, memory) : attention_rows(work);
  }
}

// Codes of probabilities times codes of values.
void Product::mix(AttentionRows work, int64_t head, int64_t row, TaskMemory& memory) const {
  const PackedHeads& values = *x_.value_codes;
  IntegerRows& integers = *memory.probabilities;
  const ProbabilityRows codes =
      integers.probabilities(work.rows, levels_.grid.scale * values.scale());
  work.codes = &codes;
  attention_rows(work);
  if (stores_codes()) {
    const int64_t first = (head / together_ * x_.rows + row) * together_ + head % together_;
    integers.multiply(values.view(head), out_.mutable_data_ptr<uint8_t>() + first * x_.width,
                      together_ * x_.width, *code_grid_);
  } else {
    const int64_t first = head * x_.rows + row;
    integers.multiply(values.view(head), out_.mutable_data_ptr<float>() + first * x_.width,
                      x_.width);
  }
}

at::Tensor attention_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const OptionalTensor& mask, const OperandGrids& grids, const Levels& levels,
                        double scale, bool is_causal) {
  std::vector<int64_t> shape;
  join(shape, "q", q);
  join(shape, "k", k);
  join(shape, "v", v);
  if (mask.has_value() && mask->dim() > 2) join(shape, "mask", *mask);
  const std::vector<int64_t> leading = shape;
  shape.insert(shape.end(), {q.size(-2), k.size(-2)});
  const Mask of_scores(mask, shape);
  shape.back() = v.size(-1);
  const Operands operands(q, k, v, leading, grids, levels.kind == LevelKind::uniform);
  const bool codes = q.scalar_type() == at::kByte;
  if (operands.heads * operands.rows * operands.keys * operands.width == 0) {
    const at::Tensor zeros = at::zeros(shape, codes ? q.options().dtype(at::kFloat) : q.options());
    return grids.output.has_value() ? codes_of(zeros, *grids.output) : zeros;
  }
  const Product product(operands, leading, of_scores, levels, static_cast<float>(scale), is_causal,
                        grids.output);
  const at::Tensor out = product.run().view(shape);
  if (!operands.finite) {
    if (grids.query.has_value()) check_finite(kOp, "q", q);
    if (grids.key.has_value()) check_finite(kOp, "k", k);
    if (grids.value.has_value()) check_finite(kOp, "v", v);
  }
  return codes || grids.output.has_value() ? out : out.to(q.scalar_type());
}

}  // namespace

at::Tensor quantized_attention(const at::Tensor& q,                       // [..., L, D]
                               const at::Tensor& k,                       // [..., S, D]
                               const at::Tensor& v,                       // [..., S, Dv]
                               const OptionalTensor& mask,                // [..., L, S]
                               const OptionalTensor& thresholds,          // [T], rising
                               const OptionalTensor& exponents,           // [T + 1]
                               const OptionalTensor& eta,                 // []
                               const OptionalTensor& softmax_scale,       // []
                               const OptionalTensor& softmax_zero_point,  // []
                               int64_t softmax_bits, std::optional<double> scale, bool is_causal,
                               const OptionalTensor& query_scale,       // []
                               const OptionalTensor& query_zero_point,  // []
                               int64_t query_bits,
                               const OptionalTensor& key_scale,       // []
                               const OptionalTensor& key_zero_point,  // []
                               int64_t key_bits,
                               const OptionalTensor& value_scale,       // []
                               const OptionalTensor& value_zero_point,  // []
                               int64_t value_bits,
                               const OptionalTensor& output_scale,       // []
                               const OptionalTensor& output_zero_point,  // []
                               int64_t output_bits) {
  check_operand("q", q, q);
  check_operand("k", k, q);
  check_operand("v", v, q);
  check_shapes(q, k, v);
  if (mask.has_value()) check_mask(*mask, is_causal);
  const Quantizer quantizer{thresholds,    exponents,          eta,
                            softmax_scale, softmax_zero_point, softmax_bits};
  check_quantizer(kOp, quantizer);
  const Table table(kOp, quantizer);
  const OperandGrids grids{
      operand_grid(kOp, "query", query_scale, query_zero_point, query_bits, &q),
      operand_grid(kOp, "key", key_scale, key_zero_point, key_bits, &k),
      operand_grid(kOp, "value", value_scale, value_zero_point, value_bits, &v),
      operand_grid(kOp, "output", output_scale, output_zero_point, output_bits)};
  TORCH_CHECK_VALUE(grids.query.has_value() == grids.key.has_value(), kOp,
                    ": query_scale and key_scale must be given together, got only one of them");
  TORCH_CHECK_VALUE(
      q.scalar_type() != at::kByte || (grids.key.has_value() && grids.value.has_value()), kOp,
      ": codes need query_scale, key_scale and value_scale");
  const double factor = scale.value_or(1.0 / std::sqrt(static_cast<double>(q.size(-1))));
  return attention_of(q, k, v, mask, grids, table.levels, factor, is_causal);
}

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "quantized_attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, *, Tensor? "
      "thresholds=None, "
      "Tensor? exponents=None, Tensor? eta=None, Tensor? softmax_scale=None, "
      "Tensor? softmax_zero_point=None, int softmax_bits=8, float? scale=None, "
      "bool is_causal=False, Tensor? query_scale=None, Tensor? query_zero_point=None, "
      "int query_bits=8, Tensor? key_scale=None, Tensor? key_zero_point=None, int key_bits=8, "
      "Tensor? value_scale=None, Tensor? value_zero_point=None, int value_bits=8, "
      "Tensor? output_scale=None, Tensor? output_zero_point=None, int output_bits=8) -> Tensor");
}

namespace {

// As an operator its outputs lie one after another.
template <auto kFunction>
struct Contiguous;
template <class... Arguments, at::Tensor (*kFunction)(Arguments...)>
struct Contiguous<kFunction> {
  static at::Tensor call(Arguments... arguments) { return kFunction(arguments...).contiguous(); }
};

}  // namespace

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("quantized_attention", Contiguous<quantized_attention>::call);
}

}  // namespace torchquant
