// The quantizer of quantized_attention's probabilities: its tensors, checked, as the leaf's Levels.
#pragma once
#include <ATen/core/Tensor.h>
#include <csrc/kernels/attention.h>

#include <optional>
#include <vector>

namespace torchquant {

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

void check_quantizer(const char* op, const Quantizer& quantizer);
// The number in a float32 tensor of one value, finite.
float one_value(const char* op, const char* argument, const at::Tensor& tensor);
float level_of_zero(const Levels& levels);

// The table that `Levels` points to.
class Table {
 public:
  explicit Table(const char* op, const Quantizer& quantizer);
  Levels levels;

 private:
  void read(const char* op, const Quantizer& quantizer);
  bool make_buckets(int32_t shift);

  std::vector<float> thresholds_;
  std::vector<float> values_;
  std::vector<Bucket> buckets_;
};

}  // namespace torchquant
