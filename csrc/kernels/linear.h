// y = x W^T + b with packed low-bit weights and integer activations:
//
//   y[m, n] = a_scale[m] * (sum_g scale[g, n] * (D[m, n, g] + offset[g, n] * S[m, g])
//                           - a_zero[m] * sum[n]) + bias[n]
//
//   D[m, n, g] = sum_k (u[n, k] - origin) * a[m, k]    exact in int32; k in group g
//   S[m, g] = sum_k a[m, k]
//
// u is the weight's code, or its level + 128 where codes index a table. Floats enter only after D,
// in one order and with fused multiply-adds only where they are written, so every tier and every
// number of threads gives the same bits.
//
// Note [weight tiles]: 16 outputs x 32 inputs are a block. Its codes are eight vectors V[0..7] of
// 64 bytes, byte 4 * o + j of V[s] being input 4 * s + j of output o: what one 64-byte (two
// 32-byte) dot product takes. `bits` lines of 64 bytes hold a block: 8 bits line s = V[s]; 4 bits
// line i = V[2i] | V[2i+1] << 4; 2 bits line i = V[4i] | V[4i+1] << 2 | V[4i+2] << 4 | V[4i+3] <<
// 6; 3 bits the low two bits so, then one line of the high bits, V[s] at bit s. Groups begin at
// blocks: each is padded to whole blocks, with zeros in the activations.
//
// Note [integer groups]: where all scales of each row are unit[n] * m[n, g], with integers m so
// small that (u - zero_point) * m fits in a byte with sign, sums stay integers beyond their group:
//
//   D[m, n, span] = sum_k m[n, g(k)] * (u[n, k] - zero_point[n, g(k)]) * a[m, k]
//
// with one float scale, the unit. A span is the whole row, cut only where int32 could overflow.
// Kernels for many rows meet a weight of eight bits, 128 + (u - zero_point) * m, that has no groups
// at all; for few rows the sum of each group is multiplied by m.
#pragma once
#include <csrc/core/cpu_tier.h>
#include <csrc/core/quant_math.h>

#include <cstdint>

namespace torchquant {

constexpr int64_t kTileOutputs = 16;
constexpr int64_t kBlockInputs = 32;
constexpr int64_t kLine = 64;          // bytes
constexpr int64_t kPanelOutputs = 64;  // outputs of per-output numbers are padded to this

TORCHQUANT_HOST_DEVICE int64_t padded(int64_t count, int64_t to) {
  return (count + to - 1) / to * to;
}

// How columns lie in blocks. Groups are cut so short that sums of 16-bit activations fit in int32:
// 2^(bits - 1) * 2^15 * columns <= 2^31, where levels of a table have eight bits.
struct BlockLayout {
  int64_t columns;
  int64_t group_size;  // of the kernel: divides the quantizer's
  int64_t groups;
  int64_t group_blocks;
  int64_t blocks;  // of a row
  int64_t bits;    // of storage: 2, 3, 4 or 8

  TORCHQUANT_HOST_DEVICE int64_t group_columns(int64_t g) const {
    const int64_t left = columns - g * group_size;
    return left < group_size ? left : group_size;
  }
  TORCHQUANT_HOST_DEVICE int64_t blocks_of_group(int64_t g) const {
    return (group_columns(g) + kBlockInputs - 1) / kBlockInputs;
  }
};

TORCHQUANT_HOST_DEVICE BlockLayout layout_of_groups(int64_t columns, int64_t size, int64_t stored) {
  const int64_t groups = columns == 0 ? 1 : (columns + size - 1) / size;
  const int64_t group_blocks = (size + kBlockInputs - 1) / kBlockInputs;
  BlockLayout layout{columns, size, groups, group_blocks, 0, stored};
  layout.blocks = (groups - 1) * layout.group_blocks + layout.blocks_of_group(groups - 1);
  return layout;
}

TORCHQUANT_HOST_DEVICE BlockLayout block_layout(int64_t columns, int64_t group_size, int64_t bits,
                                                bool levels) {
  const int64_t stored = levels ? 4 : bits > 4 ? 8 : bits;
  const int64_t longest = int64_t{1} << (17 - (levels ? 8 : stored));
  const int64_t whole = group_size == 0 || group_size > columns ? columns : group_size;
  int64_t size = whole < 1 ? 1 : whole;
  if (size > longest) {
    size = longest;
    while (group_size != 0 && whole % size != 0) --size;
  }
  return layout_of_groups(columns, size, stored);
}

// Multipliers of groups in place of scales: Note [integer groups].
struct GroupMultipliers {
  const uint8_t* values = nullptr;  // [groups, stride], or null: none
  const float* offset = nullptr;    // [groups, stride]: origin - zero_point, or null: zero
  int64_t blocks = 0;               // of a group
};

// |(u - zero_point) * m| <= 2^7: sums of 16-bit activations fit in int32 up to 2^9 columns.
constexpr int64_t kWideSpan = 512, kNarrowSpan = 1 << 16;  // columns
inline BlockLayout span_layout(const BlockLayout& layout, bool wide) {
  const int64_t size = (wide ? kWideSpan : kNarrowSpan) / layout.group_size * layout.group_size;
  return layout_of_groups(layout.columns, size < layout.columns ? size : layout.columns,
                          layout.bits);
}

struct PackedWeight {
  BlockLayout layout;
  int64_t outputs;
  int64_t stride;         // of scale and offset: outputs padded to kPanelOutputs
  int32_t origin;         // the u of a weight that adds nothing to D
  const uint8_t* packed;  // [outputs / 16, blocks, bits, 64]
  const float* scale;     // [groups, stride]
  const float* offset;    // [groups, stride], or null: none
  const float* sum;       // [stride]: of the row's values
  const int8_t* levels;   // [16], or [outputs padded to 16, 16] with level_stride 16, or null
  int64_t level_stride;
  GroupMultipliers multipliers = {};  // then `layout` is of spans, and `scale` the unit [stride]

  TORCHQUANT_HOST_DEVICE const float* scale_of(int64_t g) const {
    return multipliers.values != nullptr ? scale : scale + g * stride;
  }

  // Whether u minus 128 is what fits in a byte with sign; elsewhere u itself does.
  TORCHQUANT_HOST_DEVICE bool needs_signs() const { return levels != nullptr || layout.bits == 8; }
};

// Kernels without vpdpbusd multiply levels up to this one with 8-bit activations.
constexpr int32_t kSmallLevel = 63;

// The least and the largest level of tiles [first_tile, last_tile).
struct LevelRange {
  int32_t least;
  int32_t largest;
};
inline LevelRange level_range(const PackedWeight& w, int64_t first_tile, int64_t last_tile) {
  const int64_t first = w.level_stride * first_tile * kTileOutputs;
  const int64_t count =
      w.level_stride == 0 ? 16 : w.level_stride * last_tile * kTileOutputs - first;
  uint8_t least = 255, largest = 0;  // plus 128
  for (int64_t i = first; i < first + count; ++i) {
    const auto level = static_cast<uint8_t>(w.levels[i] ^ -128);
    least = level < least ? level : least;
    largest = level > largest ? level : largest;
  }
  return {least - 128, largest - 128};
}

// What the sums of groups that are to be multiplied start with, factor * S: for every `blocks`
// blocks of a row, where blocks is not 0.
struct GroupStarts {
  int64_t blocks = 0;
  int32_t factor = 0;
  bool pairs = false;  // as two numbers of 16 bits whose sum it is
  int64_t rows = 0;    // of the whole product: [count, rows], next to each other for some rows

  int64_t count(const BlockLayout& layout) const { return (layout.blocks + blocks - 1) / blocks; }
};

// Those that the kernel of a tier needs for so many rows. From a number of rows on it needs none:
// it multiplies the weight instead, in a panel that all rows use.
GroupStarts group_starts(const PackedWeight& weight, CpuTier tier, bool wide, int64_t rows);

enum class Epilogue : int32_t { none, gelu, silu };

// Rows [0, rows) of `a` times tiles [first_tile, last_tile).
struct PackedProduct {
  PackedWeight weight;
  int64_t first_tile;
  int64_t last_tile;
  int64_t rows;
  const int8_t* narrow;  // [rows, blocks * 32], or null
  const int16_t* wide;   // the same in 16 bits: inputs 0 2 1 3 of every four
  const int32_t* sums;   // [rows, groups]
  GroupStarts group_starts;
  const int32_t* starts;  // [group_starts.count, group_starts.rows], or null
  const float* a_scale;   // [rows]
  const float* a_zero;    // [rows], or null: zero
  bool one_grid;          // all rows have the same a_scale and a_zero
  const float* bias;      // [outputs], or null
  const float* residual;  // as out, or null
  Epilogue epilogue;
  CpuTier tier;        // for instructions beside the tier's code
  float* out;          // [rows, outputs], or null: codes
  int64_t out_stride;  // of the rows of out and codes; on CUDA there are outputs in each
  bool streams;        // whether `out` goes past the caches; see streams_to

  // In place of values their codes: to_code with the grid of each output.
  uint8_t* codes;                // [rows, outputs], or null
  const float* code_scale;       // [stride]
  const float* code_zero_point;  // [stride]
  float max_code;
  const float* code_reciprocal;  // [stride], or null: Note [division by products]
  const float* code_reciprocal_rest;
  const float* code_lowest;   // [stride], with code_reciprocal: values of the first and the last
  const float* code_highest;  // code; of values cut there none has a code beyond

  // For CUDA: the sums over u * a of each of the `segments` parts that a group is cut into.
  int64_t segments;
  int32_t* dots;  // [segments, groups, rows, tiles * 16]
};

// Whether values that fill rows of a whole tensor should be written past the caches: it is larger
// than what will be found there again, and a line that is written whole need not be read first.
inline bool streams_to(const float* out, int64_t rows, int64_t outputs) {
  constexpr int64_t kCached = 6 << 20;  // bytes
  return rows * outputs * 4 >= kCached && outputs % kTileOutputs == 0 &&
         reinterpret_cast<uintptr_t>(out) % kLine == 0;
}

// Activations to integers: a = clamp(round(x / scale + zero_point)) - shift. Where no scale is
// given it is that of the row's largest magnitude, or scale and zero point are those of its
// extremes.
struct QuantizeRows {
  BlockLayout layout;
  int64_t rows;
  const float* x;        // [rows, columns], or null: codes are given
  const uint8_t* codes;  // [rows, columns]
  float scale;           // 0: from the row, symmetric in [-limit, limit] or fitted
  float zero_point;
  float max_code;
  int32_t shift;
  float limit;
  int8_t* narrow;
  int16_t* wide;
  int32_t* sums;
  GroupStarts group_starts;
  int32_t* starts;  // [group_starts.count, group_starts.rows], or null
  float* a_scale;   // written where the scale comes from the row
  float* a_zero;    // [rows], or null; written where grids are fitted, with `grid`
  GridType grid;
  bool* finite;  // set to false where x is not

  // For CUDA, where the host waits for nothing: scale and zero point lie on the device, and a row
  // that is not finite gets the a_scale NaN.
  const float* scale_at;  // null: as above
  const float* zero_point_at;
  uint32_t* largest;  // [rows], zeros, as are sums
};

enum class UnpackType : int32_t { float32, float16, bfloat16, bytes };

// Tiles [first_tile, last_tile) as values, (u - origin + offset) * scale in float32 and then
// rounded to `type`; or as bytes with sign, u or u - 128.
struct UnpackWeight {
  PackedWeight weight;
  int64_t first_tile;
  int64_t last_tile;
  UnpackType type;
  void* out;  // [outputs, columns]; bytes: [tiles * 16, blocks * 32]
};

TORCHQUANT_TIER_LEAF(packed_product, PackedProduct)
TORCHQUANT_TIER_LEAF(quantize_rows, QuantizeRows)
TORCHQUANT_TIER_LEAF(unpack_weight, UnpackWeight)

// The end of launch_packed_product, where `dots` (of bytes with sign) are there already.
void launch_finish_product(const PackedProduct& p, void* stream);

// On CUDA a warp multiplies one tile and a few rows over a part of one group. Groups are cut into
// segments until there are warps enough for a GPU, but no shorter than eight blocks.
constexpr int64_t kWarpRows = 4;
inline int64_t product_segments(const PackedProduct& p) {
  constexpr int64_t kWarps = 1 << 14, kShortest = 8;
  const int64_t chunks = p.rows == 1 ? 1 : (p.rows + kWarpRows - 1) / kWarpRows;
  const int64_t whole = (p.last_tile - p.first_tile) * chunks * p.weight.layout.groups;
  const int64_t wanted = (kWarps + whole - 1) / (whole < 1 ? 1 : whole);
  const int64_t most = (p.weight.layout.group_blocks + kShortest - 1) / kShortest;
  return wanted < most ? wanted : most < 1 ? 1 : most;
}

}  // namespace torchquant
