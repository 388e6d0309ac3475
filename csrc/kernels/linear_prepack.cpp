// Codes and grids of a weight in the order in which the kernels read them: Note [weight tiles].
#include <ATen/ops/zeros.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/core/parallel.h>
#include <csrc/kernels/linear_multipliers.h>
#include <csrc/kernels/prepacked.h>
#include <torch/library.h>

#include <atomic>
#include <tuple>
#include <vector>

namespace torchquant {
namespace {

constexpr const char* kOp = "linear_prepack";

// CUDA kernels load 16 bytes of packed weights and levels at once.
at::Tensor aligned(const at::Tensor& tensor) {
  const at::Tensor whole = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 == 0 ? whole : whole.clone();
}

// Byte i of V[step] goes into the block's lines.
void store_code(uint8_t* lines, int64_t bits, int64_t step, int64_t i, uint8_t code) {
  const auto put = [&](int64_t line, int64_t shift, int value) {
    lines[line * kLine + i] = static_cast<uint8_t>(lines[line * kLine + i] | (value << shift));
  };
  if (bits == 8) return put(step, 0, code);
  if (bits == 4) return put(step / 2, step % 2 * 4, code);
  put(step / 4, step % 4 * 2, code & 3);
  if (bits == 3) put(2, step, code >> 2);
}

void pack_tile(const BlockLayout& layout, const uint8_t* codes, int64_t outputs, uint8_t* tile) {
  for (int64_t g = 0; g < layout.groups; ++g) {
    for (int64_t k = 0; k < layout.group_columns(g); ++k) {
      uint8_t* const lines =
          tile + (g * layout.group_blocks + k / kBlockInputs) * layout.bits * kLine;
      const int64_t step = k % kBlockInputs / 4, j = k % 4;
      const uint8_t* const column = codes + g * layout.group_size + k;
      for (int64_t o = 0; o < outputs; ++o)
        store_code(lines, layout.bits, step, 4 * o + j, column[o * layout.columns]);
    }
  }
}

at::Tensor pack_tiles(const at::Tensor& codes, const BlockLayout& layout) {
  const int64_t outputs = codes.size(0), tiles = padded(outputs, kTileOutputs) / kTileOutputs;
  const at::Tensor packed = at::zeros({tiles, layout.blocks, layout.bits, kLine}, codes.options());
  uint8_t* const to = packed.mutable_data_ptr<uint8_t>();
  const uint8_t* const from = codes.const_data_ptr<uint8_t>();
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTileOutputs;
      pack_tile(layout, from + first * layout.columns, std::min(kTileOutputs, outputs - first),
                to + tile * layout.blocks * layout.bits * kLine);
    }
  });
  return packed;
}

// Scales [N, G] and offsets by [kernel group, output], and each row's sum of values.
struct GridRows {
  const BlockLayout& layout;
  const uint8_t* codes;
  const float* scale;
  const float* zero_point;  // or null: the origin
  const int8_t* levels;     // [16] or [N, 16], or null
  int64_t level_stride;
  int64_t quantizer_groups;
  int64_t quantizer_group_size;
  float origin;

  double value_sum(int64_t n, int64_t g) const {
    const uint8_t* const row = codes + n * layout.columns + g * layout.group_size;
    int64_t sum = 0;
    for (int64_t k = 0; k < layout.group_columns(g); ++k)
      sum += levels == nullptr ? row[k] : levels[n * level_stride + row[k]];
    return static_cast<double>(sum);
  }

  void write(int64_t n, float* out, int64_t stride) const {
    double total = 0;
    for (int64_t g = 0; g < layout.groups; ++g) {
      const int64_t source =
          n * quantizer_groups +
          (quantizer_group_size == 0 ? 0 : g * layout.group_size / quantizer_group_size);
      const float zero = levels != nullptr       ? 0.0f
                         : zero_point == nullptr ? origin
                                                 : zero_point[source];
      out[g * stride + n] = scale[source];
      if (zero_point != nullptr) out[(layout.groups + g) * stride + n] = origin - zero;
      total +=
          (value_sum(n, g) - static_cast<double>(zero) * layout.group_columns(g)) * scale[source];
    }
    const int64_t last = layout.groups * (zero_point == nullptr ? 1 : 2);
    out[last * stride + n] = static_cast<float>(total);
  }
};

// Units and multipliers (Note [integer groups]) into the last rows of a grid, if all outputs have
// them.
void write_multipliers(const at::Tensor& grid, const at::Tensor& scale, const at::Tensor& zero,
                       int64_t bits, int64_t rows) {
  const int64_t outputs = scale.size(0), groups = scale.size(1), stride = grid.size(1);
  const at::Tensor found = at::zeros({rows, stride}, grid.options());
  float* const units = found.mutable_data_ptr<float>();
  auto* const multipliers = reinterpret_cast<uint8_t*>(units + stride);
  std::atomic<bool> all{true};
  at::parallel_for(0, outputs, 64, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> own(static_cast<size_t>(groups));
    for (int64_t n = begin; n < end && all; ++n) {
      const float* const zeros =
          zero.defined() ? zero.const_data_ptr<float>() + n * groups : nullptr;
      const GroupScales row{scale.const_data_ptr<float>() + n * groups, zeros, groups, bits};
      if (!find_multipliers(row, units[n], own.data())) all = false;
      for (int64_t g = 0; g < groups; ++g)
        multipliers[g * stride + n] = own[static_cast<size_t>(g)];
    }
  });
  if (all) grid.narrow(0, grid.size(0) - rows, rows).copy_(found);
}

void check_codes(const at::Tensor& codes, const at::Tensor& scale,
                 const std::optional<at::Tensor>& zero_point, int64_t bits, int64_t group_size) {
  check_device(kOp, codes);
  check_bits(kOp, bits);
  check_group_size(kOp, group_size);
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kByte, kOp, ": codes must be uint8, got ",
                   codes.scalar_type());
  TORCH_CHECK_VALUE(codes.dim() == 2, kOp, ": codes must be [N, K], got ", codes.sizes());
  const auto check = [&](const char* name, const at::Tensor& tensor) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, kOp, ": ", name, " must be float32, got ",
                     tensor.scalar_type());
    check_same_device(kOp, name, tensor, codes);
    check_shape(kOp, name, tensor, {codes.size(0), group_count(codes.size(1), group_size)});
    check_finite(kOp, name, tensor);
  };
  check("scale", scale);
  if (zero_point.has_value()) check("zero_point", *zero_point);
  if (codes.numel() == 0) return;
  const int64_t largest = codes.max().item<int64_t>();
  TORCH_CHECK_VALUE(largest < (int64_t{1} << bits), kOp, ": codes of ", bits,
                    " bits must be below ", int64_t{1} << bits, ", got ", largest);
}

// int8 [L] or [N, L], L <= 16 -> [16] or [N padded to 16, 16].
at::Tensor padded_levels(const at::Tensor& levels, int64_t outputs, int64_t bits) {
  TORCH_CHECK_TYPE(levels.scalar_type() == at::kChar, kOp, ": levels must be int8, got ",
                   levels.scalar_type());
  TORCH_CHECK_VALUE((levels.dim() == 1 || (levels.dim() == 2 && levels.size(0) == outputs)) &&
                        levels.size(-1) == (int64_t{1} << bits) && bits <= 4,
                    kOp, ": levels must be [2^bits] or [N, 2^bits] with bits <= 4, got ",
                    levels.sizes(), " for ", bits, " bits");
  std::vector<int64_t> shape{16};
  if (levels.dim() == 2) shape = {padded(outputs, kTileOutputs), 16};
  const at::Tensor table = at::zeros(shape, levels.options());
  if (levels.dim() == 1) {
    table.narrow(0, 0, levels.size(0)).copy_(levels);
  } else {
    table.narrow(0, 0, outputs).narrow(1, 0, levels.size(1)).copy_(levels);
  }
  return table;
}

using Packed = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Packed linear_prepack(const at::Tensor& codes, const at::Tensor& scale,
                      const std::optional<at::Tensor>& zero_point, int64_t bits, int64_t group_size,
                      const std::optional<at::Tensor>& levels) {
  check_codes(codes, scale, zero_point, bits, group_size);
  const int64_t outputs = codes.size(0), columns = codes.size(1);
  TORCH_CHECK_VALUE(!levels.has_value() || !zero_point.has_value(), kOp,
                    ": zero_point must be None where levels are given");
  const at::Tensor table = levels.has_value() ? padded_levels(*levels, outputs, bits)
                                              : at::zeros({0}, codes.options().dtype(at::kChar));
  const BlockLayout layout = block_layout(columns, group_size, bits, levels.has_value());
  const at::Tensor own_codes = codes.contiguous(), own_scale = scale.contiguous();
  const at::Tensor own_zero = zero_point.has_value() ? zero_point->contiguous() : at::Tensor();
  const int64_t stride = padded(outputs, kPanelOutputs);
  const int64_t grid_rows = layout.groups * (zero_point.has_value() ? 2 : 1) + 1;
  const int64_t last_rows = multiplier_rows(layout, group_size, levels.has_value());
  const at::Tensor grid = at::zeros({grid_rows + last_rows, stride}, scale.options());
  const GridRows rows{layout,
                      own_codes.const_data_ptr<uint8_t>(),
                      own_scale.const_data_ptr<float>(),
                      own_zero.defined() ? own_zero.const_data_ptr<float>() : nullptr,
                      levels.has_value() ? table.const_data_ptr<int8_t>() : nullptr,
                      table.dim() == 2 ? 16 : 0,
                      scale.size(1),
                      group_size >= columns ? 0 : group_size,
                      static_cast<float>(1 << (bits - 1))};
  float* const out = grid.mutable_data_ptr<float>();
  at::parallel_for(0, columns == 0 ? 0 : outputs, 64, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) rows.write(n, out, stride);
  });
  if (last_rows > 0) write_multipliers(grid, own_scale, own_zero, bits, last_rows);
  return {pack_tiles(own_codes, layout), grid, table};
}

#ifdef TORCHQUANT_CUDA
// Packing is done once, and quickly enough on the CPU.
Packed prepack_on_cpu(const at::Tensor& codes, const at::Tensor& scale,
                      const std::optional<at::Tensor>& zero_point, int64_t bits, int64_t group_size,
                      const std::optional<at::Tensor>& levels) {
  const auto on_cpu = [&](const char* name, const std::optional<at::Tensor>& tensor) {
    if (!tensor.has_value()) return tensor;
    check_same_device(kOp, name, *tensor, codes);
    return std::optional<at::Tensor>(tensor->cpu());
  };
  const auto [packed, grid, table] =
      linear_prepack(codes.cpu(), *on_cpu("scale", scale), on_cpu("zero_point", zero_point), bits,
                     group_size, on_cpu("levels", levels));
  return {packed.to(codes.device()), grid.to(codes.device()), table.to(codes.device())};
}
#endif

}  // namespace

Prepacked::Prepacked(const char* op, PrepackedTensors tensors) : tensors_(std::move(tensors)) {
  check_bits(op, tensors_.bits);
  check_group_size(op, tensors_.group_size);
  at::Tensor& packed = tensors_.packed;
  at::Tensor& grid = tensors_.grid;
  std::optional<at::Tensor>& levels = tensors_.levels;
  if (levels.has_value() && levels->numel() == 0) levels.reset();
  const int64_t outputs = tensors_.out_features;
  const BlockLayout layout =
      block_layout(tensors_.in_features, tensors_.group_size, tensors_.bits, levels.has_value());
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kByte && grid.scalar_type() == at::kFloat, op,
                   ": packed must be uint8 and grid float32, got ", packed.scalar_type(), " and ",
                   grid.scalar_type());
  check_shape(op, "packed", packed,
              {padded(outputs, kTileOutputs) / kTileOutputs, layout.blocks, layout.bits, kLine});
  const int64_t stride = padded(outputs, kPanelOutputs);
  const int64_t last_rows = multiplier_rows(layout, tensors_.group_size, levels.has_value());
  const int64_t least = layout.groups + 1 + last_rows, most = least + layout.groups;
  TORCH_CHECK_VALUE(
      grid.dim() == 2 && grid.size(1) == stride && (grid.size(0) == least || grid.size(0) == most),
      op, ": grid must be [", least, " or ", most, ", ", stride, "] as linear_prepack gives, got ",
      grid.sizes());
  if (levels.has_value()) {
    TORCH_CHECK_TYPE(levels->scalar_type() == at::kChar, op, ": levels must be int8, got ",
                     levels->scalar_type());
    if (levels->dim() != 1) check_shape(op, "levels", *levels, {padded(outputs, kTileOutputs), 16});
    if (levels->dim() == 1) check_shape(op, "levels", *levels, {16});
    check_same_device(op, "levels", *levels, packed);
    levels = aligned(*levels);
  }
  check_same_device(op, "grid", grid, packed);
  packed = aligned(packed);
  grid = grid.contiguous();
  const float* const scale = grid.const_data_ptr<float>();
  const int64_t size = layout.groups * stride;
  const bool offsets = grid.size(0) == most;
  view_ = {layout,
           outputs,
           stride,
           levels.has_value() ? 128 : 1 << (tensors_.bits - 1),
           packed.const_data_ptr<uint8_t>(),
           scale,
           offsets ? scale + size : nullptr,
           scale + size * (offsets ? 2 : 1),
           levels.has_value() ? levels->const_data_ptr<int8_t>() : nullptr,
           levels.has_value() && levels->dim() == 2 ? 16 : 0};
  if (last_rows == 0 || outputs == 0 || packed.is_cuda()) return;
  const float* const units = view_.sum + stride;
  if (units[0] > 0) units_ = units;
}

PackedWeight Prepacked::view(bool wide) const {
  if (units_ == nullptr) return view_;
  PackedWeight view = view_;
  view.layout = span_layout(view_.layout, wide);
  view.scale = units_;
  view.offset = nullptr;
  view.multipliers = {reinterpret_cast<const uint8_t*>(units_ + view_.stride), view_.offset,
                      view_.layout.group_blocks};
  return view;
}

bool bytes_need_wide() { return cpu_tier() == CpuTier::avx2 || cpu_tier() == CpuTier::avx512; }

bool Prepacked::needs_wide() const {
  if (tensors_.packed.is_cuda() || !bytes_need_wide()) return false;
  if (view_.levels == nullptr) return view_.layout.bits == 8;
  const auto [least, largest] = level_range(view_, 0, tensors_.packed.size(0));
  return least < -kSmallLevel || largest > kSmallLevel;
}

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "linear_prepack(Tensor codes, Tensor scale, Tensor? zero_point=None, *, int bits, "
      "int group_size=0, Tensor? levels=None) -> (Tensor packed, Tensor grid, Tensor levels)");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) { m.impl("linear_prepack", linear_prepack); }
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) { m.impl("linear_prepack", prepack_on_cpu); }
#endif

}  // namespace torchquant
