// Packed linear layers on CUDA: products of whole warps with 16-bit integers; sums to outputs. Rows
// of other types are for linear_mma.cuh.
//
// A warp reads a tile in pieces of 512 contiguous bytes: lane l takes 16 bytes, the outputs
// 4 * (l % 4) to 4 * (l % 4) + 3, of line l / 4 of eight (Note [weight tiles] of linear.h). Integer
// sums are exact in any order, so warps share a group's inputs freely; floats follow the order of
// linear_tile.h.
#include <csrc/kernels/linear_unpack.h>

#include <csrc/kernels/linear_words.cuh>

namespace torchquant {
namespace {

constexpr int kLaneOutputs = 4;
constexpr int kWarpLines = 8;

// How the lines of a format (stored bits, or four bits that index levels) become bytes with signs,
// four inputs of one output in a word: the codes themselves, or minus 128 where they need all bits.
template <int kBits, bool kLevels>
struct Format {
  static constexpr int kLineBits = kBits == 3 ? 2 : kBits;  // the third bits have their own line
  static constexpr int kLines = kLineBits;                  // of a block, but for that one
  static constexpr int kSteps = 8 / kLineBits;              // of a line
  static constexpr bool kThird = kBits == 3;

  __device__ Format(const PackedWeight& w, int64_t tile, int quarter) {
    if constexpr (kLevels) {
      for (int o = 0; o < kLaneOutputs; ++o)
        tables_[o] = load_words<4>(w.levels + (tile * kTileOutputs + quarter * kLaneOutputs + o) *
                                                  w.level_stride);
    }
  }

  // Words of output o from its word of the line, and of the line of third bits.
  __device__ void bytes(int o, uint32_t line, uint32_t third, int first_step,
                        uint32_t (&out)[kSteps]) const {
    if constexpr (kLevels) {
      look_up(tables_[o], line, out);
    } else if constexpr (kBits == 8) {
      out[0] = line ^ 0x80808080u;
    } else {
      constexpr uint32_t kMask = 0x01010101u * ((1u << kLineBits) - 1);
      for (int s = 0; s < kSteps; ++s) {
        out[s] = line >> (s * kLineBits) & kMask;
        if constexpr (kThird) out[s] |= (third >> (first_step + s) & 0x01010101u) << 2;
      }
    }
  }

 private:
  LineWords<4> tables_[kLevels ? kLaneOutputs : 1];
};

// sum + four products; activations lie as inputs 0 2 1 3.
__device__ inline uint32_t add_products(uint32_t sum, uint32_t weights, uint32_t even,
                                        uint32_t odd) {
  const int w = static_cast<int>(__byte_perm(weights, 0, 0x3120));
  const int half = __dp2a_lo(static_cast<int>(even), w, static_cast<int>(sum));
  return static_cast<uint32_t>(__dp2a_hi(static_cast<int>(odd), w, half));
}

// One warp's share: a tile, a segment of a group, and rows from `row` on.
struct Share {
  int64_t row;
  int64_t segment;
  int64_t group;
  int64_t tile;
};

template <int kRows>
__host__ __device__ int64_t shares_of(const PackedProduct& p) {
  return (p.rows + kRows - 1) / kRows * p.segments * p.weight.layout.groups *
         (p.last_tile - p.first_tile);
}

// Warps beside each other take rows of the same weights, which then come from L1.
// Indices fit in 32 bits (see kDots), where a division is several times cheaper.
template <int kRows>
__device__ Share share_of(const PackedProduct& p, int64_t index) {
  const auto chunks = static_cast<uint32_t>((p.rows + kRows - 1) / kRows);
  const auto segments = static_cast<uint32_t>(p.segments);
  const auto groups = static_cast<uint32_t>(p.weight.layout.groups);
  const uint32_t rest = static_cast<uint32_t>(index) / chunks, unsegmented = rest / segments;
  return {static_cast<uint32_t>(index) % chunks * int64_t{kRows}, rest % segments,
          unsegmented % groups, p.first_tile + unsegmented / groups};
}

__device__ inline int64_t segment_length(const PackedProduct& p) {
  const auto segments = static_cast<uint32_t>(p.segments);
  return (static_cast<uint32_t>(p.weight.layout.group_blocks) + segments - 1) / segments;
}

// What a lane reads of its warp's share: `lines` lines of weights and the rows' words beside them.
template <class F, int kRows>
struct LaneLines {
  static constexpr int kWords = F::kSteps * 2;  // of a row, for a line
  static constexpr int kInputsOfWord = 2;

  int lines;
  int bits;
  const uint8_t* weights;
  const uint32_t* rows[kRows];

  __device__ LaneLines(const PackedProduct& p, const Share& share, int quarter) {
    const BlockLayout& layout = p.weight.layout;
    const int64_t length = p.segments == 1 ? layout.group_blocks : segment_length(p);
    const int64_t first = share.segment * length,
                  left = layout.blocks_of_group(share.group) - first;
    const int64_t block = share.group * layout.group_blocks + first;
    lines = static_cast<int>((left < length ? left : length) * F::kLines);
    bits = static_cast<int>(layout.bits);
    weights = p.weight.packed + (share.tile * layout.blocks + block) * layout.bits * kLine +
              quarter * static_cast<int64_t>(sizeof(LineWords<4>));
    const auto* const all = reinterpret_cast<const uint32_t*>(p.wide);
    for (int r = 0; r < kRows; ++r) {  // rows behind the last one repeat it
      const int64_t row = share.row + r < p.rows ? share.row + r : p.rows - 1;
      rows[r] = all + (row * layout.blocks + block) * (kBlockInputs / kInputsOfWord);
    }
  }

  // sums[row][output] += products of one line.
  __device__ void add(const F& format, int line, uint32_t* sums) const {
    const int in_block = line % F::kLines, first_line = line / F::kLines * bits;
    const LineWords<4> codes = load_words<4>(weights + (first_line + in_block) * kLine);
    LineWords<4> third = {};
    if constexpr (F::kThird) third = load_words<4>(weights + (first_line + F::kLines) * kLine);
    LineWords<kWords> a[kRows];
    for (int r = 0; r < kRows; ++r) a[r] = load_words<kWords>(rows[r] + line * kWords);
    for (int o = 0; o < kLaneOutputs; ++o) {
      uint32_t bytes[F::kSteps];
      format.bytes(o, codes.at[o], third.at[o], in_block * F::kSteps, bytes);
      for (int r = 0; r < kRows; ++r) add_steps(bytes, a[r], sums[r * kLaneOutputs + o]);
    }
  }

  __device__ static void add_steps(const uint32_t (&bytes)[F::kSteps], const LineWords<kWords>& a,
                                   uint32_t& sum) {
    for (int s = 0; s < F::kSteps; ++s)
      sum = add_products(sum, bytes[s], a.at[2 * s], a.at[2 * s + 1]);
  }
};

// Adds N sums over the eight lanes of equal l % 4. Each exchange halves the sums that a lane keeps:
// in the end it has N / 8 of them, or shares one with another lane; they begin at the returned
// place.
template <int N, int kHalf = kWarpSize / 2>
__device__ int fold_lanes(uint32_t* sums) {
  int first = 0;
  if constexpr (N > 1) {
    const bool upper = (warp_lane() & kHalf) != 0;
    for (int i = 0; i < N / 2; ++i) {
      const uint32_t sent = upper ? sums[i] : sums[i + N / 2];
      const uint32_t kept = upper ? sums[i + N / 2] : sums[i];
      sums[i] = kept + __shfl_xor_sync(kFullWarp, sent, kHalf);
    }
    first = upper ? N / 2 : 0;
  } else {
    sums[0] += __shfl_xor_sync(kFullWarp, sums[0], kHalf);
  }
  if constexpr (kHalf > kWarpSize / kWarpLines)
    first += fold_lanes<(N > 1 ? N / 2 : 1), kHalf / 2>(sums);
  return first;
}

inline __host__ __device__ int64_t columns_of(const PackedProduct& p) {
  return (p.last_tile - p.first_tile) * kTileOutputs;
}

// Where the sum of a segment, group and row of `dots` begins.
__device__ inline int32_t* dots_at(const PackedProduct& p, int64_t segment, int64_t group,
                                   int64_t row) {
  return p.dots + ((segment * p.weight.layout.groups + group) * p.rows + row) * columns_of(p);
}

template <class F, int kRows>
__global__ void dots_kernel(const PackedProduct p) {
  constexpr int kSums = kRows * kLaneOutputs, kKept = kSums < kWarpLines ? 1 : kSums / kWarpLines;
  const int64_t shares = shares_of<kRows>(p);
  const int quarter = warp_lane() % 4;
  for (int64_t index = first_row(); index < shares; index += row_step()) {
    const Share share = share_of<kRows>(p, index);
    const F format(p.weight, share.tile, quarter);
    const LaneLines<F, kRows> lane(p, share, quarter);
    uint32_t sums[kSums] = {};
#ifdef __CUDACC__
#pragma unroll 4
#endif
    for (int line = warp_lane() / 4; line < lane.lines; line += kWarpLines)
      lane.add(format, line, sums);
    const int first = fold_lanes<kSums>(sums);
    const int64_t column = (share.tile - p.first_tile) * kTileOutputs + quarter * kLaneOutputs;
    for (int i = 0; i < kKept; ++i) {
      const int64_t row = share.row + (first + i) / kLaneOutputs;
      if (row < p.rows)
        dots_at(p, share.segment, share.group, row)[column + (first + i) % kLaneOutputs] =
            static_cast<int32_t>(sums[i]);
    }
  }
}

// What enters one output from one group.
struct GroupTerms {
  uint32_t dot;
  int32_t sum;
  float scale;
  float offset;
};

__device__ inline GroupTerms terms_of(const PackedProduct& p, int64_t g, int64_t row,
                                      int64_t column) {
  const PackedWeight& w = p.weight;
  const int64_t output = p.first_tile * kTileOutputs + column;
  GroupTerms terms{static_cast<uint32_t>(dots_at(p, 0, g, row)[column]),
                   p.sums[row * w.layout.groups + g], w.scale[g * w.stride + output],
                   w.offset != nullptr ? w.offset[g * w.stride + output] : 0.0f};
  for (int64_t s = 1; s < p.segments; ++s)
    terms.dot += static_cast<uint32_t>(dots_at(p, s, g, row)[column]);
  return terms;
}

// add_group and finish_row of linear_tile.h, for one output. Groups are added one after another but
// loaded some at a time, or each would wait for memory.
__device__ inline float sum_groups(const PackedProduct& p, int64_t row, int64_t column) {
  constexpr int kAtOnce = 8;
  const PackedWeight& w = p.weight;
  const int64_t groups = w.layout.groups;
  const uint32_t origin = static_cast<uint32_t>(w.needs_signs() ? w.origin - 128 : w.origin);
  float value = 0.0f;
  for (int64_t first = 0; first < groups; first += kAtOnce) {
    GroupTerms terms[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i)
      terms[i] = terms_of(p, first + i < groups ? first + i : groups - 1, row, column);
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= groups) break;
      const uint32_t dot = terms[i].dot - origin * static_cast<uint32_t>(terms[i].sum);
      float added = static_cast<float>(static_cast<int32_t>(dot));
      if (w.offset != nullptr)
        added = fused(terms[i].offset, static_cast<float>(terms[i].sum), added);
      added *= terms[i].scale;
      value = first + i == 0 ? added : value + added;
    }
  }
  return value;
}

__device__ inline float finish(const PackedProduct& p, int64_t row, int64_t output, float y) {
  if (p.a_zero != nullptr) y -= p.a_zero[row] * p.weight.sum[output];
  y = p.bias != nullptr ? fused(y, p.a_scale[row], p.bias[output]) : y * p.a_scale[row];
  if (p.epilogue == Epilogue::gelu) y = gelu(y);
  if (p.epilogue == Epilogue::silu) y = silu(y);
  if (p.residual != nullptr) y += p.residual[row * p.weight.outputs + output];
  return y;
}

inline __host__ __device__ int64_t warps_of_row(const PackedProduct& p) {
  return (columns_of(p) + kWarpSize - 1) / kWarpSize;
}

__global__ void finish_kernel(const PackedProduct p) {
  const int64_t warps = warps_of_row(p);
  for (int64_t index = first_row(); index < p.rows * warps; index += row_step()) {
    const int64_t row = index / warps, column = index % warps * kWarpSize + warp_lane();
    const int64_t output = p.first_tile * kTileOutputs + column;
    if (column >= columns_of(p) || output >= p.weight.outputs) continue;
    const float y = finish(p, row, output, sum_groups(p, row, column));
    if (p.codes == nullptr) {
      p.out[row * p.weight.outputs + output] = y;
    } else {
      p.codes[row * p.weight.outputs + output] = static_cast<uint8_t>(
          to_code(y, p.code_scale[output], p.code_zero_point[output], p.max_code));
    }
  }
}

template <int kBits, bool kLevels>
void launch_format(const PackedProduct& p, void* stream) {
  using F = Format<kBits, kLevels>;
  if (p.rows == 1)
    return launch_rows("packed_product", dots_kernel<F, 1>, p, shares_of<1>(p), stream);
  launch_rows("packed_product", dots_kernel<F, kWarpRows>, p, shares_of<kWarpRows>(p), stream);
}

void launch_any_format(const PackedProduct& p, void* stream) {
  if (p.weight.levels != nullptr) return launch_format<4, true>(p, stream);
  switch (p.weight.layout.bits) {
    case 2:
      return launch_format<2, false>(p, stream);
    case 3:
      return launch_format<3, false>(p, stream);
    case 4:
      return launch_format<4, false>(p, stream);
    default:
      return launch_format<8, false>(p, stream);
  }
}

__global__ void unpack_weight_kernel(const UnpackWeight work) {
  const BlockLayout& layout = work.weight.layout;
  const auto row_blocks = static_cast<uint32_t>(layout.blocks);
  const int64_t blocks = (work.last_tile - work.first_tile) * layout.blocks;
  for (int64_t index = first_row(); index < blocks; index += row_step()) {
    const uint32_t tile = static_cast<uint32_t>(index) / row_blocks;
    const uint32_t block = static_cast<uint32_t>(index) % row_blocks;
    const uint32_t group = block / static_cast<uint32_t>(layout.group_blocks);
    const int lane = warp_lane();
    unpack_run(work, {work.first_tile + tile, group, block - group * layout.group_blocks, lane / 2,
                      lane % 2 * kRun});
  }
}

}  // namespace

void launch_packed_product(const PackedProduct& p, void* stream) {
  launch_any_format(p, stream);
  launch_finish_product(p, stream);
}

void launch_finish_product(const PackedProduct& p, void* stream) {
  launch_rows("finish_product", finish_kernel, p, p.rows * warps_of_row(p), stream);
}

void launch_unpack_weight(const UnpackWeight& work, void* stream) {
  launch_rows("unpack_weight", unpack_weight_kernel, work,
              (work.last_tile - work.first_tile) * work.weight.layout.blocks, stream);
}

}  // namespace torchquant
