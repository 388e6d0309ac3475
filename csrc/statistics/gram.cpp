// Gram matrices: activations -> x^T x, all that a solver needs to know of them; of convolutions,
// the Gram of the patches. ATen products alone, so one source serves every device and there is no
// leaf.
#include <ATen/Context.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/triu.h>
#include <ATen/ops/zeros.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/core/parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <vector>

namespace torchquant {
namespace {

// float32 copies of a chunk of tokens (and of patches, twice that) stay below this.
constexpr int64_t kChunkBytes = 32 << 20;
// A BLAS adds the products of a small matrix to its result one by one: a million tokens in float32
// lost 0.05 % of the diagonal, three million 0.25 % (16 columns and more: 2e-6, they are summed in
// blocks). So small products are made in blocks of tokens, apart from the running total.
constexpr int64_t kTokensPerSum = 4096;
constexpr int64_t kSmallProduct = 32;
constexpr int64_t kCrossStrip = 256;

// Narrow strips waste less of the diagonal blocks, wide ones reuse x more. Measured: 96 of
// (32..256) is best at K = 384, 128 at 768, 192 at 1536, and 192 or 256 at 4096.
int64_t strip_width(int64_t columns) { return columns <= 512 ? 96 : columns <= 1024 ? 128 : 192; }

// Longest strip, shortest, second longest, second shortest ...: neighbours are about the same work.
int64_t balanced(int64_t i, int64_t count) { return i % 2 == 0 ? i / 2 : count - 1 - i / 2; }

// See Note [thread-independent codes]. A device's products already run on its own stream.
template <class Task>
void for_each_tile(const at::Tensor& tensor, int64_t count, const Task& task) {
  if (tensor.is_cpu()) return for_each_chunk(count, task);
  for (int64_t i = 0; i < count; ++i) task(i);
}

// total += left^T right
void add_product(const at::Tensor& total, const at::Tensor& left, const at::Tensor& right) {
  if (std::min(left.size(1), right.size(1)) < kSmallProduct) {
    total.add_(at::mm(left.t(), right));
  } else {
    total.addmm_(left.t(), right);
  }
}

void add_strip(const at::Tensor& gram, const at::Tensor& x, int64_t first, int64_t width) {
  const int64_t rest = gram.size(1) - first;
  const at::Tensor strip = gram.narrow(0, first, width).narrow(1, first, rest);
  for (int64_t token = 0; token < x.size(0); token += kTokensPerSum) {
    const at::Tensor block = x.narrow(0, token, std::min(kTokensPerSum, x.size(0) - token));
    add_product(strip, block.narrow(1, first, width), block.narrow(1, first, rest));
  }
}

void mirror_strip(const at::Tensor& gram, int64_t first, int64_t width) {
  const at::Tensor block = gram.narrow(0, first, width).narrow(1, first, width);
  block.copy_(at::triu(block).add_(at::triu(block, 1).t()));
  const int64_t below = first + width, rest = gram.size(1) - below;
  if (rest == 0) return;
  // Through contiguous copies: ATen transposes those in blocks, a strided copy would miss the cache
  // at every element.
  const at::Tensor right = gram.narrow(0, first, width).narrow(1, below, rest).contiguous();
  gram.narrow(0, below, rest).narrow(1, first, width).copy_(right.t().contiguous());
}

// Calls task(one Gram, its index, first column, width) for strips that cover [B, K, K].
template <class Task>
void for_each_strip(const at::Tensor& gram, const Task& task) {
  const int64_t columns = gram.size(1), width = strip_width(columns);
  const int64_t strips = (columns + width - 1) / width;
  for_each_tile(gram, gram.size(0) * strips, [&](int64_t tile) {
    const int64_t first = balanced(tile % strips, strips) * width, b = tile / strips;
    task(gram.select(0, b), b, first, std::min(width, columns - first));
  });
}

// gram[b] += x[b]^T x[b]. Half the work by symmetry: only the upper triangle is computed and read;
// mirror() makes the lower one when all tokens are in.
void accumulate_gram(const at::Tensor& gram,  // [B, K, K] contiguous, float32 | float64
                     const at::Tensor& x) {   // [B, M, K] of gram's dtype; unit stride in M or in K
  const at::NoTF32Guard no_tf32;
  for_each_strip(gram, [&](const at::Tensor& one, int64_t b, int64_t first, int64_t width) {
    add_strip(one, x.select(0, b), first, width);
  });
}

void mirror(const at::Tensor& gram) {
  for_each_strip(gram, [&](const at::Tensor& one, int64_t, int64_t first, int64_t width) {
    mirror_strip(one, first, width);
  });
}

void check_statistic(const char* op, const char* argument, const at::Tensor& gram, int64_t rows,
                     int64_t columns) {
  TORCH_CHECK_TYPE(gram.scalar_type() == at::kFloat || gram.scalar_type() == at::kDouble, op, ": ",
                   argument, " must be float32 or float64, got ", gram.scalar_type());
  TORCH_CHECK_VALUE(gram.dim() == 2, op, ": ", argument, " must be a matrix [", rows, ", ", columns,
                    "], got ", gram.sizes());
}

void check_activations(const char* op, const char* argument, const at::Tensor& x,
                       const at::Tensor& gram, int64_t columns) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, op, ": ",
                   argument, " must be float32, float16 or bfloat16, got ", type);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == columns, op, ": ", argument,
                    " must have K=", columns, " columns, got ", x.sizes());
  check_same_device(op, argument, x, gram);
}

int64_t tokens_per_chunk(int64_t columns) {
  return std::clamp<int64_t>(kChunkBytes / (4 * std::max<int64_t>(columns, 1)), 64, kTokensPerSum);
}

// Rows first .. of [M, K], at most count of them, as a contiguous matrix of gram's dtype. A single
// row or column is contiguous at any stride, which a BLAS call would depend on.
at::Tensor chunk_of(const at::Tensor& x, int64_t first, int64_t count, const at::Tensor& gram) {
  const at::Tensor rows = x.narrow(0, first, std::min(count, x.size(0) - first));
  return rows.to(gram.scalar_type()).contiguous().view(-1).view(rows.sizes());
}

void gram_accumulate_(const at::Tensor& gram,  // [K, K]
                      const at::Tensor& x) {   // [..., K]
  const char* op = "gram_accumulate_";
  check_device(op, gram);
  const int64_t columns = gram.dim() > 0 ? gram.size(-1) : 1;
  check_statistic(op, "gram", gram, columns, columns);
  TORCH_CHECK_VALUE(gram.size(0) == columns, op, ": gram must be square, got ", gram.sizes());
  check_activations(op, "x", x, gram, columns);
  if (x.numel() == 0) return;
  check_finite(op, "x", x);

  const at::Tensor tokens = x.reshape({-1, columns}), total = gram.contiguous();
  const int64_t step = tokens_per_chunk(columns);
  for (int64_t first = 0; first < tokens.size(0); first += step) {
    accumulate_gram(total.unsqueeze(0), chunk_of(tokens, first, step, gram).unsqueeze(0));
  }
  mirror(total.unsqueeze(0));
  if (!total.is_same(gram)) gram.copy_(total);
}

void cross_gram_accumulate_(const at::Tensor& cross,  // [Kx, Ky]
                            const at::Tensor& x,      // [..., Kx]
                            const at::Tensor& y) {    // [..., Ky]
  const char* op = "cross_gram_accumulate_";
  check_device(op, cross);
  check_statistic(op, "cross", cross, x.dim() > 0 ? x.size(-1) : 1, y.dim() > 0 ? y.size(-1) : 1);
  check_activations(op, "x", x, cross, cross.size(0));
  check_activations(op, "y", y, cross, cross.size(1));
  TORCH_CHECK_VALUE(x.sizes().slice(0, x.dim() - 1) == y.sizes().slice(0, y.dim() - 1), op,
                    ": x and y must have the same tokens, got ", x.sizes(), " and ", y.sizes());
  if (x.numel() == 0 || y.numel() == 0) return;
  check_finite(op, "x", x);
  check_finite(op, "y", y);

  const at::Tensor xs = x.reshape({-1, cross.size(0)}), ys = y.reshape({-1, cross.size(1)}),
                   total = cross.contiguous();
  const int64_t step = tokens_per_chunk(std::max(cross.size(0), cross.size(1)));
  const at::NoTF32Guard no_tf32;
  for (int64_t first = 0; first < xs.size(0); first += step) {
    const at::Tensor left = chunk_of(xs, first, step, cross),
                     right = chunk_of(ys, first, step, cross);
    for_each_tile(total, (cross.size(0) + kCrossStrip - 1) / kCrossStrip, [&](int64_t tile) {
      const int64_t column = tile * kCrossStrip,
                    width = std::min(kCrossStrip, cross.size(0) - column);
      add_product(total.narrow(0, column, width), left.narrow(1, column, width), right);
    });
  }
  if (!total.is_same(cross)) cross.copy_(total);
}

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

// The input on which a plain convolution with the given kernel and dilation, unpadded, makes the
// same patches. A transposed convolution becomes a plain one of stride 1 on the input with stride -
// 1 zeros inserted between its elements.
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

// Output positions along each spatial dimension of the padded input.
std::vector<int64_t> output_sizes(const at::Tensor& padded, const ConvShape& conv) {
  std::vector<int64_t> sizes;
  for (size_t d = 0; d < conv.kernel.size(); ++d) {
    const int64_t room =
        padded.size(static_cast<int64_t>(d) + 2) - conv.dilation[d] * (conv.kernel[d] - 1);
    sizes.push_back(room < 1 ? 0 : (room - 1) / step_of(conv, d) + 1);
  }
  return sizes;
}

// x [B, C, *spatial] (padded) -> [groups, M, K], K = C / groups * prod(kernel): the patches whose
// first output coordinate is in first .. first + rows - 1.
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

std::vector<int64_t> per_dimension(const char* op, const char* argument, at::IntArrayRef values,
                                   size_t dimensions, int64_t least) {
  TORCH_CHECK_VALUE(values.size() == dimensions, op, ": ", argument,
                    " must have one entry per kernel dimension, got ", values);
  for (const int64_t value : values) {
    TORCH_CHECK_VALUE(value >= least, op, ": ", argument, " must be at least ", least, ", got ",
                      values);
  }
  return values.vec();
}

ConvShape parse_conv(const char* op, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                     at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                     bool transposed, at::IntArrayRef output_padding) {
  const size_t dimensions = kernel_size.size();
  TORCH_CHECK_VALUE(dimensions >= 1 && dimensions <= 3, op,
                    ": kernel_size must have 1, 2 or 3 entries, got ", kernel_size);
  TORCH_CHECK_VALUE(groups >= 1, op, ": groups must be at least 1, got ", groups);
  const std::vector<int64_t> zeros(dimensions, 0);
  return {per_dimension(op, "kernel_size", kernel_size, dimensions, 1),
          per_dimension(op, "stride", stride, dimensions, 1),
          per_dimension(op, "padding", padding, dimensions, 0),
          per_dimension(op, "dilation", dilation, dimensions, 1),
          per_dimension(op, "output_padding",
                        output_padding.empty() ? at::IntArrayRef(zeros) : output_padding,
                        dimensions, 0),
          groups,
          transposed};
}

void check_conv_input(const char* op, const at::Tensor& gram, const at::Tensor& x,
                      const ConvShape& conv) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, op,
                   ": x must be float32, float16 or bfloat16, got ", type);
  const int64_t dimensions = static_cast<int64_t>(conv.kernel.size());
  TORCH_CHECK_VALUE(x.dim() == dimensions + 2, op, ": x must be [B, C, ", dimensions,
                    " spatial dimensions], got ", x.sizes());
  TORCH_CHECK_VALUE(x.size(1) % conv.groups == 0, op,
                    ": the channels of x must split evenly among groups=", conv.groups, ", got ",
                    x.sizes());
  int64_t columns = x.size(1) / conv.groups;
  for (const int64_t k : conv.kernel) columns *= k;
  TORCH_CHECK_TYPE(gram.scalar_type() == at::kFloat || gram.scalar_type() == at::kDouble, op,
                   ": gram must be float32 or float64, got ", gram.scalar_type());
  const bool square = gram.dim() >= 2 && gram.size(-1) == columns && gram.size(-2) == columns;
  const bool grouped =
      gram.dim() == 3 ? gram.size(0) == conv.groups : gram.dim() == 2 && conv.groups == 1;
  TORCH_CHECK_VALUE(square && grouped, op,
                    ": gram must be [groups, K, K] with groups=", conv.groups, " and K=", columns,
                    ", got ", gram.sizes());
  check_same_device(op, "x", x, gram);
}

// Whole images while they fit the budget, else slices of one image's first spatial dimension.
void accumulate_image(const at::Tensor& total, const at::Tensor& padded, const ConvShape& conv) {
  const std::vector<int64_t> sizes = output_sizes(padded, conv);
  int64_t row_bytes = 4 * padded.size(0) * total.size(0) * total.size(1);
  for (size_t d = 1; d < sizes.size(); ++d) row_bytes *= sizes[d];
  const int64_t rows = std::max<int64_t>(1, 2 * kChunkBytes / std::max<int64_t>(row_bytes, 1));
  for (int64_t first = 0; first < sizes[0]; first += rows) {
    accumulate_gram(total, unfold_patches(padded, conv, first, std::min(rows, sizes[0] - first)));
  }
}

void conv_gram_accumulate_(const at::Tensor& gram,  // [groups, K, K], or [K, K] when groups = 1
                           const at::Tensor& x,     // [B, C, *spatial]
                           at::IntArrayRef kernel_size, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                           bool transposed, at::IntArrayRef output_padding) {
  const char* op = "conv_gram_accumulate_";
  check_device(op, gram);
  const ConvShape conv =
      parse_conv(op, kernel_size, stride, padding, dilation, groups, transposed, output_padding);
  check_conv_input(op, gram, x, conv);
  if (x.numel() == 0) return;
  check_finite(op, "x", x);

  const std::vector<int64_t> sizes = output_sizes(padded_input(x.narrow(0, 0, 1), conv), conv);
  int64_t image_bytes = 4 * x.size(1);
  for (size_t d = 0; d < sizes.size(); ++d) {
    TORCH_CHECK_VALUE(sizes[d] > 0, op,
                      ": the kernel must fit into the padded input, got kernel_size ", kernel_size,
                      " and x ", x.sizes());
    image_bytes *= conv.kernel[d] * sizes[d];
  }
  const at::Tensor contiguous = gram.contiguous();
  const at::Tensor total = contiguous.dim() == 2 ? contiguous.unsqueeze(0) : contiguous;
  const int64_t images = std::max<int64_t>(1, 2 * kChunkBytes / image_bytes);
  for (int64_t first = 0; first < x.size(0); first += images) {
    const at::Tensor part =
        x.narrow(0, first, std::min(images, x.size(0) - first)).to(gram.scalar_type());
    accumulate_image(total, padded_input(part, conv), conv);
  }
  mirror(total);
  if (!contiguous.is_same(gram)) gram.copy_(contiguous);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def("gram_accumulate_(Tensor(a!) gram, Tensor x) -> ()");
  m.def("cross_gram_accumulate_(Tensor(a!) cross, Tensor x, Tensor y) -> ()");
  m.def(
      "conv_gram_accumulate_(Tensor(a!) gram, Tensor x, *, int[] kernel_size, "
      "int[] stride, int[] padding, int[] dilation, int groups=1, "
      "bool transposed=False, int[] output_padding=[]) -> ()");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("gram_accumulate_", gram_accumulate_);
  m.impl("cross_gram_accumulate_", cross_gram_accumulate_);
  m.impl("conv_gram_accumulate_", conv_gram_accumulate_);
}
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) {
  m.impl("gram_accumulate_", gram_accumulate_);
  m.impl("cross_gram_accumulate_", cross_gram_accumulate_);
  m.impl("conv_gram_accumulate_", conv_gram_accumulate_);
}
#endif

}  // namespace torchquant
