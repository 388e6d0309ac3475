// Codes of the nearest level, ties to the lower, and the way back.
#include <csrc/quantizers/subset.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/core/DeviceGuard.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/core/parallel.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

namespace torchquant {
namespace {

constexpr int64_t kElementsPerChunk = 1 << 15;  // float32 copies of half types stay in L2

void check_levels(const char* op, const at::Tensor& x, const at::Tensor& levels, int64_t axis) {
  TORCH_CHECK_TYPE(levels.scalar_type() == at::kFloat, op, ": levels must be float32, got ",
                   levels.scalar_type());
  TORCH_CHECK_VALUE((levels.dim() == 1 || levels.dim() == 2) && levels.size(-1) >= 1 &&
                        levels.size(-1) <= kSubsetMaxLevels,
                    op, ": levels must be [L] or [C, L] with L = 1 .. ", kSubsetMaxLevels, ", got ",
                    levels.sizes());
  check_same_device(op, "levels", levels, x);
  if (levels.dim() == 1) return;
  TORCH_CHECK_VALUE(axis >= -x.dim() && axis < x.dim() && x.size(axis) == levels.size(0), op,
                    ": levels of shape ", levels.sizes(), " need C channels along axis ", axis,
                    ", got ", x.sizes());
}

SubsetChannels layout_of(const at::Tensor& x, const at::Tensor& levels, int64_t axis) {
  if (levels.dim() == 1 || levels.size(0) == 1) return {1, 1};
  int64_t inner = 1;
  for (int64_t d = x.dim() - 1; d > (axis < 0 ? axis + x.dim() : axis); --d) inner *= x.size(d);
  return {inner, levels.size(0)};
}

// Calls run(first, count) on chunks of elements.
template <class Run>
void for_element_chunks(const at::Tensor& x, const Run& run) {
  const int64_t count = x.numel();
  if (x.is_cuda()) return run(int64_t{0}, count);
  for_each_chunk((count + kElementsPerChunk - 1) / kElementsPerChunk, [&](int64_t chunk) {
    const int64_t first = chunk * kElementsPerChunk;
    run(first, std::min(kElementsPerChunk, count - first));
  });
}

bool has_table(const float* levels, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float units = levels[i] * kSubsetUnit;
    if (!(std::abs(units) <= kSubsetUnit) || units != std::trunc(units)) return false;
  }
  return true;
}

// What the CPU leaf needs of the levels.
struct Lookup {
  std::vector<float> thresholds;
  std::vector<uint8_t> tables;  // empty: there are few levels, or they are no multiples of 2^-10
};

void fill_table(const float* thresholds, int64_t number, uint8_t* table) {
  int64_t below = 0;
  for (int32_t i = 0; i < kSubsetTable; ++i) {
    const float end = static_cast<float>(i - kSubsetTable / 2 + 1) / (2 * kSubsetUnit);
    while (below < number && end > thresholds[below]) ++below;
    table[i] = static_cast<uint8_t>(below);
  }
}

Lookup lookup_of(const char* op, const at::Tensor& levels) {  // [C * L] on the CPU, contiguous
  const int64_t count = levels.size(-1), channels = levels.numel() / count, number = count - 1;
  const float* const first = levels.const_data_ptr<float>();
  Lookup lookup;
  lookup.thresholds.resize(static_cast<size_t>(channels * number));
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < number; ++i) {
      const float* pair = first + c * count + i;
      TORCH_CHECK_VALUE(pair[0] <= pair[1], op, ": levels must rise, got ", pair[0], " before ",
                        pair[1]);
      lookup.thresholds[static_cast<size_t>(c * number + i)] = threshold_between(pair[0], pair[1]);
    }
  }
  if (number <= kSubsetMaxCounted || !has_table(first, levels.numel())) return lookup;
  lookup.tables.resize(static_cast<size_t>(channels * kSubsetTable));
  for (int64_t c = 0; c < channels; ++c)
    fill_table(lookup.thresholds.data() + c * number, number,
               lookup.tables.data() + c * kSubsetTable);
  return lookup;
}

at::Tensor subset_quantize(const at::Tensor& x, const at::Tensor& levels, int64_t axis) {
  const char* op = "subset_quantize";
  check_device(op, x);
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, op,
                   ": x must be float32, float16 or bfloat16, got ", type);
  check_levels(op, x, levels, axis);
  check_finite(op, "levels", levels);
  check_finite(op, "x", x);

  const c10::DeviceGuard guard(x.device());
  const at::Tensor codes = at::empty(x.sizes(), x.options().dtype(at::kByte));
  if (x.numel() == 0) return codes;
  const at::Tensor flat = x.contiguous().view(-1), table = levels.contiguous();
  const Lookup lookup = x.is_cuda() ? Lookup{} : lookup_of(op, table);
  for_element_chunks(x, [&](int64_t first, int64_t count) {
    const at::Tensor part = flat.narrow(0, first, count).to(at::kFloat);
    const SubsetEncode work{part.const_data_ptr<float>(),
                            first,
                            count,
                            layout_of(x, levels, axis),
                            table.const_data_ptr<float>(),
                            table.size(-1),
                            lookup.thresholds.data(),
                            lookup.tables.empty() ? nullptr : lookup.tables.data(),
                            codes.mutable_data_ptr<uint8_t>() + first};
    TORCHQUANT_RUN(subset_encode, x, work);
  });
  return codes;
}

at::Tensor subset_dequantize(const at::Tensor& codes, const at::Tensor& levels, int64_t axis) {
  const char* op = "subset_dequantize";
  check_device(op, codes);
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kByte, op, ": codes must be uint8, got ",
                   codes.scalar_type());
  check_levels(op, codes, levels, axis);

  const c10::DeviceGuard guard(codes.device());
  const at::Tensor out = at::empty(codes.sizes(), codes.options().dtype(at::kFloat));
  if (codes.numel() == 0) return out;
  // A code without a level is NaN.
  const int64_t count = levels.size(-1), channels = levels.numel() / count;
  const at::Tensor values = at::full({channels, kSubsetMaxLevels},
                                     std::numeric_limits<float>::quiet_NaN(), out.options());
  values.narrow(1, 0, count).copy_(levels.reshape({channels, count}));
  const at::Tensor flat = codes.contiguous();
  for_element_chunks(codes, [&](int64_t first, int64_t here) {
    const SubsetDecode work{flat.const_data_ptr<uint8_t>() + first,
                            first,
                            here,
                            layout_of(codes, levels, axis),
                            values.const_data_ptr<float>(),
                            out.mutable_data_ptr<float>() + first};
    TORCHQUANT_RUN(subset_decode, codes, work);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def("subset_quantize(Tensor x, Tensor levels, *, int axis=-1) -> Tensor");
  m.def("subset_dequantize(Tensor codes, Tensor levels, *, int axis=-1) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("subset_quantize", subset_quantize);
  m.impl("subset_dequantize", subset_dequantize);
}
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) {
  m.impl("subset_quantize", subset_quantize);
  m.impl("subset_dequantize", subset_dequantize);
}
#endif

}  // namespace torchquant
