// The kernels for 32-byte vectors, with and without vpdpbusd. A tile's codes are unpacked into a
// panel in L1, which all rows then use; up to four rows at once take them from their lines
// directly.
//
// Note [int16 windows]: vpmaddubsw adds two products u * a to an int16, and further pairs are added
// in int16 (vpaddw) before vpmaddwd widens them. A window of w steps fits when
// 2 w * 128 * max(u) < 2^15: 8 steps of four bits, 16 of three, 40 of two; for small levels see
// linear_ymm_levels.h. Larger u (eight bits, levels) and 16-bit activations go through vpmaddwd
// alone, in int32. vpdpbusd and vpdpwssd add four and two products to an int32: no windows, and no
// u that is too large.
#pragma once
#include <csrc/kernels/linear_ymm_finish.h>
#include <csrc/kernels/linear_ymm_groups.h>
#include <csrc/kernels/linear_ymm_levels.h>

namespace torchquant {
namespace {

constexpr int64_t kRowsAtOnce = 192;  // sums and values of these rows stay in L1 and L2

template <class Source>
void unpack_blocks(const Source& source, int64_t blocks, uint8_t* panel) {
  for (int64_t b = 0; b < blocks; ++b, panel += kSteps * kLine) {
#pragma GCC unroll 8
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) store(panel + step * kLine + 32 * h, source(b, step, h));
    }
  }
}

// The codes of a tile as they are, or their levels: use(source) from block `block` on.
struct UniformCodes {
  template <class Use>
  void with_source(const PackedWeight& w, int64_t tile, int64_t block, const Use& use) const {
    const uint8_t* const lines = lines_of(w, tile, block);
    switch (w.layout.bits) {
      case 2:
        return use(PackedSteps<2>{lines});
      case 3:
        return use(PackedSteps<3>{lines});
      case 4:
        return use(PackedSteps<4>{lines});
      default:
        return use(PackedSteps<8>{lines});
    }
  }
};

template <class Tables>
struct LevelCodes {
  template <class Use>
  void with_source(const PackedWeight& w, int64_t tile, int64_t block, const Use& use) const {
    use(LevelSteps<Tables>{{lines_of(w, tile, block)}, tables});
  }

  const Tables tables;
};

// sums[r][16] += u * a over blocks, for R rows, in windows of `window` blocks.
template <int R, class Source>
__attribute__((noinline)) void add_windows(const Source& source, int64_t blocks, int64_t window,
                                           const int8_t* a, int64_t stride, int32_t* sums) {
  const __m256i ones[2] = {_mm256_set1_epi16(1), _mm256_set1_epi16(1)};
  for (int64_t first = 0; first < blocks; first += window) {
    const int64_t end = first + window < blocks ? first + window : blocks;
    add_window<R>(source, first, end, a, stride, ones, sums);
  }
}

// The same by sums in int32.
template <int R, bool kVnni, bool kWide, class Source>
__attribute__((noinline)) void add_all(const Source& source, int64_t blocks, const int8_t* a,
                                       int64_t stride, int32_t* sums) {
  __m256i d[R][2];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) d[r][0] = d[r][1] = _mm256_setzero_si256();
  add_blocks<R, kVnni, kWide>(source, 0, blocks, a, stride, d);
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    add_to(sums + r * kTileOutputs, d[r][0]);
    add_to(sums + r * kTileOutputs + 8, d[r][1]);
  }
}

// One run of blocks times all rows of a chunk.
struct Run {
  const PackedProduct& p;
  int64_t first_row;
  int64_t rows;
  int64_t block;
  int64_t blocks;
  int32_t* sums;                            // [rows, 16]
  const GroupTable* multipliers = nullptr;  // of these blocks, where starts are given
  const LevelWindows* windows = nullptr;    // of the chunk

  template <int R, class Source>
  void take(const Source& source, int64_t& row) const {
    p.tier == CpuTier::avx2_vnni ? take_with<R, true>(source, row)
                                 : take_with<R, false>(source, row);
  }

  template <int R, bool kVnni, class Source>
  inline __attribute__((always_inline)) void take_with(const Source& source, int64_t& row) const {
    const int64_t size = p.wide != nullptr ? 2 : 1;
    const int64_t stride = p.weight.layout.blocks * kBlockInputs * size;
    const auto* const all = p.wide != nullptr ? reinterpret_cast<const int8_t*>(p.wide) : p.narrow;
    for (; row + R <= rows; row += R) {
      const int8_t* const a = all + (first_row + row) * stride + block * kBlockInputs * size;
      int32_t* const target = sums + row * kTileOutputs;
      if (Source::kUniform && multipliers != nullptr) {
        const GroupRun groups = groups_of(row, stride);
        p.wide != nullptr ? add_groups<R, kVnni, true>(source, groups, a, target)
        : kVnni           ? add_groups<R, kVnni, false>(source, groups, a, target)
                          : add_group_windows<R>(source, groups, a, target);
      } else if (p.wide != nullptr) {
        add_all<R, kVnni, true>(source, blocks, a, stride, target);
      } else if (kVnni) {
        add_all<R, true, false>(source, blocks, a, stride, target);
      } else if (Source::kLevels && windows != nullptr) {
        add_levels<R>(source, row, a, stride, target);
      } else if (Source::kUniform) {
        add_windows<R>(source, blocks, window_blocks(p.weight.layout.bits), a, stride, target);
      }
    }
  }

  template <int R, class Source>
  void add_levels(const Source& source, int64_t row, const int8_t* a, int64_t stride,
                  int32_t* target) const {
    const int32_t* const starts =
        windows->starts.data() + row * windows->stride + block * windows->of_block();
    windows->steps == 4
        ? add_level_windows<R, 4>(source, blocks, starts, windows->stride, a, stride, target)
        : add_level_windows<R, 2>(source, blocks, starts, windows->stride, a, stride, target);
  }

  GroupRun groups_of(int64_t row, int64_t stride) const {
    const GroupStarts& s = p.group_starts;
    const int32_t* const starts = p.starts + block / s.blocks * s.rows + first_row + row;
    const GroupMultipliers& m = p.weight.multipliers;
    const int64_t window = window_blocks(p.weight.layout.bits);
    return {*multipliers, m.offset == nullptr, blocks, m.blocks, window, stride, starts, s.rows};
  }

  void from_panel(const uint8_t* panel) const {
    int64_t row = 0;
    take<6>(PanelSteps{panel}, row);
    take<4>(PanelSteps{panel}, row);
    take<2>(PanelSteps{panel}, row);
    take<1>(PanelSteps{panel}, row);
  }

  // Of at most four rows.
  template <class Source>
  void from_lines(const Source& source) const {
    int64_t row = 0;
    take<4>(source, row);
    take<2>(source, row);
    take<1>(source, row);
  }
};

void start_sums(const PackedProduct& p, int64_t g, int64_t first_row, int64_t rows, int32_t* sums) {
  const uint32_t origin = static_cast<uint32_t>(p.weight.origin);
  for (int64_t r = 0; r < rows; ++r) {
    const auto sum = static_cast<uint32_t>(p.sums[(first_row + r) * p.weight.layout.groups + g]);
    for (int64_t o = 0; o < kTileOutputs; ++o)
      sums[r * kTileOutputs + o] = static_cast<int32_t>(-origin * sum);
  }
}

template <class Codes>
void sum_group(const PackedProduct& p, const Codes& codes, const LevelWindows* windows,
               int64_t tile, int64_t g, int64_t first_row, int64_t rows, int32_t* sums) {
  const BlockLayout& layout = p.weight.layout;
  const int64_t block = g * layout.group_blocks, blocks = layout.blocks_of_group(g);
  start_sums(p, g, first_row, rows, sums);
  Run run{p, first_row, rows, block, blocks, sums, nullptr, windows};
  if (rows <= 4) {
    codes.with_source(p.weight, tile, block, [&](const auto& source) { run.from_lines(source); });
    return;
  }
  alignas(64) uint8_t panel[kSegmentBlocks * kSteps * kLine];
  for (; run.block < block + blocks; run.block += kSegmentBlocks) {
    const int64_t left = block + blocks - run.block;
    run.blocks = left < kSegmentBlocks ? left : kSegmentBlocks;
    codes.with_source(p.weight, tile, run.block,
                      [&](const auto& source) { unpack_blocks(source, run.blocks, panel); });
    run.from_panel(panel);
  }
}

// Note [integer groups]: the sums of windows or groups are multiplied where starts are given for
// them, elsewhere the weight itself.
void sum_span(const PackedProduct& p, const UniformCodes& codes, int64_t tile, int64_t span,
              int64_t first_row, int64_t rows, int32_t* sums) {
  const BlockLayout& layout = p.weight.layout;
  const int64_t group = p.weight.multipliers.blocks, step = kSegmentBlocks / group * group;
  const int64_t first = span * layout.group_blocks, end = first + layout.blocks_of_group(span);
  const bool multiplies_sums = p.starts != nullptr;
  if (multiplies_sums) {
    for (int64_t i = 0; i < rows * kTileOutputs; ++i) sums[i] = 0;
  } else {
    start_sums(p, span, first_row, rows, sums);
  }
  GroupTable table;
  alignas(64) uint8_t panel[kSegmentBlocks * kSteps * kLine];
  for (int64_t block = first; block < end; block += step) {
    const int64_t blocks = end - block < step ? end - block : step;
    Run run{p, first_row, rows, block, blocks, sums};
    if (multiplies_sums) {
      table.fill(p, tile, block, blocks);
      run.multipliers = &table;
      const bool direct = rows <= 4;
      codes.with_source(p.weight, tile, block, [&](const auto& source) {
        direct ? run.from_lines(source) : unpack_blocks(source, blocks, panel);
      });
      if (direct) continue;
    } else {
      unpack_multiplied(p.weight, tile, block, blocks, panel);
    }
    run.from_panel(panel);
  }
}

template <class Codes>
void run_avx2_tile(const PackedProduct& p, const Codes& codes, const LevelWindows* windows,
                   int64_t tile, int64_t first_row, int64_t rows) {
  alignas(64) int32_t sums[kRowsAtOnce * kTileOutputs];
  alignas(64) float values[kRowsAtOnce * kTileOutputs];
  const int64_t output = tile * kTileOutputs;
  const bool plain = is_plain(p) && output + kTileOutputs <= p.weight.outputs;
  for (int64_t g = 0; g < p.weight.layout.groups; ++g) {
    if (p.weight.multipliers.values != nullptr) {
      sum_span(p, UniformCodes(), tile, g, first_row, rows, sums);
    } else {
      sum_group(p, codes, windows, tile, g, first_row, rows, sums);
    }
    if (plain) {
      with_plain(p, [&](auto what) {
        if constexpr (decltype(what)::kPlain)
          finish_plain<decltype(what)>(p, g, tile, first_row, rows, sums, values);
      });
      continue;
    }
    for (int64_t r = 0; r < rows; ++r)
      add_group(p, g, first_row + r, output, sums + r * kTileOutputs, values + r * kTileOutputs);
  }
  if (!plain) finish_tile(p, tile, first_row, rows, values);
}

template <class Tables>
void run_levels(PackedProduct p, int64_t first_row, int64_t rows) {
  LevelWindows windows;
  const bool small = p.narrow != nullptr && p.tier != CpuTier::avx2_vnni;
  if (small) {
    windows.fill(p, first_row, rows);
    p.weight.origin = 0;  // it is in the windows' starts
  }
  const auto origin = static_cast<int8_t>(small ? windows.origin : p.weight.origin);
  for (int64_t tile = p.first_tile; tile < p.last_tile; ++tile) {
    const LevelCodes<Tables> codes{Tables(p.weight, tile, origin)};
    run_avx2_tile(p, codes, small ? &windows : nullptr, tile, first_row, rows);
  }
}

void run_avx2(PackedProduct p) {
  const PackedWeight& w = p.weight;
  if (w.multipliers.values != nullptr) p.weight.origin = kByteOrigin;
  const int64_t chunks = (p.rows + kRowsAtOnce - 1) / kRowsAtOnce;
  const int64_t most = chunks == 0 ? 1 : (p.rows + chunks - 1) / chunks;
  for (int64_t row = 0; row < p.rows; row += most) {
    const int64_t rows = p.rows - row < most ? p.rows - row : most;
    if (w.levels != nullptr) {
      w.level_stride == 0 ? run_levels<SharedLevels>(p, row, rows)
                          : run_levels<RowLevels>(p, row, rows);
      continue;
    }
    for (int64_t tile = p.first_tile; tile < p.last_tile; ++tile)
      run_avx2_tile(p, UniformCodes(), nullptr, tile, row, rows);
  }
}

}  // namespace
}  // namespace torchquant
