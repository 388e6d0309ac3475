// A transformer block with its norms ahead of attention and MLP: everything between its input and
// its output stays in the caches.
#include <ATen/ops/empty.h>
#include <ATen/ops/layer_norm.h>
#include <csrc/core/parallel.h>
#include <csrc/kernels/self_attention.h>
#include <torch/library.h>

#include <algorithm>

namespace torchquant {
namespace {

constexpr const char* kOp = "quantized_block";
constexpr int64_t kChunkTokens = 256;  // of the whole sequences that pass the block together

struct Norm {
  OptionalTensor weight, bias;
  double eps;

  // Codes where `layer` takes codes.
  at::Tensor operator()(const at::Tensor& x, const PackedLayer& layer) const {
    if (!layer.input_scale().has_value()) return at::layer_norm(x, {x.size(2)}, weight, bias, eps);
    return quantized_layer_norm(x, weight, bias, *layer.input_scale(), *layer.input_zero_point(),
                                layer.input_bits(), eps);
  }
};

struct Block {
  Norm norm1, norm2;
  SelfAttention attention;
  PackedLayer fc1, fc2;
  std::string_view activation;

  at::Tensor operator()(const at::Tensor& x, const OptionalTensor& out = std::nullopt) const {
    const at::Tensor y = attention(norm1(x, attention.first_layer()), std::nullopt, false, x);
    return fc2(fc1(norm2(y, fc1), {activation, &fc2}), {"none", nullptr, y, out});
  }
};

// Chunks of sequences are tasks of threads where each thread gets as many.
at::Tensor in_chunks(const Block& block, const at::Tensor& x) {
  const int64_t batch = x.size(0), threads = at::get_num_threads();
  const int64_t step = std::max<int64_t>(kChunkTokens / std::max<int64_t>(x.size(1), 1), 1);
  const int64_t chunks = (batch + step - 1) / step;
  if (chunks < 2 || chunks % threads != 0) return block(x);
  const at::Tensor y = at::empty(x.sizes(), x.options().requires_grad(false));
  for_each_chunk(chunks, [&](int64_t i) {
    const int64_t first = i * step, count = std::min(step, batch - first);
    block(x.narrow(0, first, count), y.narrow(0, first, count));
  });
  return y;
}

at::Tensor quantized_block(const at::Tensor& x, at::TensorList norms, at::ArrayRef<double> eps,
                           at::TensorList qkv, at::IntArrayRef qkv_numbers, at::TensorList proj,
                           at::IntArrayRef proj_numbers, at::TensorList scales,
                           at::TensorList zero_points, int64_t bits, at::TensorList softmax,
                           int64_t softmax_bits, at::TensorList fc1, at::IntArrayRef fc1_numbers,
                           at::TensorList fc2, at::IntArrayRef fc2_numbers, int64_t num_heads,
                           std::optional<double> scale, bool symmetric,
                           std::string_view activation) {
  TORCH_CHECK_VALUE(x.dim() == 3, kOp, ": x must be [B, T, K], got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, kOp, ": x must be float32, got ",
                   x.scalar_type());
  TORCH_CHECK_VALUE(norms.size() == 4 && eps.size() == 2, kOp,
                    ": norms must be weight and bias of two, with two eps, got ", norms.size(),
                    " tensors and ", eps.size(), " eps");
  const auto norm = [&](size_t i) {
    return Norm{given(norms[2 * i]), given(norms[2 * i + 1]), eps[i]};
  };
  const Block block{norm(0),
                    norm(1),
                    {kOp,
                     {qkv, qkv_numbers, proj, proj_numbers, scales, zero_points, bits, softmax,
                      softmax_bits, num_heads, scale, symmetric}},
                    {kOp, "fc1", fc1, fc1_numbers},
                    {kOp, "fc2", fc2, fc2_numbers},
                    activation};
  const int64_t columns = x.size(2);
  TORCH_CHECK_VALUE(
      block.attention.out_features() == columns && block.fc2.out_features() == columns, kOp,
      ": proj and fc2 must give the ", columns, " features of x, got ",
      block.attention.out_features(), " and ", block.fc2.out_features());
  return in_chunks(block, x);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "quantized_block(Tensor x, Tensor[] norms, float[] eps, Tensor[] qkv, int[] qkv_numbers, "
      "Tensor[] proj, int[] proj_numbers, Tensor[] scales, Tensor[] zero_points, int bits, "
      "Tensor[] softmax, int softmax_bits, Tensor[] fc1, int[] fc1_numbers, Tensor[] fc2, "
      "int[] fc2_numbers, *, int num_heads, float? scale=None, bool symmetric=False, "
      "str activation=\"gelu\") -> Tensor");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) { m.impl("quantized_block", quantized_block); }

}  // namespace torchquant
