// Self-attention whose projections and products all take codes.
#include <ATen/ops/empty.h>
#include <csrc/core/check.h>
#include <csrc/kernels/packed_layer.h>
#include <torch/library.h>

namespace torchquant {
namespace {

constexpr const char* kOp = "quantized_self_attention";

// One number for each of q, k and v.
at::Tensor joined(const char* argument, at::TensorList numbers) {
  TORCH_CHECK_VALUE(numbers.size() == 3, kOp, ": ", argument, " must be three, of q, k and v, got ",
                    numbers.size());
  at::Tensor three = at::empty({3}, at::kFloat);
  for (size_t i = 0; i < 3; ++i) {
    TORCH_CHECK_VALUE(numbers[i].numel() == 1 && numbers[i].is_cpu(), kOp, ": ", argument,
                      " must be one number each on the CPU, got ", numbers[i].sizes(), " on ",
                      numbers[i].device());
    TORCH_CHECK_TYPE(numbers[i].scalar_type() == at::kFloat, kOp, ": ", argument,
                     " must be float32, got ", numbers[i].scalar_type());
    three.mutable_data_ptr<float>()[i] = *numbers[i].const_data_ptr<float>();
  }
  return three;
}

at::Tensor quantized_self_attention(const at::Tensor& x, at::TensorList qkv,
                                    at::IntArrayRef qkv_numbers, at::TensorList proj,
                                    at::IntArrayRef proj_numbers, at::TensorList scales,
                                    at::TensorList zero_points, int64_t bits,
                                    at::TensorList softmax, int64_t softmax_bits, int64_t num_heads,
                                    const OptionalTensor& mask, std::optional<double> scale,
                                    bool is_causal) {
  const PackedLayer in(kOp, "qkv", qkv, qkv_numbers), out(kOp, "proj", proj, proj_numbers);
  TORCH_CHECK_VALUE(x.dim() == 3, kOp, ": x must be [B, T, K], got ", x.sizes());
  TORCH_CHECK_VALUE(num_heads >= 1 && in.out_features() % (3 * num_heads) == 0, kOp,
                    ": num_heads must divide q, k and v of ", in.out_features(),
                    " features together, got ", num_heads);
  const size_t levels = softmax.size();
  TORCH_CHECK_VALUE(levels == 0 || levels == 2 || levels == 3, kOp,
                    ": softmax must be thresholds, exponents and eta, or scale and zero_point, or "
                    "nothing, got ",
                    levels, " tensors");
  const auto level = [&](size_t count, size_t i) {
    return levels == count ? OptionalTensor(softmax[i]) : std::nullopt;
  };
  const int64_t batch = x.size(0), tokens = x.size(1);
  const int64_t width = in.out_features() / (3 * num_heads);
  const at::Tensor codes =
      in.codes(x, joined("scales", scales), joined("zero_points", zero_points), bits)
          .view({batch, tokens, 3, num_heads, width})
          .permute({2, 0, 3, 1, 4});
  const at::Tensor mixed = quantized_attention(
      codes.select(0, 0), codes.select(0, 1), codes.select(0, 2), mask, level(3, 0), level(3, 1),
      level(3, 2), level(2, 0), level(2, 1), softmax_bits, scale, is_causal, scales[0],
      zero_points[0], bits, scales[1], zero_points[1], bits, scales[2], zero_points[2], bits,
      out.input_scale(), out.input_zero_point(), out.input_bits());
  return out(mixed.transpose(1, 2).reshape({batch, tokens, num_heads * width}));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "quantized_self_attention(Tensor x, Tensor[] qkv, int[] qkv_numbers, Tensor[] proj, "
      "int[] proj_numbers, Tensor[] scales, Tensor[] zero_points, int bits, Tensor[] softmax, "
      "int softmax_bits=8, *, int num_heads, Tensor? mask=None, float? scale=None, "
      "bool is_causal=False) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("quantized_self_attention", quantized_self_attention);
}

}  // namespace torchquant
