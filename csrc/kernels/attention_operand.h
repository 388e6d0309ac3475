// q, k and v on grids: their codes as the activations and the 8-bit weights of integer products.
//
// Products are taken in units of the grids, with every scale in the scale of a row: sums over up to
// 512 columns are exact where zero points are integers, and one multiplication makes the value.
#pragma once
#include <ATen/core/Tensor.h>
#include <csrc/kernels/attention.h>
#include <csrc/kernels/code_grid.h>

#include <atomic>
#include <memory>
#include <optional>
#include <vector>

namespace torchquant {

// One grid, or of codes one for each row: scale and zero point [..., R, 1] instead of `grid`.
struct OperandGrid {
  Grid grid;
  int64_t bits;
  at::Tensor scale;
  at::Tensor zero_point;

  bool of_rows() const { return scale.defined(); }
};

// As given for "query", "key" or "value"; checked. Of rows only where there is x.
std::optional<OperandGrid> operand_grid(const char* op, const char* operand,
                                        const std::optional<at::Tensor>& scale,
                                        const std::optional<at::Tensor>& zero_point, int64_t bits,
                                        const at::Tensor* x = nullptr);

// Codes of values that are there already.
at::Tensor codes_of(const at::Tensor& values, const OperandGrid& grid);

// [..., R, C], broadcast to leading dimensions, as rows of every head on their grids: float32 or
// codes. They stay where they lie if the elements of a row are neighbours.
class HeadRows {
 public:
  HeadRows(const at::Tensor& x, at::IntArrayRef leading, const OperandGrid& grid);
  // One head from row `first` on.
  QuantizeOperand operand(int64_t head, int64_t first) const;
  // Of `count` rows of one head from row `first` on.
  void copy_grids(int64_t head, int64_t first, int64_t count, float* scales,
                  float* zero_points) const;
  const OperandGrid& grid() const { return grid_; }
  int64_t rows() const { return x_.size(-2); }
  int64_t columns() const { return x_.size(-1); }

 private:
  OperandGrid grid_;
  at::Tensor x_;
};

// Keys (outputs) or values (inputs) of every head as a weight. `finite` is set to false where x is
// not.
class PackedHeads {
 public:
  enum class Order { keys, values };
  PackedHeads(const HeadRows& x, int64_t heads, Order order, std::atomic<bool>& finite);
  PackedWeight view(int64_t head) const;
  const BlockLayout& layout() const { return layout_; }
  float scale() const { return scale_; }

 private:
  void set_grids(const HeadRows& x, int64_t heads);
  bool pack(const HeadRows& x, int64_t head, Order order);
  // Where a head's [groups, stride] numbers begin.
  int64_t grids_of(int64_t head) const { return own_grids_ ? head * layout_.groups * stride_ : 0; }

  BlockLayout layout_;
  int64_t outputs_;
  int64_t stride_;
  float scale_;     // in the scale of the products' rows
  bool own_grids_;  // of each output of a head
  int32_t origin_;
  at::Tensor packed_;               // uint8 [heads, outputs / 16, blocks, 8, 64]
  std::vector<float> scales_;       // [heads, groups, stride], or [groups, stride] ones
  std::vector<float> zero_points_;  // of the same shape
  std::vector<float> offsets_;      // of the same shape: origin - zero point; empty: zeros
  at::Tensor sums_;                 // float32 [heads, stride]
};

// float32 [heads, R, C]: the nearest values of the grids.
at::Tensor dequantized_heads(const HeadRows& x, int64_t heads, std::atomic<bool>& finite);

// Integer activations of some rows of one head.
class IntegerRows {
 public:
  // Room for so many rows.
  IntegerRows(const BlockLayout& layout, int64_t rows);
  // Codes of `count` of x's rows from `row` on; their scales, times `unit`, make values of
  // products. Whether all of x is finite.
  bool quantize(const HeadRows& x, int64_t head, int64_t row, int64_t count, float unit);
  // `count` rows to write to instead; `unit` times an integer moved by its row's zero is a value.
  ProbabilityRows probabilities(int64_t count, float unit);
  // To rows of `out`, or codes to rows of `codes` where there is a grid for them; `stride` apart.
  void multiply(const PackedWeight& weight, float* out, int64_t stride) const;
  void multiply(const PackedWeight& weight, uint8_t* codes, int64_t stride,
                const CodeGrid& grid) const;

 private:
  BlockLayout layout_;
  int64_t rows_;  // in use
  std::unique_ptr<int8_t[]> narrow_;
  std::unique_ptr<int16_t[]> wide_;  // either of them
  std::unique_ptr<int32_t[]> sums_;
  std::unique_ptr<float[]> scale_;
  std::unique_ptr<float[]> zero_;
  std::unique_ptr<uint8_t[]> work_;

  PackedProduct product(const PackedWeight& weight) const;
};

}  // namespace torchquant
