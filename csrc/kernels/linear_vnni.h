// The kernel for 64-byte vectors with vpdpbusd and vpdpwssd: R rows x T tiles of 16 outputs in
// registers over all inputs, codes unpacked on the way (the shifts run beside the products).
#pragma once
#include <csrc/kernels/linear_tile.h>

// g++ 12 takes the "undefined" operands inside its own intrinsics for mistakes of the caller.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace torchquant {
namespace {

using AnyInt32 = int32_t __attribute__((may_alias));

inline __attribute__((always_inline)) __m512i broadcast4(const int8_t* a) {
  return _mm512_set1_epi32(*reinterpret_cast<const AnyInt32*>(a));
}

// One instruction each, written out: g++ 12 copies and spills accumulators around the intrinsics.
inline __attribute__((always_inline)) void add_products(__m512i& sum, __m512i u, __m512i a) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(a));
}

inline __attribute__((always_inline)) void add_pairs(__m512i& sum, __m512i u, __m512i a) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(a));
}

inline __attribute__((always_inline)) __m512i masked(__m512i codes, int mask) {
  return _mm512_and_si512(codes, _mm512_set1_epi8(static_cast<char>(mask)));
}

// Each format has V[step] of a block from its lines.
template <int kBits>
struct UniformCodes {
  UniformCodes() = default;
  UniformCodes(const PackedWeight&, int64_t) {}

  inline __attribute__((always_inline)) __m512i at(int step, const uint8_t* lines) const {
    constexpr int kLow = kBits == 3 ? 2 : kBits, kPerLine = 8 / kLow;
    const __m512i codes = _mm512_loadu_si512(lines + step / kPerLine * kLine);
    if constexpr (kBits == 8) return codes;
    const int shift = step % kPerLine * kLow;
    __m512i u = masked(shift == 0 ? codes : _mm512_srli_epi16(codes, shift), (1 << kLow) - 1);
    if constexpr (kBits == 3) {
      const __m512i high = _mm512_loadu_si512(lines + 2 * kLine);
      const __m512i moved =
          step < 2 ? _mm512_slli_epi16(high, 2 - step) : _mm512_srli_epi16(high, step - 2);
      u = _mm512_or_si512(u, masked(moved, 4));
    }
    return u;
  }
};

// Four-bit codes that index one table of levels.
struct SharedLevels {
  SharedLevels(const PackedWeight& weight, int64_t)
      : table(_mm512_xor_si512(_mm512_broadcast_i32x4(_mm_loadu_si128(
                                   reinterpret_cast<const __m128i*>(weight.levels))),
                               _mm512_set1_epi8(-128))) {}

  inline __attribute__((always_inline)) __m512i at(int step, const uint8_t* lines) const {
    return _mm512_shuffle_epi8(table, UniformCodes<4>().at(step, lines));
  }

  __m512i table;
};

// The same with a table for each output: lane l of tables[q] is that of output 4 l + q.
struct RowLevels {
  RowLevels(const PackedWeight& weight, int64_t tile) {
    for (int q = 0; q < 4; ++q) {
      alignas(64) int8_t rows[4][16];
      for (int lane = 0; lane < 4; ++lane) {
        const int8_t* row = weight.levels + (tile * kTileOutputs + 4 * lane + q) * 16;
        for (int i = 0; i < 16; ++i) rows[lane][i] = row[i];
      }
      tables[q] = _mm512_xor_si512(_mm512_load_si512(rows), _mm512_set1_epi8(-128));
    }
  }

  inline __attribute__((always_inline)) __m512i at(int step, const uint8_t* lines) const {
    const __m512i codes = UniformCodes<4>().at(step, lines);
    __m512i u = _mm512_shuffle_epi8(tables[0], codes);
    u = _mm512_mask_shuffle_epi8(u, 0x00f000f000f000f0, tables[1], codes);
    u = _mm512_mask_shuffle_epi8(u, 0x0f000f000f000f00, tables[2], codes);
    return _mm512_mask_shuffle_epi8(u, 0xf000f000f000f000, tables[3], codes);
  }

  __m512i tables[4];
};

constexpr int64_t kPrefetch = 4096;  // bytes ahead, where each line is read for one or two rows

template <int R, int T, class Format, bool kWide>
struct VnniTile {
  static constexpr int64_t kSize = kWide ? 2 : 1;
  // Sums side by side: with few of them every product would wait for the one before.
  static constexpr int kChains = R * T == 1 ? 4 : 1;

  const PackedProduct& p;
  const int64_t row;
  const int64_t tile;

  // D of one group, starting at `block`.
  inline __attribute__((always_inline)) void sum_group(const Format& format, int64_t g,
                                                       int64_t block, __m512i (&d)[R][T]) const {
    const PackedWeight& w = p.weight;
    const int64_t depth = w.layout.blocks * kBlockInputs * kSize;
    const int64_t line_bytes = w.layout.bits * kLine;
    const int8_t* a = kWide ? reinterpret_cast<const int8_t*>(p.wide) : p.narrow;
    a += row * depth + block * kBlockInputs * kSize;
    const uint8_t* lines = w.packed + (tile * w.layout.blocks + block) * line_bytes;
    __m512i sums[R][T][kChains];
    for_each_sum([&](int r, int t) __attribute__((always_inline)) {
      const uint32_t sum = static_cast<uint32_t>(p.sums[(row + r) * w.layout.groups + g]);
      sums[r][t][0] =
          _mm512_set1_epi32(static_cast<int32_t>(-static_cast<uint32_t>(w.origin) * sum));
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) sums[r][t][c] = _mm512_setzero_si512();
    });
    const int64_t tile_bytes = w.layout.blocks * line_bytes;
    for (int64_t b = w.layout.blocks_of_group(g); b > 0; --b) {
      add_block(format, lines, tile_bytes, a, depth, sums);
      lines += line_bytes;
      a += kBlockInputs * kSize;
    }
    for_each_sum([&](int r, int t) __attribute__((always_inline)) {
      d[r][t] = sums[r][t][0];
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) d[r][t] = _mm512_add_epi32(d[r][t], sums[r][t][c]);
    });
  }

  template <class Visit>
  static inline __attribute__((always_inline)) void for_each_sum(const Visit& visit) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) visit(r, t);
    }
  }

  // One block of every tile, for all rows.
  inline __attribute__((always_inline)) void add_block(const Format& format, const uint8_t* lines,
                                                       int64_t tile_bytes, const int8_t* a,
                                                       int64_t depth,
                                                       __m512i (&sums)[R][T][kChains]) const {
    if (R <= 2) {
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        for (int64_t i = 0; i < p.weight.layout.bits; ++i)
          __builtin_prefetch(lines + t * tile_bytes + i * kLine + kPrefetch);
      }
    }
#pragma GCC unroll 8
    for (int step = 0; step < 8; ++step) {
      __m512i u[T];
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) u[t] = format.at(step, lines + t * tile_bytes);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) add_row(u, a + r * depth + step * 4 * kSize, step, sums[r]);
    }
  }

  static inline __attribute__((always_inline)) void add_row(const __m512i (&u)[T], const int8_t* a,
                                                            int step, __m512i (&sums)[T][kChains]) {
    const __m512i four = broadcast4(a), next = kWide ? broadcast4(a + 4) : four;
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      __m512i& sum = sums[t][step % kChains];
      if constexpr (kWide) {
        add_pairs(sum, _mm512_and_si512(u[t], _mm512_set1_epi16(0xff)), four);
        add_pairs(sum, _mm512_srli_epi16(u[t], 8), next);
      } else {
        add_products(sum, u[t], four);
      }
    }
  }

  // scale * (D + offset * S) of one row, tile and group, added to those of the groups before.
  inline __attribute__((always_inline)) __m512 value_of(int64_t g, int r, int t, __m512i d,
                                                        const float* before) const {
    const PackedWeight& w = p.weight;
    const int64_t at = g * w.stride + (tile + t) * kTileOutputs;
    __m512 value = _mm512_cvtepi32_ps(d);
    if (w.offset != nullptr) {
      const float sum = static_cast<float>(p.sums[(row + r) * w.layout.groups + g]);
      value = value + _mm512_loadu_ps(w.offset + at) * _mm512_set1_ps(sum);
    }
    value = value * _mm512_loadu_ps(w.scale + at);
    return g > 0 ? _mm512_loadu_ps(before) + value : value;
  }

  // finish_row in a register, for the outputs of a tile that are there.
  inline __attribute__((always_inline)) void finish(int r, int t, __m512 y) const {
    const int64_t output = (tile + t) * kTileOutputs, left = p.weight.outputs - output;
    const auto there = static_cast<__mmask16>(left < kTileOutputs ? (1 << left) - 1 : 0xffff);
    if (p.a_zero != nullptr)
      y = y - _mm512_set1_ps(p.a_zero[row + r]) * _mm512_loadu_ps(p.weight.sum + output);
    y = y * _mm512_set1_ps(p.a_scale[row + r]);
    if (p.bias != nullptr) y = y + _mm512_maskz_loadu_ps(there, p.bias + output);
    const int64_t at = (row + r) * p.weight.outputs + output;
    if (p.residual != nullptr) y = y + _mm512_maskz_loadu_ps(there, p.residual + at);
    _mm512_mask_storeu_ps(p.out + at, there, y);
  }

  void run() const {
    alignas(64) float values[R][T * kTileOutputs];
    const Format format(p.weight, tile);
    const int64_t groups = p.weight.layout.groups;
    const bool in_registers = p.epilogue == Epilogue::none;
    for (int64_t g = 0; g < groups; ++g) {
      __m512i d[R][T];
      sum_group(format, g, g * p.weight.layout.group_blocks, d);
      for_each_sum([&](int r, int t) __attribute__((always_inline)) {
        float* const before = values[r] + t * kTileOutputs;
        const __m512 value = value_of(g, r, t, d[r][t], before);
        if (g + 1 == groups && in_registers) {
          finish(r, t, value);
        } else {
          _mm512_store_ps(before, value);
        }
      });
    }
    if (in_registers) return;
    const int64_t outputs = outputs_of(p, tile, T);
    for (int r = 0; r < R; ++r) finish_row(p, row + r, tile * kTileOutputs, outputs, values[r]);
  }
};

template <int R, int T, class Format, bool kWide>
void run_tile_rows(const PackedProduct& p, int64_t tile, int64_t& row) {
  for (; row + R <= p.rows; row += R) VnniTile<R, T, Format, kWide>{p, row, tile}.run();
}

// All rows with T tiles. Three or five rows at the end are one pass where a panel is full.
template <int T, class Format, bool kWide>
void run_tiles(const PackedProduct& p, int64_t tile) {
  int64_t row = 0;
  run_tile_rows<6, T, Format, kWide>(p, tile, row);
  if constexpr (T == 4 && !kWide) run_tile_rows<5, T, Format, kWide>(p, tile, row);
  run_tile_rows<4, T, Format, kWide>(p, tile, row);
  if constexpr (T == 4 && !kWide) run_tile_rows<3, T, Format, kWide>(p, tile, row);
  run_tile_rows<2, T, Format, kWide>(p, tile, row);
  run_tile_rows<1, T, Format, kWide>(p, tile, row);
}

template <class Format, int kPanelTiles = 4>
void run_format(const PackedProduct& p) {
  int64_t tile = p.first_tile;
  // For one row the weights are read once: in the order in which they lie.
  for (; p.rows > 1 && tile + kPanelTiles <= p.last_tile; tile += kPanelTiles) {
    p.wide != nullptr ? run_tiles<kPanelTiles, Format, true>(p, tile)
                      : run_tiles<kPanelTiles, Format, false>(p, tile);
  }
  for (; tile < p.last_tile; ++tile)
    p.wide != nullptr ? run_tiles<1, Format, true>(p, tile) : run_tiles<1, Format, false>(p, tile);
}

void run_vnni(const PackedProduct& p) {
  const PackedWeight& w = p.weight;
  if (w.levels != nullptr)
    return w.level_stride == 0 ? run_format<SharedLevels>(p) : run_format<RowLevels, 1>(p);
  switch (w.layout.bits) {
    case 2:
      return run_format<UniformCodes<2>>(p);
    case 3:
      return run_format<UniformCodes<3>>(p);
    case 4:
      return run_format<UniformCodes<4>>(p);
    default:
      return run_format<UniformCodes<8>>(p);
  }
}

}  // namespace
}  // namespace torchquant
