// Values of codes, value = (code - zero_point) * scale, and how far they move a layer's output.
#include <ATen/Context.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/core/gram_problem.h>
#include <csrc/core/quantization.h>
#include <torch/library.h>

namespace torchquant {
namespace {

constexpr int64_t kRowsPerChunk = 96;

void check_quantization(const char* op, const Quantization& q, int64_t group_size) {
  TORCH_CHECK_VALUE(q.codes.dim() == 2, op, ": codes must be a matrix [N, K], got shape ",
                    q.codes.sizes());
  TORCH_CHECK_TYPE(q.codes.scalar_type() == at::kByte, op, ": codes must be uint8, got ",
                   q.codes.scalar_type());
  check_group_size(op, group_size);
  const int64_t groups = group_count(q.codes.size(1), group_size);
  check_shape(op, "scale", q.scale, {q.codes.size(0), groups});
  check_shape(op, "zero_point", q.zero_point, {q.codes.size(0), groups});
  check_same_device(op, "scale", q.scale, q.codes);
  check_same_device(op, "zero_point", q.zero_point, q.codes);
}

at::Tensor dequantize(const at::Tensor& codes,       // uint8 [N, K]
                      const at::Tensor& scale,       // [N, G]
                      const at::Tensor& zero_point,  // [N, G]
                      int64_t group_size) {
  const char* op = "dequantize";
  check_device(op, codes);
  const Quantization q{codes, scale.to(at::kFloat), zero_point.to(at::kFloat)};
  check_quantization(op, q, group_size);
  return values_of(q, group_size).contiguous();
}

at::Tensor quantization_error(const at::Tensor& weight, const at::Tensor& gram,
                              const at::Tensor& codes, const at::Tensor& scale,
                              const at::Tensor& zero_point, int64_t group_size) {
  const char* op = "quantization_error";
  check_device(op, weight);
  const c10::DeviceGuard guard(weight.device());
  const at::NoTF32Guard no_tf32;
  const GramProblem p = gram_problem(op, weight, gram);
  check_shape(op, "codes", codes, weight.sizes());
  check_same_device(op, "codes", codes, weight);
  const Quantization q{codes, scale.to(at::kFloat), zero_point.to(at::kFloat)};
  check_quantization(op, q, group_size);
  const at::Tensor error = values_of(q, group_size).view(p.weight.sizes()).sub(p.weight);
  at::Tensor result = at::empty({p.weight.size(0), p.weight.size(1)}, error.options());
  for_each_part(error, kRowsPerChunk, [&](const Part& part) {
    const at::Tensor e = part.rows(error);
    part.rows(result).copy_(at::bmm(e, part.problems(p.gram)).mul_(e).sum(-1));
  });
  return result.mul_(1.0 / p.unit).view({-1});
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def("dequantize(Tensor codes, Tensor scale, Tensor zero_point, *, int group_size=0) -> Tensor");
  m.def(
      "quantization_error(Tensor weight, Tensor gram, Tensor codes, Tensor scale, Tensor "
      "zero_point, *, int group_size=0) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("dequantize", dequantize);
  m.impl("quantization_error", quantization_error);
}
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) {
  m.impl("dequantize", dequantize);
  m.impl("quantization_error", quantization_error);
}
#endif

}  // namespace torchquant
