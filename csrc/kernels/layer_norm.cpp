// LayerNorm whose results are codes of one uniform grid (see layer_norm.h).
#include <csrc/kernels/layer_norm.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/layer_norm.h>
#include <c10/core/DeviceGuard.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/core/parallel.h>
#include <csrc/kernels/code_grid.h>
#include <csrc/kernels/operators.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

namespace torchquant {
namespace {

constexpr const char* kOp = "quantized_layer_norm";
constexpr int64_t kTaskElements = 1 << 14;  // float32 copies of half types stay in L2

void check_number(const at::Tensor& x, const char* name, const at::Tensor& number) {
  TORCH_CHECK_TYPE(number.scalar_type() == at::kFloat, kOp, ": ", name, " must be float32, got ",
                   number.scalar_type());
  check_same_device(kOp, name, number, x);
  TORCH_CHECK_VALUE(number.numel() == 1, kOp, ": ", name, " must be one number, got ",
                    number.sizes());
}

Grid grid_of(const at::Tensor& scale, const at::Tensor& zero_point) {
  const Grid grid{*scale.const_data_ptr<float>(), *zero_point.const_data_ptr<float>()};
  check_positive(kOp, "output_scale", grid.scale);
  check_finite(kOp, "output_zero_point", zero_point);
  return grid;
}

// float32 numbers as the leaf reads them, `missing` where there are none.
std::vector<float> numbers_of(const OptionalTensor& given, int64_t count, float missing) {
  std::vector<float> numbers(static_cast<size_t>(padded(count, kNormLanes)), missing);
  if (given.has_value()) {
    const at::Tensor floats = given->to(at::kFloat).contiguous();
    std::copy_n(floats.const_data_ptr<float>(), count, numbers.data());
  }
  return numbers;
}

// `all` with everything but x, whose rows are given.
void encode(const LayerNormRows& all, const at::Tensor& rows, const at::Tensor& x) {
  const int64_t step = std::max<int64_t>(kTaskElements / all.columns, 1);
  std::atomic<bool> finite{true};
  for_each_chunk((all.rows + step - 1) / step, [&](int64_t chunk) {
    bool own = true;
    const int64_t first = chunk * step;
    LayerNormRows part = all;
    part.rows = std::min(step, all.rows - first);
    const at::Tensor floats =
        rows.scalar_type() == at::kFloat ? rows : rows.narrow(0, first, part.rows).to(at::kFloat);
    part.x = floats.const_data_ptr<float>();
    if (rows.scalar_type() == at::kFloat) part.x += first * all.columns;
    part.codes += first * all.columns;
    part.finite = &own;
    layer_norm_codes(part);
    if (!own) finite = false;
  });
  if (!finite) check_finite(kOp, "x", x);
}

}  // namespace

at::Tensor quantized_layer_norm(const at::Tensor& x, const OptionalTensor& weight,
                                const OptionalTensor& bias, const at::Tensor& output_scale,
                                const at::Tensor& output_zero_point, int64_t output_bits,
                                double eps) {
  check_device(kOp, x);
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, kOp,
                   ": x must be float32, float16 or bfloat16, got ", type);
  TORCH_CHECK_VALUE(x.dim() >= 1, kOp, ": x must be [..., K], got ", x.sizes());
  const int64_t columns = x.size(-1);
  for (const auto& [name, numbers] : {std::pair{"weight", &weight}, {"bias", &bias}}) {
    if (!numbers->has_value()) continue;
    check_same_device(kOp, name, **numbers, x);
    check_shape(kOp, name, **numbers, {columns});
  }
  check_number(x, "output_scale", output_scale);
  check_number(x, "output_zero_point", output_zero_point);
  check_bits(kOp, output_bits);
  const c10::DeviceGuard guard(x.device());
  if (x.is_cuda()) {
    const auto floats = [](const OptionalTensor& numbers) {
      return numbers.has_value() ? std::optional(numbers->to(at::kFloat)) : std::nullopt;
    };
    const at::Tensor y =
        at::layer_norm(x.to(at::kFloat), {columns}, floats(weight), floats(bias), eps);
    return codes_of(y, output_scale.reshape({}), output_zero_point.reshape({}), output_bits);
  }
  const Grid grid = grid_of(output_scale, output_zero_point);
  const at::Tensor codes = at::empty(x.sizes(), x.options().dtype(at::kByte).requires_grad(false));
  if (x.numel() == 0) return codes;
  const std::vector<float> weights = numbers_of(weight, columns, 1.0f);
  const std::vector<float> biases = numbers_of(bias, columns, 0.0f);
  LayerNormRows all{};
  all.rows = x.numel() / columns;
  all.columns = columns;
  all.weight = weights.data();
  all.bias = biases.data();
  all.eps = static_cast<float>(eps);
  all.grid = grid;
  all.max_code = max_code_of(output_bits);
  all.codes = codes.mutable_data_ptr<uint8_t>();
  encode(all, x.contiguous().view({all.rows, columns}), x);
  return codes;
}

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "quantized_layer_norm(Tensor x, Tensor? weight=None, Tensor? bias=None, *, "
      "Tensor output_scale, Tensor output_zero_point, int output_bits=8, float eps=1e-05) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) { m.impl("quantized_layer_norm", quantized_layer_norm); }
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) { m.impl("quantized_layer_norm", quantized_layer_norm); }
#endif

}  // namespace torchquant
