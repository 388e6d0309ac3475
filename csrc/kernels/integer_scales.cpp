// Scales of groups moved to integer multiples of one unit for each row, which linear_prepack
// recognizes (Note [integer groups]): unit = max_g scale / limit, m = round(scale / unit).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/core/parallel.h>
#include <csrc/kernels/linear_multipliers.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

namespace torchquant {
namespace {

constexpr const char* kOp = "integer_group_scales";

struct ScaleRows {
  const uint8_t* codes;     // [N, K]
  const float* scale;       // [N, G]
  const float* zero_point;  // [N, G]
  int64_t columns;
  int64_t group_size;
  int64_t groups;
  int64_t bits;

  // Whether the values of a group depend on its scale.
  bool used(int64_t n, int64_t g) const {
    const uint8_t* const row = codes + n * columns;
    const int64_t end = std::min(columns, (g + 1) * group_size);
    const float zero = zero_point[n * groups + g];
    return std::any_of(row + g * group_size, row + end, [=](uint8_t code) { return code != zero; });
  }

  // False where a zero point leaves no multiplier.
  bool move(int64_t n, float* out) const {
    const float* const from = scale + n * groups;
    const auto limit = [&](int64_t g) {
      return multiplier_limit(bits, zero_point[n * groups + g]);
    };
    float unit = 0;
    for (int64_t g = 0; g < groups; ++g) {
      if (limit(g) < 1) return false;
      if (used(n, g)) unit = std::max(unit, from[g] / static_cast<float>(limit(g)));
    }
    for (int64_t g = 0; g < groups; ++g) {
      const double wanted = unit > 0 ? round_to_integer(static_cast<double>(from[g]) / unit) : 1;
      const double most = used(n, g) ? static_cast<double>(limit(g)) : 1;
      out[g] = (unit > 0 ? unit : 1.0f) * static_cast<float>(std::clamp(wanted, 1.0, most));
    }
    return true;
  }
};

at::Tensor integer_group_scales(const at::Tensor& codes, const at::Tensor& scale,
                                const at::Tensor& zero_point, int64_t bits, int64_t group_size) {
  check_device(kOp, codes);
  TORCH_CHECK_VALUE(bits >= 2 && bits <= 4, kOp, ": bits must be 2..4, got ", bits);
  TORCH_CHECK_VALUE(group_size >= 1, kOp, ": group_size must be positive, got ", group_size);
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kByte, kOp, ": codes must be uint8, got ",
                   codes.scalar_type());
  TORCH_CHECK_VALUE(codes.dim() == 2, kOp, ": codes must be [N, K], got ", codes.sizes());
  const int64_t rows = codes.size(0), groups = group_count(codes.size(1), group_size);
  for (const auto& [name, tensor] : {std::pair{"scale", scale}, {"zero_point", zero_point}}) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, kOp, ": ", name, " must be float32, got ",
                     tensor.scalar_type());
    check_same_device(kOp, name, tensor, codes);
    check_shape(kOp, name, tensor, {rows, groups});
    check_finite(kOp, name, tensor);
  }
  const at::Tensor own_codes = codes.cpu().contiguous(), own_scale = scale.cpu().contiguous();
  const at::Tensor own_zero = zero_point.cpu().contiguous(), moved = at::empty_like(own_scale);
  const ScaleRows all{own_codes.const_data_ptr<uint8_t>(),
                      own_scale.const_data_ptr<float>(),
                      own_zero.const_data_ptr<float>(),
                      codes.size(1),
                      group_size,
                      groups,
                      bits};
  float* const out = moved.mutable_data_ptr<float>();
  std::atomic<bool> fits{true};
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      if (!all.move(n, out + n * groups)) fits = false;
  });
  return fits ? moved.to(scale.device()) : scale.clone(at::MemoryFormat::Contiguous);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "integer_group_scales(Tensor codes, Tensor scale, Tensor zero_point, *, int bits, "
      "int group_size) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) { m.impl("integer_group_scales", integer_group_scales); }
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) { m.impl("integer_group_scales", integer_group_scales); }
#endif

}  // namespace torchquant
