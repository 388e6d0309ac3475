// A convolution's codes and grids in the order in which quantized_conv2d reads them: linear_prepack
// of the gathered columns of each group; depthwise, pairs of 16-bit integers.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/kernels/conv_columns.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

namespace torchquant {
namespace {

constexpr const char* kOp = "conv_prepack";

using Packed = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using OptionalTensor = std::optional<at::Tensor>;

Packed pack_group(const at::Tensor& codes, const at::Tensor& scale, const OptionalTensor& zero,
                  int64_t bits, int64_t group_size, const OptionalTensor& levels) {
  static const auto prepack =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("torchquant::linear_prepack", "")
          .typed<Packed(const at::Tensor&, const at::Tensor&, const OptionalTensor&, int64_t,
                        int64_t, const OptionalTensor&)>();
  return prepack.call(codes, scale, zero, bits, group_size, levels);
}

// The integers w = code - round(zero_point), or the levels, of output n.
struct DepthwiseRow {
  const uint8_t* codes;
  const int8_t* levels;  // or null
  int32_t origin;

  int32_t operator()(int64_t tap) const {
    return levels == nullptr ? codes[tap] - origin : levels[codes[tap]];
  }
};

// int16 [N, pair_taps, 2], float32 [3, N]: scale, round(zero_point) - zero_point, sum of the
// values.
Packed pack_depthwise(const at::Tensor& codes, const at::Tensor& scale, const at::Tensor& zero,
                      int64_t bits, const Extent& kernel, const OptionalTensor& levels) {
  const int64_t outputs = codes.size(0), pairs = pair_taps(kernel);
  const at::Tensor packed = at::zeros({outputs, pairs, 2}, codes.options().dtype(at::kShort));
  const at::Tensor grid = at::zeros({3, outputs}, scale.options());
  const at::Tensor table = levels.has_value() ? levels->contiguous() : at::Tensor();
  auto* const to = packed.mutable_data_ptr<int16_t>();
  auto* const numbers = grid.mutable_data_ptr<float>();
  for (int64_t n = 0; n < outputs; ++n) {
    const float z = zero.const_data_ptr<float>()[n], s = scale.const_data_ptr<float>()[n];
    const float nearest =
        levels.has_value() ? 0.0f : round_to_integer(std::clamp(z, 0.0f, max_code_of(bits)));
    const int64_t level_row = table.defined() && table.dim() == 2 ? n * table.size(1) : 0;
    const DepthwiseRow row{codes.const_data_ptr<uint8_t>() + n * kernel.area(),
                           table.defined() ? table.const_data_ptr<int8_t>() + level_row : nullptr,
                           static_cast<int32_t>(nearest)};
    const float offset = levels.has_value() ? 0.0f : nearest - z;
    double sum = 0;
    for (int64_t tap = 0; tap < kernel.area(); ++tap) {
      const int64_t ky = tap / kernel.w, kx = tap % kernel.w;
      to[((n * pairs) + ky / 2 * kernel.w + kx) * 2 + ky % 2] = static_cast<int16_t>(row(tap));
      sum += row(tap) + static_cast<double>(offset);
    }
    numbers[n] = s;
    numbers[outputs + n] = offset;
    numbers[2 * outputs + n] = static_cast<float>(sum * s);
  }
  return {packed, grid, at::zeros({0}, codes.options().dtype(at::kChar))};
}

Packed pack_groups(const at::Tensor& codes, const at::Tensor& scale, const OptionalTensor& zero,
                   int64_t bits, int64_t groups, int64_t group_size, const OptionalTensor& levels) {
  const int64_t outputs = codes.size(0) / groups;
  std::vector<at::Tensor> packed, grids, tables;
  for (int64_t j = 0; j < groups; ++j) {
    const auto part = [&](const at::Tensor& all) { return all.narrow(0, j * outputs, outputs); };
    const auto optional = [&](const OptionalTensor& all, bool split) -> OptionalTensor {
      return all.has_value() && split ? OptionalTensor(part(*all)) : all;
    };
    auto [group, grid, table] =
        pack_group(part(codes), part(scale), optional(zero, true), bits, group_size,
                   optional(levels, levels.has_value() && levels->dim() == 2));
    packed.push_back(group);
    grids.push_back(grid);
    if (table.dim() == 2 || j == 0) tables.push_back(table);
  }
  return {at::cat(packed), at::cat(grids), at::cat(tables)};
}

Packed conv_prepack(const at::Tensor& codes, const at::Tensor& scale,
                    const OptionalTensor& zero_point, int64_t bits, at::IntArrayRef kernel_size,
                    int64_t groups, int64_t group_size, const OptionalTensor& levels) {
  TORCH_CHECK_VALUE(codes.dim() == 2, kOp, ": codes must be [N, K], got ", codes.sizes());
  TORCH_CHECK_VALUE(kernel_size[0] > 0 && kernel_size[1] > 0, kOp,
                    ": kernel_size must be positive, got ", kernel_size);
  const Extent kernel{kernel_size[0], kernel_size[1]};
  const int64_t columns = codes.size(1);
  TORCH_CHECK_VALUE(columns > 0 && columns % kernel.area() == 0, kOp, ": codes must be [N, C * ",
                    kernel.area(), "], got ", codes.sizes());
  TORCH_CHECK_VALUE(groups > 0 && codes.size(0) % groups == 0, kOp,
                    ": groups must divide N=", codes.size(0), ", got ", groups);
  TORCH_CHECK_VALUE(!levels.has_value() || levels->dim() != 2 || levels->size(0) == codes.size(0),
                    kOp, ": levels must be [2^bits] or [N, 2^bits], got ", levels->sizes());
  if (is_depthwise(groups, columns, kernel.area(), group_size)) {
    pack_group(codes, scale, zero_point, bits, group_size, levels);  // for its checks
    const at::Tensor zero = zero_point.has_value()
                                ? zero_point->contiguous()
                                : at::full_like(scale, static_cast<double>(1 << (bits - 1)));
    return pack_depthwise(codes.contiguous(), scale.contiguous(), zero.contiguous(), bits, kernel,
                          levels);
  }
  if (kernel.area() == 1)
    return pack_groups(codes, scale, zero_point, bits, groups, group_size, levels);
  const std::vector<int64_t> order = gathered_columns(columns, kernel.area(), group_size);
  const at::Tensor index = at::tensor(order, codes.options().dtype(at::kLong));
  return pack_groups(codes.index_select(1, index), scale, zero_point, bits, groups, group_size,
                     levels);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "conv_prepack(Tensor codes, Tensor scale, Tensor? zero_point=None, *, int bits, "
      "int[2] kernel_size, int groups=1, int group_size=0, Tensor? levels=None) "
      "-> (Tensor packed, Tensor grid, Tensor levels)");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) { m.impl("conv_prepack", conv_prepack); }

}  // namespace torchquant
