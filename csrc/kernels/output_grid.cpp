#include <csrc/kernels/output_grid.h>

#include <ATen/ops/empty.h>
#include <csrc/core/check.h>

#include <vector>

namespace torchquant {

void OutputGrid::check(const char* name, const at::Tensor& numbers, const at::Tensor& x,
                       int64_t outputs) const {
  TORCH_CHECK_TYPE(numbers.scalar_type() == at::kFloat, op_, ": ", name, " must be float32, got ",
                   numbers.scalar_type());
  check_same_device(op_, name, numbers, x);
  const int64_t parts = scale_.numel();
  TORCH_CHECK_VALUE(numbers.numel() == parts && parts > 0 && outputs % parts == 0, op_, ": ", name,
                    " must be one number, or one for each of equal parts of the ", outputs,
                    " outputs, got ", numbers.sizes());
}

OutputGrid::OutputGrid(const char* op, const at::Tensor& x, int64_t outputs,
                       const std::optional<at::Tensor>& scale,
                       const std::optional<at::Tensor>& zero_point, int64_t bits)
    : op_(op), bits_(bits) {
  TORCH_CHECK_VALUE(scale.has_value() == zero_point.has_value(), op_,
                    ": output_scale and output_zero_point must be given together");
  if (!scale.has_value()) return;
  check_bits(op_, bits);
  scale_ = scale->contiguous();
  zero_point_ = zero_point->contiguous();
  check("output_scale", scale_, x, outputs);
  check("output_zero_point", zero_point_, x, outputs);
  const int64_t parts = scale_.numel();
  if (x.is_cuda()) {
    const auto spread = [&](const at::Tensor& numbers) {
      return numbers.reshape({parts, 1}).repeat({1, outputs / parts}).reshape({outputs});
    };
    scale_ = spread(scale_);
    zero_point_ = spread(zero_point_);
    return;
  }
  std::vector<Grid> grids;
  for (int64_t i = 0; i < parts; ++i) {
    grids.push_back({scale_.const_data_ptr<float>()[i], zero_point_.const_data_ptr<float>()[i]});
    check_positive(op_, "output_scale", grids.back().scale);
  }
  on_cpu_.emplace(outputs, grids, bits);
}

void OutputGrid::apply_to(PackedProduct& product, const at::Tensor& codes) const {
  product.codes = codes.mutable_data_ptr<uint8_t>();
  if (on_cpu_.has_value()) return on_cpu_->apply_to(product);
  product.code_scale = scale_.const_data_ptr<float>();
  product.code_zero_point = zero_point_.const_data_ptr<float>();
  product.max_code = max_code_of(bits_);
}

}  // namespace torchquant
