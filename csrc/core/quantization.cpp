#include <csrc/core/quantization.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/core/grid.h>
#include <csrc/core/parallel.h>

namespace torchquant {
namespace {

constexpr int64_t kRowsPerChunk = 16;

GridRows rows_of(const at::Tensor& weight, int64_t group_size, GridType type, int64_t bits,
                 Quantization& q) {
  const int64_t columns = weight.size(1);
  return {weight.const_data_ptr<float>(),
          weight.size(0),
          columns,
          group_size == 0 ? columns : group_size,
          type,
          max_code_of(bits),
          q.scale.mutable_data_ptr<float>(),
          q.zero_point.mutable_data_ptr<float>(),
          q.codes.mutable_data_ptr<uint8_t>()};
}

template <class Leaf>
void for_row_chunks(const GridRows& all, const Leaf& leaf) {
  const int64_t groups = group_count(all.columns, all.group_size);
  for_each_chunk((all.rows + kRowsPerChunk - 1) / kRowsPerChunk, [&](int64_t chunk) {
    const int64_t first = chunk * kRowsPerChunk;
    GridRows part = all;
    part.rows = std::min(kRowsPerChunk, all.rows - first);
    part.weight += first * all.columns;
    part.codes += first * all.columns;
    part.scale += first * groups;
    part.zero_point += first * groups;
    leaf(part);
  });
}

}  // namespace

Quantization fit_grids(const at::Tensor& weight, int64_t group_size, GridType type, int64_t bits) {
  const int64_t rows = weight.size(0), columns = weight.size(1),
                groups = group_count(columns, group_size);
  Quantization q{at::empty({rows, columns}, weight.options().dtype(at::kByte)),
                 at::ones({rows, groups}, weight.options()),
                 at::zeros({rows, groups}, weight.options())};
  if (weight.numel() == 0) return q;  // rows of no columns still have a grid
  const GridRows all = rows_of(weight, group_size, type, bits, q);
  if (weight.is_cuda()) {
    TORCHQUANT_LAUNCH(fit_grid_rows, all);
  } else {
    for_row_chunks(all, [](const GridRows& part) { fit_grid_rows(part); });
  }
  return q;
}

void encode(const at::Tensor& weight, int64_t group_size, int64_t bits, Quantization& q) {
  if (weight.numel() == 0) return;
  const GridRows all = rows_of(weight, group_size, GridType::asymmetric, bits, q);
  if (weight.is_cuda()) {
    TORCHQUANT_LAUNCH(encode_rows, all);
  } else {
    for_row_chunks(all, [](const GridRows& part) { encode_rows(part); });
  }
}

at::Tensor expand_groups(const at::Tensor& grouped, int64_t columns, int64_t group_size) {
  if (group_size == 0 || grouped.size(-1) <= 1) return grouped;
  return grouped.repeat_interleave(group_size, -1).narrow(-1, 0, columns);
}

at::Tensor values_of(const Quantization& q, int64_t group_size) {
  const int64_t columns = q.codes.size(-1);
  return q.codes.to(at::kFloat)
      .sub_(expand_groups(q.zero_point, columns, group_size))
      .mul_(expand_groups(q.scale, columns, group_size));
}

}  // namespace torchquant
