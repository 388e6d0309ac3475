// Uniform quantizers of activations whose grids span the extremes of the activations themselves.
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
#include <csrc/core/strided.h>
#include <csrc/quantizers/uniform.h>
#include <csrc/quantizers/uniform_activations.h>
#include <torch/library.h>

#include <atomic>
#include <tuple>
#include <vector>

namespace torchquant {
namespace {

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
  check_activation_type(op, x);
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
    const int64_t step = std::clamp<int64_t>(kActivationsPerChunk / columns_, 1, near);
    const int64_t parts = (near + step - 1) / step;
    std::atomic<bool> finite{true};
    for_each_chunk(x_.numel() / (near * columns_) * parts, [&](int64_t chunk) {
      const int64_t first = chunk % parts * step;
      bool own = true;
      UniformRows work = work_;
      work.rows = std::min(step, near - first);
      work.x =
          x_.const_data_ptr<float>() + matrix_offset(x_, chunk / parts) + first * work.row_stride;
      work.finite = &own;
      fill(work, chunk / parts * near + first);
      uniform_encode_rows(work);
      if (!own) finite = false;
    });
    return finite;
  }

 private:
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
  m.impl("uniform_fit", uniform_fit);
  m.impl("dynamic_quantize", dynamic_quantize);
  m.impl("dynamic_fake_quantize", dynamic_fake_quantize);
}
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) {
  m.impl("uniform_fit", uniform_fit);
  m.impl("dynamic_quantize", dynamic_quantize);
  m.impl("dynamic_fake_quantize", dynamic_fake_quantize);
}
#endif

}  // namespace torchquant
