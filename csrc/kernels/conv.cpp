// Convolutions with packed low-bit weights and integer activations (see conv.h).
#include <csrc/kernels/conv.h>

#include <ATen/ops/empty.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/kernels/conv_input.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <vector>

namespace torchquant {
namespace {

constexpr const char* kOp = "quantized_conv2d";

Extent positive(const char* name, at::IntArrayRef values) {
  TORCH_CHECK_VALUE(values[0] > 0 && values[1] > 0, kOp, ": ", name, " must be positive, got ",
                    values);
  return {values[0], values[1]};
}

struct Geometry {
  at::IntArrayRef kernel_size, stride, padding, dilation;
  int64_t in_channels, out_channels, groups;
};

ConvShape shape_of(const at::Tensor& x, const Geometry& g) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(1) == g.in_channels, kOp, ": x must be [B, ",
                    g.in_channels, ", H, W], got ", x.sizes());
  TORCH_CHECK_VALUE(g.groups > 0 && g.in_channels % g.groups == 0 && g.out_channels % g.groups == 0,
                    kOp, ": groups must divide in_channels=", g.in_channels,
                    " and out_channels=", g.out_channels, ", got ", g.groups);
  const bool sides = g.padding.size() == 4;
  TORCH_CHECK_VALUE(sides || g.padding.size() == 2, kOp,
                    ": padding must be [h, w] or [top, bottom, left, right], got ", g.padding);
  for (const int64_t side : g.padding)
    TORCH_CHECK_VALUE(side >= 0, kOp, ": padding must not be negative, got ", g.padding);
  ConvShape s{x.size(0),
              g.in_channels,
              g.out_channels,
              g.groups,
              {x.size(2), x.size(3)},
              {},
              {},
              positive("kernel_size", g.kernel_size),
              positive("stride", g.stride),
              positive("dilation", g.dilation),
              {}};
  const Extent after{g.padding[sides ? 1 : 0], g.padding[sides ? 3 : 1]};
  s.before = {g.padding[0], g.padding[sides ? 2 : 1]};
  s.padded = {s.size.h + s.before.h + after.h, s.size.w + s.before.w + after.w};
  const Extent reach{s.dilation.h * (s.kernel.h - 1) + 1, s.dilation.w * (s.kernel.w - 1) + 1};
  TORCH_CHECK_VALUE(s.padded.h >= reach.h && s.padded.w >= reach.w, kOp,
                    ": x with its padding must be at least ", reach.h, " x ", reach.w, ", got ",
                    s.padded.h, " x ", s.padded.w);
  s.out = {(s.padded.h - reach.h) / s.stride.h + 1, (s.padded.w - reach.w) / s.stride.w + 1};
  return s;
}

// The stack of conv_prepack, taken apart.
std::vector<Prepacked> weights_of(const ConvShape& s, const PrepackedTensors& all) {
  const auto part = [&](const char* name, const at::Tensor& tensor, int64_t group) {
    TORCH_CHECK_VALUE(tensor.dim() > 0 && tensor.size(0) % s.groups == 0, kOp, ": ", name,
                      " must be a stack for ", s.groups, " groups as conv_prepack gives, got ",
                      tensor.sizes());
    const int64_t size = tensor.size(0) / s.groups;
    return tensor.narrow(0, group * size, size);
  };
  std::vector<Prepacked> weights;
  for (int64_t j = 0; j < s.groups; ++j) {
    PrepackedTensors own = all;
    own.packed = part("packed", all.packed, j);
    own.grid = part("grid", all.grid, j);
    if (all.levels.has_value() && all.levels->dim() == 2)
      own.levels = part("levels", *all.levels, j);
    weights.emplace_back(kOp, own);
  }
  return weights;
}

at::Tensor quantized_conv2d(
    const at::Tensor& x, const at::Tensor& packed, const at::Tensor& grid,
    const std::optional<at::Tensor>& bias, int64_t bits, int64_t in_channels, int64_t out_channels,
    at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, int64_t group_size,
    const std::optional<at::Tensor>& levels, const std::optional<at::Tensor>& input_scale,
    const std::optional<at::Tensor>& input_zero_point, int64_t input_bits,
    std::string_view activation, const std::optional<at::Tensor>& output_scale,
    const std::optional<at::Tensor>& output_zero_point, int64_t output_bits) {
  const ConvShape s =
      shape_of(x, {kernel_size, stride, padding, dilation, in_channels, out_channels, groups});
  ConvInput input(kOp, x, {input_scale, input_zero_point, input_bits}, s);
  const int64_t columns = in_channels / groups * s.kernel.area();
  const bool depthwise = is_depthwise(groups, columns, s.kernel.area(), group_size);
  const bool multiplied = depthwise && out_channels != in_channels;
  const OutputGrid code_grid(kOp, x, out_channels, output_scale, output_zero_point, output_bits);
  const bool gives_codes = code_grid.given();
  TORCH_CHECK_VALUE(!gives_codes || code_grid.parts() == 1, kOp,
                    ": output_scale must be one number, got ", output_scale->sizes());
  // Other kernels give values, which become codes afterwards.
  const bool codes_inside =
      gives_codes && (depthwise ? !multiplied : groups == 1 && input.pads_exactly());
  const bool channels_last = input.channels_last() || gives_codes;
  if (multiplied) {
    input.make_contiguous();
  } else if (depthwise && codes_inside) {
    input.make_channels_last();
  }
  at::Tensor own_bias;
  if (bias.has_value()) {
    check_shape(kOp, "bias", *bias, {out_channels});
    own_bias = bias->to(at::kFloat).contiguous();
  }
  const bool last = channels_last && !multiplied;
  const auto format = last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const ConvOutput output{
      own_bias.defined() ? own_bias.const_data_ptr<float>() : nullptr,
      parse_epilogue(kOp, activation), last,
      at::empty({s.batch, s.outputs, s.out.h, s.out.w},
                at::TensorOptions(codes_inside ? at::kByte : at::kFloat).memory_format(format)),
      codes_inside ? &code_grid : nullptr};
  if (depthwise) {
    check_depthwise_weight(kOp, s, {packed, grid});
    input.channels_last() ? run_depthwise_pixels(s, input, {packed, grid}, output)
                          : run_depthwise(s, input, {packed, grid}, output);
  } else {
    std::vector<Prepacked> weights =
        weights_of(s, {packed, grid, levels, bits, columns, out_channels / groups, group_size});
    const bool wide = input_bits == 16 ||
                      std::any_of(weights.begin(), weights.end(),
                                  [](const Prepacked& weight) { return weight.needs_wide(); });
    if (output.out.numel() > 0)
      run_gathered(s, input, std::move(weights), group_size, wide, output);
  }
  at::Tensor out = output.out;
  if (gives_codes && !codes_inside) out = code_grid.codes(out);
  if (!gives_codes && x.scalar_type() != at::kByte) out = out.to(x.scalar_type());
  return channels_last ? out.contiguous(at::MemoryFormat::ChannelsLast) : out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "quantized_conv2d(Tensor x, Tensor packed, Tensor grid, Tensor? bias=None, *, int bits, "
      "SymInt in_channels, SymInt out_channels, int[2] kernel_size, int[2] stride=1, "
      "SymInt[] padding=[0, 0], int[2] dilation=1, int groups=1, int group_size=0, "
      "Tensor? levels=None, Tensor? input_scale=None, Tensor? input_zero_point=None, "
      "int input_bits=8, str activation=\"none\", Tensor? output_scale=None, "
      "Tensor? output_zero_point=None, int output_bits=8) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) { m.impl("quantized_conv2d", quantized_conv2d); }

}  // namespace torchquant
