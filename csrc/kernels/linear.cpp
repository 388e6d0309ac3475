// Packed low-bit linear layers: y = x W^T + b with integer activations (see linear.h).
#include <csrc/kernels/linear.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/core/parallel.h>
#include <csrc/kernels/integer_input.h>
#include <csrc/kernels/linear_cuda.h>
#include <csrc/kernels/operators.h>
#include <csrc/kernels/output_grid.h>
#include <csrc/kernels/prepacked.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string_view>
#include <vector>

namespace torchquant {
namespace {

constexpr const char* kOp = "quantized_linear";
constexpr int64_t kQuantizeElements = 1 << 14;  // of a task
constexpr int64_t kTaskProducts = 1 << 21;      // of a task: about 10 us

// The integer activations of all rows, and the tensors that own their memory.
struct Activations {
  at::Tensor integers;  // int8 or int16 [rows, blocks * 32]
  at::Tensor sums;      // int32 [rows, groups]
  at::Tensor scale;     // float32 [rows]
  at::Tensor zero;      // float32 [rows], or undefined
  GroupStarts group_starts;
  at::Tensor starts;  // int32 [count, rows], or undefined
};

void check_float(const at::Tensor& x, const char* name, const at::Tensor& tensor,
                 at::IntArrayRef shape) {
  check_same_device(kOp, name, tensor, x);
  check_shape(kOp, name, tensor, shape);
}

// On the CPU in chunks, where NaN and Inf are errors.
void quantize_all(QuantizeRows all, const at::Tensor& x) {
  if (x.is_cuda()) {
    TORCHQUANT_LAUNCH(quantize_rows, all);
    return;
  }
  const int64_t columns = all.layout.columns, depth = all.layout.blocks * kBlockInputs;
  const int64_t step = std::max<int64_t>(kQuantizeElements / std::max<int64_t>(columns, 1), 1);
  std::atomic<bool> finite{true};
  at::parallel_for(0, (all.rows + step - 1) / step, 1, [&](int64_t begin, int64_t end) {
    bool own = true;
    const int64_t first = begin * step;
    QuantizeRows part = all;
    part.rows = std::min(end * step, all.rows) - first;
    if (part.x != nullptr) part.x += first * columns;
    if (part.codes != nullptr) part.codes += first * columns;
    if (part.narrow != nullptr) part.narrow += first * depth;
    if (part.wide != nullptr) part.wide += first * depth;
    if (part.a_scale != nullptr) part.a_scale += first;
    if (part.a_zero != nullptr) part.a_zero += first;
    part.sums += first * all.layout.groups;
    if (part.starts != nullptr) part.starts += first;
    part.finite = &own;
    quantize_rows(part);
    if (!own) finite = false;
  });
  if (!finite) check_finite(kOp, "x", x);
}

Activations quantize_activations(const at::Tensor& x, const InputGrid& grid,
                                 const PackedWeight& weight, bool wide) {
  const BlockLayout& layout = weight.layout;
  const int64_t rows = x.size(0), depth = layout.blocks * kBlockInputs;
  const auto options = x.options().requires_grad(false);
  const auto floats = options.dtype(at::kFloat);
  Activations a{at::empty({rows, depth}, options.dtype(wide ? at::kShort : at::kChar)),
                at::Tensor(),
                at::Tensor(),
                at::Tensor(),
                group_starts(weight, cpu_tier(), wide, rows),
                at::Tensor()};
  // One more column, and zeros, are what CUDA's kernels ask for.
  const at::Tensor counters = x.is_cuda()
                                  ? at::zeros({rows * (layout.groups + 1)}, options.dtype(at::kInt))
                                  : at::empty({rows * layout.groups}, options.dtype(at::kInt));
  a.sums = counters.narrow(0, 0, rows * layout.groups);
  QuantizeRows q{};
  q.layout = layout;
  q.rows = rows;
  const bool codes = x.scalar_type() == at::kByte;
  q.codes = codes ? x.const_data_ptr<uint8_t>() : nullptr;
  q.x = codes ? nullptr : x.const_data_ptr<float>();
  q.narrow = wide ? nullptr : a.integers.mutable_data_ptr<int8_t>();
  q.wide = wide ? a.integers.mutable_data_ptr<int16_t>() : nullptr;
  q.sums = a.sums.mutable_data_ptr<int32_t>();
  if (a.group_starts.blocks > 0) {
    a.starts = at::empty({a.group_starts.count(layout), rows}, options.dtype(at::kInt));
    q.group_starts = a.group_starts;
    q.starts = a.starts.mutable_data_ptr<int32_t>();
  }
  if (x.is_cuda()) q.largest = reinterpret_cast<uint32_t*>(q.sums + a.sums.numel());
  q.shift = grid.dynamic() && !grid.symmetric.has_value() ? 0 : 1 << (grid.bits - 1);
  if (grid.dynamic()) {
    a.scale = at::empty({rows}, floats);
    q.a_scale = a.scale.mutable_data_ptr<float>();
    if (grid.symmetric.has_value()) {
      q.grid = *grid.symmetric ? GridType::symmetric : GridType::asymmetric;
      q.max_code = max_code_of(grid.bits);
      a.zero = at::empty({rows}, floats);
      q.a_zero = a.zero.mutable_data_ptr<float>();
    } else {
      q.limit = grid.bits == 8 ? 127.0f : 32767.0f;
    }
  } else {
    q.max_code = max_code_of(grid.bits);
    if (x.is_cpu() && grid.scale->numel() == 1) {
      q.scale = *grid.scale->const_data_ptr<float>();
      q.zero_point = *grid.zero_point->const_data_ptr<float>();
      check_positive(kOp, "input_scale", q.scale);
      a.scale = at::empty({rows}, floats);
      a.zero = at::empty({rows}, floats);
      std::fill_n(a.scale.mutable_data_ptr<float>(), rows, q.scale);
      std::fill_n(a.zero.mutable_data_ptr<float>(), rows,
                  q.zero_point - static_cast<float>(q.shift));
    } else {
      const auto spread = [&](const at::Tensor& t) { return t.reshape({-1}).expand({rows}); };
      a.zero = spread(*grid.zero_point).sub(q.shift);
      a.scale = codes ? spread(*grid.scale).contiguous() : at::empty({rows}, floats);
    }
    if (x.is_cuda() && !codes) {  // the kernel reads the grid and leaves the scale of each row
      q.a_scale = a.scale.mutable_data_ptr<float>();
      q.scale_at = grid.scale->const_data_ptr<float>();
      q.zero_point_at = grid.zero_point->const_data_ptr<float>();
    }
  }
  quantize_all(q, x);
  return a;
}

// Rows and panels of outputs are cut into tasks; a small product stays on the calling thread.
void multiply(const PackedProduct& all) {
  const int64_t depth = all.weight.layout.blocks * kBlockInputs;
  constexpr int64_t kPanelTiles = kPanelOutputs / kTileOutputs, kMostRows = 256;
  const int64_t panels = (all.last_tile + kPanelTiles - 1) / kPanelTiles;
  const int64_t chunks = (all.rows + kMostRows - 1) / kMostRows;
  const int64_t rows = padded((all.rows + chunks - 1) / chunks, 2 * kTileOutputs);
  const int64_t products = std::min(rows, all.rows) * depth * kPanelOutputs;
  const int64_t grain = std::max<int64_t>(kTaskProducts / std::max<int64_t>(products, 1), 1);
  at::parallel_for(0, panels * chunks, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t chunk = begin / panels, panel = begin % panels;
      const int64_t last = std::min(panels, panel + end - begin), row = chunk * rows;
      PackedProduct part = rows_of(all, row, std::min(rows, all.rows - row));
      part.first_tile = panel * kPanelTiles;
      part.last_tile = std::min(last * kPanelTiles, all.last_tile);
      packed_product(part);
      begin += last - panel;
    }
  });
}

at::Tensor as_rows(const at::Tensor& tensor, int64_t columns, bool keep_type) {
  int64_t count = 1;
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) count *= tensor.size(d);
  const at::Tensor rows = tensor.reshape({count, columns});
  return keep_type ? rows.contiguous() : rows.to(at::kFloat).contiguous();
}

}  // namespace

at::Tensor quantized_linear(const OptionalTensor& to, const at::Tensor& x, const at::Tensor& packed,
                            const at::Tensor& grid, const OptionalTensor& bias, int64_t bits,
                            int64_t in_features, int64_t out_features, int64_t group_size,
                            const OptionalTensor& levels, const OptionalTensor& input_scale,
                            const OptionalTensor& input_zero_point, int64_t input_bits,
                            std::string_view activation, const OptionalTensor& residual,
                            const OptionalTensor& output_scale,
                            const OptionalTensor& output_zero_point, int64_t output_bits,
                            std::optional<bool> input_symmetric) {
  check_device(kOp, x);
  const InputGrid input{input_scale, input_zero_point, input_bits, input_symmetric};
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == in_features, kOp, ": x must be [..., ",
                    in_features, "], got ", x.sizes());
  check_input(kOp, x, input, "row", in_features == 0 ? 0 : x.numel() / in_features);
  TORCH_CHECK_NOT_IMPLEMENTED(x.is_cpu() || !input_symmetric.has_value(), kOp,
                              ": input_symmetric is for the CPU, got x on ", x.device());
  check_same_device(kOp, "packed", packed, x);
  const Prepacked weight(kOp, {packed, grid, levels, bits, in_features, out_features, group_size});
  const c10::DeviceGuard guard(x.device());
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = out_features;
  if (bias.has_value()) check_float(x, "bias", *bias, {out_features});
  if (residual.has_value()) check_float(x, "residual", *residual, shape);
  const Epilogue epilogue = parse_epilogue(kOp, activation);
  const OutputGrid output(kOp, x, out_features, output_scale, output_zero_point, output_bits);
  const bool codes = x.scalar_type() == at::kByte;
  const int64_t count = c10::multiply_integers(x.sizes().begin(), x.sizes().end() - 1);
  const bool floats = x.is_cuda() && input.dynamic() && input_bits == 16 && takes_floats(x, count);
  if (floats && !takes_packed_weight(x, count)) {
    const at::Tensor y = linear_in_floats(x, weight.view(), bias, epilogue, residual);
    return output.given() ? output.codes(y) : y;
  }
  const at::Tensor rows = as_rows(x, in_features, codes || floats);
  const auto type = output.given() ? at::kByte : floats ? x.scalar_type() : at::kFloat;
  const at::Tensor out = to.has_value() ? to->view({count, out_features})
                                        : at::empty({count, out_features},
                                                    x.options().dtype(type).requires_grad(false));
  PackedProduct product{};
  product.weight = weight.view(input_bits == 16);
  product.last_tile = (out_features + kTileOutputs - 1) / kTileOutputs;
  product.rows = count;
  product.epilogue = epilogue;
  product.tier = cpu_tier();
  product.out_stride = out_features;
  if (output.given()) output.apply_to(product, out);
  if (floats) {
    if (out.numel() > 0) multiply_floats(product, rows, bias, residual, out);
    return out.view(shape);
  }
  if (!output.given()) {
    product.out = out.mutable_data_ptr<float>();
    product.streams = streams_to(product.out, count, out_features);
  }
  const Activations a =
      quantize_activations(rows, input, product.weight, input_bits == 16 || weight.needs_wide());
  if (a.integers.scalar_type() == at::kShort)
    product.wide = a.integers.const_data_ptr<int16_t>();
  else
    product.narrow = a.integers.const_data_ptr<int8_t>();
  product.sums = a.sums.const_data_ptr<int32_t>();
  product.group_starts = a.group_starts;
  if (a.starts.defined()) product.starts = a.starts.const_data_ptr<int32_t>();
  product.a_scale = a.scale.const_data_ptr<float>();
  product.a_zero = a.zero.defined() ? a.zero.const_data_ptr<float>() : nullptr;
  product.one_grid = !input.dynamic() && input_scale->numel() == 1;
  at::Tensor own_bias, own_residual;
  if (bias.has_value()) {
    own_bias = bias->to(at::kFloat).contiguous();
    product.bias = own_bias.const_data_ptr<float>();
  }
  if (residual.has_value()) {
    own_residual = as_rows(*residual, out_features, false);
    product.residual = own_residual.const_data_ptr<float>();
  }
  if (out.numel() > 0) x.is_cuda() ? multiply_on_cuda(product, a.integers) : multiply(product);
  const at::Tensor y = out.view(shape);
  return codes || output.given() ? y : y.to(x.scalar_type());
}

namespace {

// As an operator it has no place for its outputs yet.
template <auto kFunction>
struct ToNewTensor;
template <class... Arguments, at::Tensor (*kFunction)(const OptionalTensor&, Arguments...)>
struct ToNewTensor<kFunction> {
  static at::Tensor call(Arguments... arguments) { return kFunction(std::nullopt, arguments...); }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "quantized_linear(Tensor x, Tensor packed, Tensor grid, Tensor? bias=None, *, int bits, "
      "SymInt in_features, SymInt out_features, int group_size=0, Tensor? levels=None, "
      "Tensor? input_scale=None, Tensor? input_zero_point=None, int input_bits=8, "
      "str activation=\"none\", Tensor? residual=None, Tensor? output_scale=None, "
      "Tensor? output_zero_point=None, int output_bits=8, bool? input_symmetric=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("quantized_linear", ToNewTensor<quantized_linear>::call);
}
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) {
  m.impl("quantized_linear", ToNewTensor<quantized_linear>::call);
}
#endif

}  // namespace torchquant
