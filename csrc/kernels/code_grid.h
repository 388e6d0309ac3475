// Outputs as codes: for packed products on the CPU the grid of every output where the kernels read
// it; and for values that are there already.
#pragma once
#include <ATen/core/Tensor.h>
#include <csrc/core/integers.h>
#include <csrc/kernels/linear.h>

#include <vector>

namespace torchquant {

class CodeGrid {
 public:
  // One grid for each of as many equal parts of the outputs.
  CodeGrid(int64_t outputs, const std::vector<Grid>& parts, int64_t bits);
  void apply_to(PackedProduct& product) const;
  int64_t parts() const { return parts_; }
  IntegerGrid integer_grid() const {  // of the first output
    return {numbers_[0], 0.0f, numbers_[stride_], max_code_, 0};
  }

 private:
  int64_t stride_;
  int64_t parts_;
  bool by_products_;  // Note [division by products]
  float max_code_;
  std::vector<float> numbers_;  // [6, stride]: as a product has them
};

// to_code in ATen's operators; grids broadcast to the values.
at::Tensor codes_of(const at::Tensor& values, const at::Tensor& scale, const at::Tensor& zero_point,
                    int64_t bits);

}  // namespace torchquant
