// Uniform quantizers of activations: codes and values on given grids, and the grids of a tensor's
// own extremes (dynamic quantization).
#include <csrc/quantizers/uniform.h>

#include <ATen/ops/amax.h>
#include <ATen/ops/amin.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/core/parallel.h>
#include <csrc/core/quantization.h>
#include <torch/library.h>

#include <atomic>
#include <tuple>
#include <vector>

namespace torchquant {
namespace {

constexpr int64_t kElementsPerChunk = 1 << 15;  // float32 copies of half types stay in L2

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
void for_row_chunks(const at::Tensor& x, int64_t rows, int64_t columns, const Run& run) {
  if (x.is_cuda()) return run(0, rows);
  const int64_t step = std::max<int64_t>(kElementsPerChunk / std::max<int64_t>(columns, 1), 1);
  for_each_chunk((rows + step - 1) / step,
                 [&](int64_t chunk) { run(chunk * step, std::min(step, rows - chunk * step)); });
}

void check_type(const char* op, const at::Tensor& x) {
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
  check_type(op, x);
  check_finite(op, "x", x);
  const c10::DeviceGuard guard(x.device());
  const Layout layout = layout_of(op, x, scale, zero_point, axis, group_size);
  const at::Tensor codes = at::empty(x.sizes(), x.options().dtype(at::kByte));
  if (x.numel() == 0) return codes;
  const at::Tensor rows = x.contiguous().view({layout.rows, layout.columns});
  uint8_t* const first_code = codes.mutable_data_ptr<uint8_t>();
  for_row_chunks(x, layout.rows, layout.columns, [&](int64_t first, int64_t count) {
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
  for_row_chunks(codes, layout.rows, layout.columns, [&](int64_t first, int64_t count) {
    const int64_t start = first * layout.columns;
    const UniformDecode work{layout.part(first, count), first_code + start, first_value + start};
    TORCHQUANT_RUN(uniform_decode, codes, work);
  });
  return values;
}

enum class Granularity { tensor, token, channel, group };

Granularity parse_granularity(const char* op, std::string_view name) {
  if (name == "tensor") return Granularity::tensor;
  if (name == "token") return Granularity::token;
  if (name == "channel") return Granularity::channel;
  TORCH_CHECK_VALUE(name == "group", op,
                    ": granularity must be tensor, token, channel or group, got '", name, "'");
  return Granularity::group;
}

struct Extremes {
  at::Tensor low;
  at::Tensor high;
};

Extremes extremes_along(const at::Tensor& x, at::IntArrayRef dims, bool keep) {
  return {at::amin(x, dims, keep), at::amax(x, dims, keep)};
}

Extremes extremes_of_channels(const at::Tensor& x, int64_t axis) {
  std::vector<int64_t> others;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (d != (axis < 0 ? axis + x.dim() : axis)) others.push_back(d);
  }
  return others.empty() ? Extremes{x, x} : extremes_along(x, others, false);
}

// [..., K] -> [..., G]; the last group may be ragged.
Extremes extremes_of_groups(const at::Tensor& x, int64_t group_size) {
  const int64_t columns = x.size(-1), whole = columns - columns % group_size;
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = whole / group_size;
  shape.push_back(group_size);
  Extremes all{};
  if (whole > 0) all = extremes_along(x.narrow(-1, 0, whole).reshape(shape), {-1}, false);
  if (whole == columns) return all;
  const Extremes last = extremes_along(x.narrow(-1, whole, columns - whole), {-1}, true);
  if (whole == 0) return last;
  return {at::cat({all.low, last.low}, -1), at::cat({all.high, last.high}, -1)};
}

Extremes extremes_of(const at::Tensor& x, Granularity granularity, int64_t axis,
                     int64_t group_size) {
  switch (granularity) {
    case Granularity::tensor:
      return {at::amin(x), at::amax(x)};
    case Granularity::token:
      return extremes_along(x, {-1}, true);
    case Granularity::channel:
      return extremes_of_channels(x, axis);
    default:
      return extremes_of_groups(x, group_size);
  }
}

// Of the grids of x, also of an x without values.
std::vector<int64_t> grid_shape(const at::Tensor& x, Granularity granularity, int64_t axis,
                                int64_t group_size) {
  if (granularity == Granularity::tensor) return {};
  if (granularity == Granularity::channel) return {x.size(axis)};
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = granularity == Granularity::token ? 1 : group_count(shape.back(), group_size);
  return shape;
}

Granularity check_fit(const char* op, const at::Tensor& x, int64_t bits,
                      std::string_view granularity, int64_t axis, int64_t group_size) {
  check_device(op, x);
  check_bits(op, bits);
  check_type(op, x);
  const Granularity kind = parse_granularity(op, granularity);
  check_group_size(op, group_size);
  TORCH_CHECK_VALUE((kind == Granularity::group) == (group_size > 0), op,
                    ": group_size must be positive for groups and 0 otherwise, got ", group_size,
                    " for granularity ", granularity);
  TORCH_CHECK_VALUE(kind == Granularity::tensor || (axis >= -x.dim() && axis < x.dim()), op,
                    ": x needs the dimension ", axis, ", got ", x.sizes());
  return kind;
}

std::tuple<at::Tensor, at::Tensor> uniform_fit(const at::Tensor& x, int64_t bits,
                                               std::string_view granularity, int64_t axis,
                                               int64_t group_size, bool symmetric) {
  const char* op = "uniform_fit";
  const Granularity kind = check_fit(op, x, bits, granularity, axis, group_size);
  const c10::DeviceGuard guard(x.device());
  const std::vector<int64_t> shape = grid_shape(x, kind, axis, group_size);
  if (x.numel() == 0) {
    const at::Tensor scale = at::ones(shape, x.options().dtype(at::kFloat));
    return {scale, at::zeros_like(scale)};
  }
  const Extremes extremes = extremes_of(x, kind, axis, group_size);
  const at::Tensor ends = at::stack({extremes.low, extremes.high}, -1).to(at::kFloat);
  if (!at::isfinite(ends).all().item<bool>()) check_finite(op, "x", x);
  const GridType grid = symmetric ? GridType::symmetric : GridType::asymmetric;
  const Quantization q = fit_grids(ends.reshape({-1, 2}).contiguous(), 0, grid, bits);
  return {q.scale.reshape(shape), q.zero_point.reshape(shape)};
}

// Tokens, or groups that leave no rest: rows that the CPU quantizes while they are in the cache.
// They stay where they lie if the elements of a row are neighbours.
class DynamicRows {
 public:
  DynamicRows(const at::Tensor& x, int64_t columns, bool symmetric, int64_t bits)
      : x_(x.to(at::kFloat)), columns_(columns) {
    if (x_.dim() < 2 || columns != x_.size(-1) || x_.stride(-1) != 1) x_ = x_.contiguous();
    if (x_.is_contiguous()) x_ = x_.view({-1, columns});
    work_.columns = columns;
    work_.row_stride = x_.stride(-2);
    work_.grid = symmetric ? GridType::symmetric : GridType::asymmetric;
    work_.max_code = max_code_of(bits);
  }

  // False where a value is not finite. fill(work, row) says where results of rows from `row` on go.
  template <class Fill>
  bool run(const Fill& fill) const {
    const int64_t near = x_.size(-2);  // rows at one distance
    const int64_t step = std::clamp<int64_t>(kElementsPerChunk / columns_, 1, near);
    const int64_t parts = (near + step - 1) / step;
    std::atomic<bool> finite{true};
    for_each_chunk(x_.numel() / (near * columns_) * parts, [&](int64_t chunk) {
      const int64_t first = chunk % parts * step;
      bool own = true;
      UniformRows work = work_;
      work.rows = std::min(step, near - first);
      work.x = x_.const_data_ptr<float>() + offset_of(chunk / parts) + first * work.row_stride;
      work.finite = &own;
      fill(work, chunk / parts * near + first);
      uniform_encode_rows(work);
      if (!own) finite = false;
    });
    return finite;
  }

 private:
  // Of the rows with the same indices ahead of the last two dimensions.
  int64_t offset_of(int64_t index) const {
    int64_t offset = 0;
    for (int64_t d = x_.dim() - 3; d >= 0; --d) {
      offset += index % x_.size(d) * x_.stride(d);
      index /= x_.size(d);
    }
    return offset;
  }

  at::Tensor x_;
  int64_t columns_;
  UniformRows work_{};
};

// Columns of the rows that DynamicRows serves; 0 where it does not.
int64_t dynamic_columns(const at::Tensor& x, Granularity kind, int64_t group_size) {
  if (!x.is_cpu() || x.numel() == 0) return 0;
  if (kind == Granularity::token) return x.size(-1);
  return kind == Granularity::group && x.size(-1) % group_size == 0 ? group_size : 0;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> dynamic_quantize(const at::Tensor& x, int64_t bits,
                                                                std::string_view granularity,
                                                                int64_t axis, int64_t group_size,
                                                                bool symmetric) {
  const char* op = "dynamic_quantize";
  const Granularity kind = check_fit(op, x, bits, granularity, axis, group_size);
  const int64_t columns = dynamic_columns(x, kind, group_size);
  if (columns == 0) {
    const auto [scale, zero] = uniform_fit(x, bits, granularity, axis, group_size, symmetric);
    return {uniform_quantize(x, scale, zero, bits, axis, group_size), scale, zero};
  }
  const at::Tensor codes = at::empty(x.sizes(), x.options().dtype(at::kByte));
  const at::Tensor scale =
      at::empty(grid_shape(x, kind, axis, group_size), x.options().dtype(at::kFloat));
  const at::Tensor zero_point = at::empty_like(scale);
  uint8_t* const first_code = codes.mutable_data_ptr<uint8_t>();
  float* const first_scale = scale.mutable_data_ptr<float>();
  float* const first_zero_point = zero_point.mutable_data_ptr<float>();
  const DynamicRows rows(x, columns, symmetric, bits);
  const bool finite = rows.run([&](UniformRows& work, int64_t row) {
    work.codes = first_code + row * columns;
    work.scale = first_scale + row;
    work.zero_point = first_zero_point + row;
  });
  if (!finite) check_finite(op, "x", x);
  return {codes, scale, zero_point};
}

at::Tensor dynamic_fake_quantize(const at::Tensor& x, int64_t bits, std::string_view granularity,
                                 int64_t axis, int64_t group_size, bool symmetric) {
  const char* op = "dynamic_fake_quantize";
  const Granularity kind = check_fit(op, x, bits, granularity, axis, group_size);
  const int64_t columns = dynamic_columns(x, kind, group_size);
  if (columns == 0) {
    const auto [codes, scale, zero] =
        dynamic_quantize(x, bits, granularity, axis, group_size, symmetric);
    return uniform_dequantize(codes, scale, zero, axis, group_size);
  }
  const at::Tensor values = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  float* const first = values.mutable_data_ptr<float>();
  const DynamicRows rows(x, columns, symmetric, bits);
  const bool finite =
      rows.run([&](UniformRows& work, int64_t row) { work.values = first + row * columns; });
  if (!finite) check_finite(op, "x", x);
  return values;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "uniform_quantize(Tensor x, Tensor scale, Tensor zero_point, *, int bits, int axis=-1, "
      "int group_size=0) -> Tensor");
  m.def(
      "uniform_dequantize(Tensor codes, Tensor scale, Tensor zero_point, *, int axis=-1, "
      "int group_size=0) -> Tensor");
  m.def(
      "uniform_fit(Tensor x, *, int bits, str granularity=\"tensor\", int axis=-1, "
      "int group_size=0, bool symmetric=False) -> (Tensor scale, Tensor zero_point)");
  m.def(
      "dynamic_quantize(Tensor x, *, int bits, str granularity=\"token\", int axis=-1, "
      "int group_size=0, bool symmetric=False) -> (Tensor codes, Tensor scale, Tensor zero_point)");
  m.def(
      "dynamic_fake_quantize(Tensor x, *, int bits, str granularity=\"token\", int axis=-1, "
      "int group_size=0, bool symmetric=False) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("uniform_quantize", uniform_quantize);
  m.impl("uniform_dequantize", uniform_dequantize);
  m.impl("uniform_fit", uniform_fit);
  m.impl("dynamic_quantize", dynamic_quantize);
  m.impl("dynamic_fake_quantize", dynamic_fake_quantize);
}
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) {
  m.impl("uniform_quantize", uniform_quantize);
  m.impl("uniform_dequantize", uniform_dequantize);
  m.impl("uniform_fit", uniform_fit);
  m.impl("dynamic_quantize", dynamic_quantize);
  m.impl("dynamic_fake_quantize", dynamic_fake_quantize);
}
#endif

}  // namespace torchquant
