#include <csrc/kernels/code_grid.h>

#include <csrc/core/code_by_products.h>

#include <algorithm>

namespace torchquant {

CodeGrid::CodeGrid(int64_t outputs, const std::vector<Grid>& parts, int64_t bits)
    : stride_(padded(outputs, kPanelOutputs)),
      parts_(static_cast<int64_t>(parts.size())),
      by_products_(std::all_of(parts.begin(), parts.end(), CodeByProducts::in_range)),
      max_code_(max_code_of(bits)),
      numbers_(static_cast<size_t>(6 * stride_), 1.0f) {
  const int64_t count = outputs / parts_;
  float* part = numbers_.data();
  for (const Grid& grid : parts) {
    const CodeByProducts code(grid, max_code_);
    std::fill_n(part, count, grid.scale);
    std::fill_n(part + stride_, count, grid.zero_point);
    std::fill_n(part + 2 * stride_, count, code.high);
    std::fill_n(part + 3 * stride_, count, code.low);
    std::fill_n(part + 4 * stride_, count, code.lowest);
    std::fill_n(part + 5 * stride_, count, code.highest);
    part += count;
  }
}

void CodeGrid::apply_to(PackedProduct& product) const {
  product.code_scale = numbers_.data();
  product.code_zero_point = numbers_.data() + stride_;
  product.code_reciprocal = by_products_ ? numbers_.data() + 2 * stride_ : nullptr;
  product.code_reciprocal_rest = numbers_.data() + 3 * stride_;
  product.code_lowest = numbers_.data() + 4 * stride_;
  product.code_highest = numbers_.data() + 5 * stride_;
  product.max_code = max_code_;
}

at::Tensor codes_of(const at::Tensor& values, const at::Tensor& scale, const at::Tensor& zero_point,
                    int64_t bits) {
  const at::Tensor x = values.to(at::kFloat).div(scale).add_(zero_point);
  return x.clamp_(0, max_code_of(bits)).nan_to_num_(0).round_().to(at::kByte);
}

}  // namespace torchquant
