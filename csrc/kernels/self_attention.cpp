#include <csrc/kernels/self_attention.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <csrc/core/check.h>
#include <torch/library.h>

#include <array>
#include <tuple>

namespace torchquant {
namespace {

// One number for each of q, k and v.
at::Tensor joined(const char* op, const char* argument, at::TensorList numbers) {
  TORCH_CHECK_VALUE(numbers.size() == 3, op, ": ", argument, " must be three, of q, k and v, got ",
                    numbers.size());
  at::Tensor three = at::empty({3}, at::kFloat);
  for (size_t i = 0; i < 3; ++i) {
    TORCH_CHECK_VALUE(numbers[i].numel() == 1 && numbers[i].is_cpu(), op, ": ", argument,
                      " must be one number each on the CPU, got ", numbers[i].sizes(), " on ",
                      numbers[i].device());
    TORCH_CHECK_TYPE(numbers[i].scalar_type() == at::kFloat, op, ": ", argument,
                     " must be float32, got ", numbers[i].scalar_type());
    three.mutable_data_ptr<float>()[i] = *numbers[i].const_data_ptr<float>();
  }
  return three;
}

// Codes of one of q, k and v, and their grid: one number, or one for each token of a head.
struct Operand {
  at::Tensor codes, scale, zero_point;
};

using Operands = std::array<Operand, 3>;

// [B, T, 3 * heads * D] -> q, k or v of every head, [B, heads, T, D].
at::Tensor heads_of(const at::Tensor& qkv, int64_t num_heads, int64_t which) {
  const int64_t width = qkv.size(2) / (3 * num_heads);
  return qkv.view({qkv.size(0), qkv.size(1), 3, num_heads, width})
      .permute({2, 0, 3, 1, 4})
      .select(0, which);
}

Operands on_given_grids(const char* op, const SelfAttention::Arguments& a, const PackedLayer& layer,
                        const at::Tensor& x) {
  const at::Tensor codes = layer.codes(x, joined(op, "scales", a.scales),
                                       joined(op, "zero_points", a.zero_points), a.bits);
  Operands operands;
  for (size_t i = 0; i < 3; ++i) {
    operands[i] = {heads_of(codes, a.num_heads, static_cast<int64_t>(i)), a.scales[i],
                   a.zero_points[i]};
  }
  return operands;
}

Operands on_grids_of_tokens(const SelfAttention::Arguments& a, const PackedLayer& layer,
                            const at::Tensor& x) {
  using Quantize = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, int64_t, c10::string_view, int64_t, int64_t, bool);
  static const auto quantize = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("torchquant::dynamic_quantize", "")
                                   .typed<Quantize>();
  const at::Tensor values = layer(x);
  Operands operands;
  for (size_t i = 0; i < 3; ++i) {
    const at::Tensor heads = heads_of(values, a.num_heads, static_cast<int64_t>(i));
    const auto [codes, scale, zero_point] =
        quantize.call(heads, a.bits, "token", -1, 0, a.symmetric);
    operands[i] = {codes, scale, zero_point};
  }
  return operands;
}

}  // namespace

SelfAttention::SelfAttention(const char* op, const Arguments& arguments)
    : op_(op),
      arguments_(arguments),
      in_(op, "qkv", arguments.qkv, arguments.qkv_numbers),
      out_(op, "proj", arguments.proj, arguments.proj_numbers) {
  const int64_t num_heads = arguments.num_heads;
  TORCH_CHECK_VALUE(num_heads >= 1 && in_.out_features() % (3 * num_heads) == 0, op,
                    ": num_heads must divide q, k and v of ", in_.out_features(),
                    " features together, got ", num_heads);
  const size_t levels = arguments.softmax.size();
  TORCH_CHECK_VALUE(levels == 0 || levels == 2 || levels == 3, op,
                    ": softmax must be thresholds, exponents and eta, or scale and zero_point, or "
                    "nothing, got ",
                    levels, " tensors");
}

at::Tensor SelfAttention::operator()(const at::Tensor& x, const OptionalTensor& mask,
                                     bool is_causal, const OptionalTensor& residual) const {
  TORCH_CHECK_VALUE(x.dim() == 3, op_, ": x must be [B, T, K], got ", x.sizes());
  const Arguments& a = arguments_;
  const auto level = [&](size_t count, size_t i) {
    return a.softmax.size() == count ? OptionalTensor(a.softmax[i]) : std::nullopt;
  };
  const auto [q, k, v] = a.scales.empty() && a.zero_points.empty() ? on_grids_of_tokens(a, in_, x)
                                                                   : on_given_grids(op_, a, in_, x);
  const at::Tensor mixed = quantized_attention(
      q.codes, k.codes, v.codes, mask, level(3, 0), level(3, 1), level(3, 2), level(2, 0),
      level(2, 1), a.softmax_bits, a.scale, is_causal, q.scale, q.zero_point, a.bits, k.scale,
      k.zero_point, a.bits, v.scale, v.zero_point, a.bits, out_.input_scale(),
      out_.input_zero_point(), out_.input_bits());
  const at::Tensor tokens =
      mixed.transpose(1, 2).reshape({x.size(0), x.size(1), in_.out_features() / 3});
  return out_(tokens, {"none", nullptr, residual});
}

namespace {

at::Tensor quantized_self_attention(const at::Tensor& x, at::TensorList qkv,
                                    at::IntArrayRef qkv_numbers, at::TensorList proj,
                                    at::IntArrayRef proj_numbers, at::TensorList scales,
                                    at::TensorList zero_points, int64_t bits,
                                    at::TensorList softmax, int64_t softmax_bits, int64_t num_heads,
                                    const OptionalTensor& mask, std::optional<double> scale,
                                    bool is_causal, bool symmetric) {
  const SelfAttention attention("quantized_self_attention",
                                {qkv, qkv_numbers, proj, proj_numbers, scales, zero_points, bits,
                                 softmax, softmax_bits, num_heads, scale, symmetric});
  return attention(x, mask, is_causal);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "quantized_self_attention(Tensor x, Tensor[] qkv, int[] qkv_numbers, Tensor[] proj, "
      "int[] proj_numbers, Tensor[] scales, Tensor[] zero_points, int bits, Tensor[] softmax, "
      "int softmax_bits=8, *, int num_heads, Tensor? mask=None, float? scale=None, "
      "bool is_causal=False, bool symmetric=False) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("quantized_self_attention", quantized_self_attention);
}

}  // namespace torchquant
