// Convolutions as matrix products: the patches of the input, one row per output position.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace torchquant {

// A convolution seen as a matrix product: outputs[m, n] = sum_k patches[m, k] weight[n, k].
struct ConvShape {
  std::vector<int64_t> kernel;
  std::vector<int64_t> stride;
  std::vector<int64_t> padding;
  std::vector<int64_t> dilation;
  std::vector<int64_t> output_padding;
  int64_t groups;
  bool transposed;
};

// The input on which a plain convolution with the given kernel and dilation, unpadded, makes the
// same patches. A transposed convolution becomes a plain one of stride 1 on the input with stride -
// 1 zeros inserted between its elements.
at::Tensor padded_input(const at::Tensor& x, const ConvShape& conv);

// x [B, C, *spatial] (padded) -> [groups, M, K], K = C / groups * prod(kernel): the patches whose
// first output coordinate is in first .. first + rows - 1.
at::Tensor unfold_patches(const at::Tensor& padded, const ConvShape& conv, int64_t first,
                          int64_t rows);

// Output positions along each spatial dimension of the padded input.
std::vector<int64_t> output_sizes(const at::Tensor& padded, const ConvShape& conv);

}  // namespace torchquant
