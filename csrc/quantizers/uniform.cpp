// Uniform quantizers of activations: codes and values on given grids.
#include <csrc/quantizers/uniform.h>

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/core/parallel.h>
#include <csrc/quantizers/uniform_activations.h>
#include <torch/library.h>

#include <utility>
#include <vector>

namespace torchquant {
namespace {

// Grids laid out for the leaf, with the tensors that own their memory.
struct Layout {
  int64_t rows;
  int64_t columns;
  int64_t group_size;
  int64_t row_stride;
  at::Tensor scale;
  at::Tensor zero_point;

  UniformGrids part(int64_t first, int64_t count) const {
    return {count,
            columns,
            group_size,
            row_stride,
            scale.const_data_ptr<float>() + first * row_stride,
            zero_point.const_data_ptr<float>() + first * row_stride};
  }
};

void check_grids(const char* op, const at::Tensor& x, const at::Tensor& scale,
                 const at::Tensor& zero_point) {
  for (const auto& [name, tensor] : {std::pair{"scale", &scale}, {"zero_point", &zero_point}}) {
    TORCH_CHECK_TYPE(tensor->scalar_type() == at::kFloat, op, ": ", name, " must be float32, got ",
                     tensor->scalar_type());
    check_same_device(op, name, *tensor, x);
    check_finite(op, name, *tensor);
  }
  check_shape(op, "zero_point", zero_point, scale.sizes());
  const bool positive =
      scale.numel() == 1 ? scale.item<float>() > 0 : scale.gt(0).all().item<bool>();
  TORCH_CHECK_VALUE(positive, op, ": scale must be positive, got ", scale.min().item<float>());
}

int64_t rows_of(const at::Tensor& x) { return x.numel() / std::max<int64_t>(x.size(-1), 1); }

// scale [..., G] of x [..., K], or [G] for every row.
Layout layout_of_groups(const char* op, const at::Tensor& x, const at::Tensor& scale,
                        const at::Tensor& zero_point, int64_t group_size) {
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x must have a last dimension to group, got ", x.sizes());
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = group_count(x.size(-1), group_size);
  const bool shared = scale.dim() == 1 && scale.size(0) == shape.back();
  TORCH_CHECK_VALUE(shared || scale.sizes() == shape, op, ": scale must have shape ",
                    at::IntArrayRef(shape), " or [", shape.back(), "] for groups of ", group_size,
                    ", got ", scale.sizes());
  return {rows_of(x),         x.size(-1),
          group_size,         shared ? 0 : shape.back(),
          scale.contiguous(), zero_point.contiguous()};
}

// scale [C] along axis: element by element along the last axis, else one grid a run.
Layout layout_of_channels(const char* op, const at::Tensor& x, const at::Tensor& scale,
                          const at::Tensor& zero_point, int64_t axis) {
  TORCH_CHECK_VALUE(axis >= -x.dim() && axis < x.dim() && x.size(axis) == scale.size(0), op,
                    ": scale of shape ", scale.sizes(), " needs as many channels of x along axis ",
                    axis, ", got ", x.sizes());
  const int64_t channels = scale.size(0), last = axis < 0 ? axis + x.dim() : axis;
  int64_t outer = 1, inner = 1;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (d < last) outer *= x.size(d);
    if (d > last) inner *= x.size(d);
  }
  if (inner == 1) return {outer, channels, 1, 0, scale.contiguous(), zero_point.contiguous()};
  const auto repeated = [&](const at::Tensor& t) {
    return t.expand({outer, channels}).contiguous();
  };
  return {outer * channels,    inner, std::max<int64_t>(inner, 1), 1, repeated(scale),
          repeated(zero_point)};
}

// scale of x's rank: one grid a row where it does not vary along the last dimension.
Layout layout_of_broadcast(const at::Tensor& x, const at::Tensor& scale,
                           const at::Tensor& zero_point) {
  const int64_t columns = x.size(-1);
  const bool per_row = scale.size(-1) == 1;
  std::vector<int64_t> shape = x.sizes().vec();
  if (per_row) shape.back() = 1;
  const auto expanded = [&](const at::Tensor& t) { return t.expand(shape).contiguous(); };
  return {rows_of(x),
          columns,
          per_row ? std::max<int64_t>(columns, 1) : 1,
          per_row ? 1 : columns,
          expanded(scale),
          expanded(zero_point)};
}

bool broadcasts_to(const at::Tensor& scale, const at::Tensor& x) {
  if (scale.dim() != x.dim()) return false;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (scale.size(d) != 1 && scale.size(d) != x.size(d)) return false;
  }
  return true;
}

Layout layout_of(const char* op, const at::Tensor& x, const at::Tensor& scale,
                 const at::Tensor& zero_point, int64_t axis, int64_t group_size) {
  check_group_size(op, group_size);
  check_grids(op, x, scale, zero_point);
  if (group_size > 0) return layout_of_groups(op, x, scale, zero_point, group_size);
  if (scale.dim() == 0 || scale.sizes() == at::IntArrayRef{1}) {
    const int64_t columns = x.dim() == 0 ? 1 : x.size(-1);
    return {x.dim() == 0 ? 1 : rows_of(x),
            columns,
            std::max<int64_t>(columns, 1),
            0,
            scale.contiguous(),
            zero_point.contiguous()};
  }
  if (scale.dim() == 1) return layout_of_channels(op, x, scale, zero_point, axis);
  TORCH_CHECK_VALUE(broadcasts_to(scale, x), op,
                    ": scale must be [], [C] or of x's rank and broadcast to x, got ",
                    scale.sizes(), " for x ", x.sizes());
  return layout_of_broadcast(x, scale, zero_point);
}

// Calls run(first row, rows) on chunks of rows.
template <class Run>
void for_row_chunks(const at::Tensor& x, const Layout& layout, const Run& run) {
  if (x.is_cuda()) return run(0, layout.rows);
  const int64_t step =
      std::max<int64_t>(kActivationsPerChunk / std::max<int64_t>(layout.columns, 1), 1);
  for_each_chunk((layout.rows + step - 1) / step, [&](int64_t chunk) {
    run(chunk * step, std::min(step, layout.rows - chunk * step));
  });
}

}  // namespace

void check_activation_type(const char* op, const at::Tensor& x) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, op,
                   ": x must be float32, float16 or bfloat16, got ", type);
}

at::Tensor uniform_quantize(const at::Tensor& x, const at::Tensor& scale,
                            const at::Tensor& zero_point, int64_t bits, int64_t axis,
                            int64_t group_size) {
  const char* op = "uniform_quantize";
  check_device(op, x);
  check_bits(op, bits);
  check_activation_type(op, x);
  check_finite(op, "x", x);
  const c10::DeviceGuard guard(x.device());
  const Layout layout = layout_of(op, x, scale, zero_point, axis, group_size);
  const at::Tensor codes = at::empty(x.sizes(), x.options().dtype(at::kByte));
  if (x.numel() == 0) return codes;
  const at::Tensor rows = x.contiguous().view({layout.rows, layout.columns});
  uint8_t* const first_code = codes.mutable_data_ptr<uint8_t>();
  for_row_chunks(x, layout, [&](int64_t first, int64_t count) {
    const at::Tensor part = rows.narrow(0, first, count).to(at::kFloat);
    const UniformEncode work{layout.part(first, count), max_code_of(bits),
                             part.const_data_ptr<float>(), first_code + first * layout.columns};
    TORCHQUANT_RUN(uniform_encode, x, work);
  });
  return codes;
}

at::Tensor uniform_dequantize(const at::Tensor& codes, const at::Tensor& scale,
                              const at::Tensor& zero_point, int64_t axis, int64_t group_size) {
  const char* op = "uniform_dequantize";
  check_device(op, codes);
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kByte, op, ": codes must be uint8, got ",
                   codes.scalar_type());
  const c10::DeviceGuard guard(codes.device());
  const Layout layout = layout_of(op, codes, scale, zero_point, axis, group_size);
  const at::Tensor values = at::empty(codes.sizes(), codes.options().dtype(at::kFloat));
  if (codes.numel() == 0) return values;
  const at::Tensor rows = codes.contiguous();
  const uint8_t* const first_code = rows.const_data_ptr<uint8_t>();
  float* const first_value = values.mutable_data_ptr<float>();
  for_row_chunks(codes, layout, [&](int64_t first, int64_t count) {
    const int64_t start = first * layout.columns;
    const UniformDecode work{layout.part(first, count), first_code + start, first_value + start};
    TORCHQUANT_RUN(uniform_decode, codes, work);
  });
  return values;
}

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "uniform_quantize(Tensor x, Tensor scale, Tensor zero_point, *, int bits, int axis=-1, "
      "int group_size=0) -> Tensor");
  m.def(
      "uniform_dequantize(Tensor codes, Tensor scale, Tensor zero_point, *, int axis=-1, "
      "int group_size=0) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("uniform_quantize", uniform_quantize);
  m.impl("uniform_dequantize", uniform_dequantize);
}
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) {
  m.impl("uniform_quantize", uniform_quantize);
  m.impl("uniform_dequantize", uniform_dequantize);
}
#endif

}  // namespace torchquant
