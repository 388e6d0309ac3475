#include <csrc/core/check.h>

#include <ATen/ops/isfinite.h>
#include <ATen/ops/sum.h>
#include <c10/util/Exception.h>
#include <csrc/core/integers.h>

#include <limits>

namespace torchquant {

void check_matrix(const char* op, const char* argument, const at::Tensor& matrix) {
  TORCH_CHECK_VALUE(matrix.dim() == 2, op, ": ", argument, " must be a matrix [N, K], got shape ",
                    matrix.sizes());
  const auto type = matrix.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, op, ": ",
                   argument, " must be float32, float16 or bfloat16, got ", type);
}

void check_gram(const char* op, const at::Tensor& gram, const at::Tensor& weight) {
  const int64_t columns = weight.size(1);
  TORCH_CHECK_VALUE(
      (gram.dim() == 2 || gram.dim() == 3) && gram.size(-1) == columns && gram.size(-2) == columns,
      op, ": gram must be square of size K=", columns, ", got ", gram.sizes());
  TORCH_CHECK_VALUE(gram.dim() == 2 || (gram.size(0) > 0 && weight.size(0) % gram.size(0) == 0), op,
                    ": the rows of weight must split evenly among the Grams, got N=",
                    weight.size(0), " and gram ", gram.sizes());
  TORCH_CHECK_TYPE(gram.scalar_type() == at::kFloat || gram.scalar_type() == at::kDouble, op,
                   ": gram must be float32 or float64, got ", gram.scalar_type());
  check_same_device(op, "gram", gram, weight);
}

void check_shape(const char* op, const char* argument, const at::Tensor& tensor,
                 at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, op, ": ", argument, " must have shape ", shape,
                    ", got ", tensor.sizes());
}

void check_same_device(const char* op, const char* argument, const at::Tensor& tensor,
                       const at::Tensor& weight) {
  TORCH_CHECK_VALUE(tensor.device() == weight.device(), op, ": ", argument, " must be on ",
                    weight.device(), ", got ", tensor.device());
}

namespace {

constexpr int64_t kFewValues = 1 << 14;

// Grids of activations are one value, or one for each token: a loop costs less than calls of ATen.
bool few_and_finite(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat && tensor.is_cpu() && tensor.numel() <= kFewValues &&
         tensor.is_contiguous() &&
         magnitude_bits(tensor.const_data_ptr<float>(), tensor.numel()) <= kFiniteBits;
}

}  // namespace

void check_positive(const char* op, const char* argument, float number) {
  TORCH_CHECK_VALUE(number > 0 && number <= std::numeric_limits<float>::max(), op, ": ", argument,
                    " must be positive, got ", number);
}

void check_finite(const char* op, const char* argument, const at::Tensor& tensor) {
  if (few_and_finite(tensor)) return;
  // A finite sum proves every element finite; only an unlucky (overflowing) or a bad tensor pays
  // for the second look.
  if (at::isfinite(at::sum(tensor, at::kFloat)).item<bool>()) return;
  const int64_t bad = tensor.numel() - at::sum(at::isfinite(tensor)).item<int64_t>();
  TORCH_CHECK_VALUE(bad == 0, op, ": ", argument, " must be finite, got ", bad, " NaN or Inf");
}

void check_bits(const char* op, int64_t bits) {
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 8, op, ": bits must be 2..8, got ", bits);
}

void check_group_size(const char* op, int64_t group_size) {
  TORCH_CHECK_VALUE(group_size >= 0, op,
                    ": group_size must be 0 (one group per row) or positive, got ", group_size);
}

void check_shrink(const char* op, at::ArrayRef<double> shrink) {
  TORCH_CHECK_VALUE(!shrink.empty(), op, ": shrink must hold at least one factor, got none");
  for (const double factor : shrink) {
    TORCH_CHECK_VALUE(factor > 0 && factor <= 1, op, ": shrink factors must be in (0, 1], got ",
                      factor);
  }
}

GridType parse_grid(const char* op, std::string_view grid) {
  if (grid == "asymmetric") return GridType::asymmetric;
  if (grid == "symmetric") return GridType::symmetric;
  TORCH_CHECK_VALUE(grid == "midrise", op, ": grid must be asymmetric, symmetric or midrise, got '",
                    grid, "'");
  return GridType::midrise;
}

}  // namespace torchquant
