#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/zeros.h>
#include <csrc/statistics/conv_patches.h>

#include <functional>
#include <numeric>

namespace torchquant {
namespace {

at::Tensor insert_zeros(const at::Tensor& x, const std::vector<int64_t>& stride) {
  std::vector<int64_t> sizes = x.sizes().vec();
  for (size_t d = 0; d < stride.size(); ++d) sizes[d + 2] = (sizes[d + 2] - 1) * stride[d] + 1;
  at::Tensor spread = at::zeros(sizes, x.options());
  at::Tensor kept = spread;
  for (size_t d = 0; d < stride.size(); ++d) {
    kept = kept.slice(static_cast<int64_t>(d) + 2, 0, sizes[d + 2], stride[d]);
  }
  kept.copy_(x);
  return spread;
}

int64_t step_of(const ConvShape& conv, size_t d) { return conv.transposed ? 1 : conv.stride[d]; }

}  // namespace

at::Tensor padded_input(const at::Tensor& x, const ConvShape& conv) {
  std::vector<int64_t> pads;  // last dimension first; negative = crop
  for (size_t d = conv.kernel.size(); d-- > 0;) {
    const int64_t reach = conv.dilation[d] * (conv.kernel[d] - 1);
    const int64_t before = conv.transposed ? reach - conv.padding[d] : conv.padding[d];
    pads.push_back(before);
    pads.push_back(conv.transposed ? before + conv.output_padding[d] : before);
  }
  return at::constant_pad_nd(conv.transposed ? insert_zeros(x, conv.stride) : x, pads, 0)
      .contiguous();
}

std::vector<int64_t> output_sizes(const at::Tensor& padded, const ConvShape& conv) {
  std::vector<int64_t> sizes;
  for (size_t d = 0; d < conv.kernel.size(); ++d) {
    const int64_t room =
        padded.size(static_cast<int64_t>(d) + 2) - conv.dilation[d] * (conv.kernel[d] - 1);
    sizes.push_back(room < 1 ? 0 : (room - 1) / step_of(conv, d) + 1);
  }
  return sizes;
}

at::Tensor unfold_patches(const at::Tensor& padded, const ConvShape& conv, int64_t first,
                          int64_t rows) {
  const int64_t channels = padded.size(1) / conv.groups;
  std::vector<int64_t> sizes = {conv.groups, channels};
  std::vector<int64_t> strides = {channels * padded.stride(1), padded.stride(1)};
  std::vector<int64_t> positions = output_sizes(padded, conv);
  positions[0] = rows;
  for (size_t d = 0; d < conv.kernel.size(); ++d) {
    sizes.push_back(conv.kernel[d]);
    strides.push_back(conv.dilation[d] * padded.stride(static_cast<int64_t>(d) + 2));
  }
  sizes.push_back(padded.size(0));
  strides.push_back(padded.stride(0));
  for (size_t d = 0; d < conv.kernel.size(); ++d) {
    sizes.push_back(positions[d]);
    strides.push_back(step_of(conv, d) * padded.stride(static_cast<int64_t>(d) + 2));
  }
  const int64_t offset = first * step_of(conv, 0) * padded.stride(2);
  const int64_t columns =
      std::accumulate(conv.kernel.begin(), conv.kernel.end(), channels, std::multiplies<>());
  // Positions are innermost in memory: long runs to copy, and a product reads its left operand
  // along them.
  const at::Tensor windows = padded.as_strided(sizes, strides, padded.storage_offset() + offset);
  return windows.reshape({conv.groups, columns, -1}).transpose(1, 2);
}

}  // namespace torchquant
