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

struct OperandGrid {
  Grid grid;
  int64_t bits;
};

// As given for "query", "key" or "value"; checked.
std::optional<OperandGrid> operand_grid(const char* op, const char* operand,
                                        const std::optional<at::Tensor>& scale,
                                        const std::optional<at::Tensor>& zero_point, int64_t bits);

// Codes of values that are there already.
at::Tensor codes_of(const at::Tensor& values, const OperandGrid& grid);

// [..., R, C], broadcast to leading dimensions, as rows of every head: float32 or codes. They stay
// where they lie if the elements of a row are neighbours.
class HeadRows {
 public:
  HeadRows(const at::Tensor& x, at::IntArrayRef leading);
  // One head from row `first` on, as an operand on `grid`.
  QuantizeOperand operand(int64_t head, int64_t first, const OperandGrid& grid) const;
  int64_t rows() const { return x_.size(-2); }
  int64_t columns() const { return x_.size(-1); }

 private:
  at::Tensor x_;
};

// Keys (outputs) or values (inputs) of every head as a weight. `finite` is set to false where x is
// not.
class PackedHeads {
 public:
  enum class Order { keys, values };
  PackedHeads(const HeadRows& x, int64_t heads, const OperandGrid& grid, Order order,
              std::atomic<bool>& finite);
  PackedWeight view(int64_t head) const;
  const BlockLayout& layout() const { return layout_; }
  float scale() const { return scale_; }

 private:
  bool pack(const HeadRows& x, int64_t head, const OperandGrid& grid, Order order);

  BlockLayout layout_;
  int64_t outputs_;
  int64_t stride_;
  float scale_;
  int32_t origin_;
  at::Tensor packed_;           // uint8 [heads, outputs / 16, blocks, 8, 64]
  std::vector<float> ones_;     // [groups, stride]
  std::vector<float> offsets_;  // [groups, stride], or empty
  at::Tensor sums_;             // float32 [heads, stride]
};

// float32 [heads, R, C]: the nearest values of the grid.
at::Tensor dequantized_heads(const HeadRows& x, int64_t heads, const OperandGrid& grid,
                             std::atomic<bool>& finite);

// Integer activations of some rows of one head.
class IntegerRows {
 public:
  IntegerRows(const BlockLayout& layout, int64_t rows);
  // Codes of x's rows from `row` on; `scale` makes values of products. Whether all of x is finite.
  bool quantize(const HeadRows& x, int64_t head, int64_t row, const OperandGrid& grid, float scale);
  // To write to instead; `unit` times an integer moved by its row's zero is a value.
  ProbabilityRows probabilities(float unit) const;
  // To `out`, or its codes to `codes` where there is a grid for them.
  void multiply(const PackedWeight& weight, float* out) const;
  void multiply(const PackedWeight& weight, uint8_t* codes, const CodeGrid& grid) const;

 private:
  BlockLayout layout_;
  int64_t rows_;
  std::unique_ptr<int8_t[]> narrow_;
  std::unique_ptr<int16_t[]> wide_;  // either of them
  std::unique_ptr<int32_t[]> sums_;
  std::unique_ptr<float[]> scale_;
  std::unique_ptr<float[]> zero_;

  PackedProduct product(const PackedWeight& weight) const;
};

}  // namespace torchquant
