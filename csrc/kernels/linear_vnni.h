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

// One instruction each, written out: g++ 12 copies and spills accumulators around the intrinsics.
inline __attribute__((always_inline)) void add_products(__m512i& sum, __m512i u, const int8_t* a) {
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(sum)
      : "v"(u), "m"(*reinterpret_cast<const AnyInt32*>(a)));
}

inline __attribute__((always_inline)) void add_pairs(__m512i& sum, __m512i u, const int8_t* a) {
  asm("vpdpwssd %2%{1to16%}, %1, %0"
      : "+v"(sum)
      : "v"(u), "m"(*reinterpret_cast<const AnyInt32*>(a)));
}

inline __attribute__((always_inline)) __m512i masked(__m512i codes, int mask) {
  return _mm512_and_si512(codes, _mm512_set1_epi8(static_cast<char>(mask)));
}

// Each format calls visit(step, V[step]) for a block's lines; t is the tile within the panel.
template <int kBits>
struct UniformCodes {
  UniformCodes() = default;
  UniformCodes(const PackedWeight&, int64_t) {}

  template <class Visit>
  inline __attribute__((always_inline)) void visit(const uint8_t* lines, const Visit& visit) const {
    constexpr int kLow = kBits == 3 ? 2 : kBits, kSteps = 8 / kLow;
    const __m512i high =
        kBits == 3 ? _mm512_loadu_si512(lines + 2 * kLine) : _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int line = 0; line < kLow; ++line) {
      const __m512i codes = _mm512_loadu_si512(lines + line * kLine);
#pragma GCC unroll 4
      for (int j = 0; j < kSteps; ++j) {
        const int step = line * kSteps + j;
        __m512i u =
            kBits == 8 ? codes : masked(_mm512_srli_epi16(codes, j * kLow), (1 << kLow) - 1);
        if constexpr (kBits == 3) {
          const __m512i moved =
              step < 2 ? _mm512_slli_epi16(high, 2 - step) : _mm512_srli_epi16(high, step - 2);
          u = _mm512_or_si512(u, masked(moved, 4));
        }
        visit(step, u);
      }
    }
  }
};

// Four-bit codes that index one table of levels.
struct SharedLevels {
  SharedLevels(const PackedWeight& weight, int64_t)
      : table(_mm512_xor_si512(_mm512_broadcast_i32x4(_mm_loadu_si128(
                                   reinterpret_cast<const __m128i*>(weight.levels))),
                               _mm512_set1_epi8(-128))) {}

  template <class Visit>
  inline __attribute__((always_inline)) void visit(const uint8_t* lines, const Visit& visit) const {
    UniformCodes<4>().visit(lines, [&](int step, __m512i codes) __attribute__((always_inline)) {
      visit(step, _mm512_shuffle_epi8(table, codes));
    });
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

  template <class Visit>
  inline __attribute__((always_inline)) void visit(const uint8_t* lines, const Visit& visit) const {
    UniformCodes<4>().visit(lines, [&](int step, __m512i codes) __attribute__((always_inline)) {
      __m512i u = _mm512_shuffle_epi8(tables[0], codes);
      u = _mm512_mask_shuffle_epi8(u, 0x00f000f000f000f0, tables[1], codes);
      u = _mm512_mask_shuffle_epi8(u, 0x0f000f000f000f00, tables[2], codes);
      u = _mm512_mask_shuffle_epi8(u, 0xf000f000f000f000, tables[3], codes);
      visit(step, u);
    });
  }

  __m512i tables[4];
};

constexpr int64_t kPrefetch = 2048;  // bytes ahead, where each line is read for few rows

template <int R, int T, class Format, bool kWide>
struct VnniTile {
  static constexpr int64_t kSize = kWide ? 2 : 1;

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
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const uint32_t sum = static_cast<uint32_t>(p.sums[(row + r) * w.layout.groups + g]);
      const __m512i start =
          _mm512_set1_epi32(static_cast<int32_t>(-static_cast<uint32_t>(w.origin) * sum));
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) d[r][t] = start;
    }
    const int64_t tile_bytes = w.layout.blocks * line_bytes;
    for (int64_t b = w.layout.blocks_of_group(g); b > 0; --b) {
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        if (R <= 4) __builtin_prefetch(lines + t * tile_bytes + kPrefetch);
        format.visit(lines + t * tile_bytes,
                     [&](int step, __m512i u) __attribute__((always_inline)) {
                       const int8_t* const x = a + step * 4 * kSize;
                       if constexpr (kWide) {
                         const __m512i even = _mm512_and_si512(u, _mm512_set1_epi16(0xff));
                         const __m512i odd = _mm512_srli_epi16(u, 8);
#pragma GCC unroll 6
                         for (int r = 0; r < R; ++r) add_pairs(d[r][t], even, x + r * depth);
#pragma GCC unroll 6
                         for (int r = 0; r < R; ++r) add_pairs(d[r][t], odd, x + r * depth + 4);
                       } else {
#pragma GCC unroll 6
                         for (int r = 0; r < R; ++r) add_products(d[r][t], u, x + r * depth);
                       }
                     });
      }
      lines += line_bytes;
      a += kBlockInputs * kSize;
    }
  }

  // values (+)= scale * (D + offset * S)
  inline __attribute__((always_inline)) void add_group(int64_t g, const __m512i (&d)[R][T],
                                                       float (*values)[T * kTileOutputs]) const {
    const PackedWeight& w = p.weight;
    const int64_t first = g * w.stride + tile * kTileOutputs;
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const __m512 scale = _mm512_loadu_ps(w.scale + first + t * kTileOutputs);
      const __m512 offset = w.offset == nullptr
                                ? _mm512_setzero_ps()
                                : _mm512_loadu_ps(w.offset + first + t * kTileOutputs);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        __m512 value = _mm512_cvtepi32_ps(d[r][t]);
        if (w.offset != nullptr) {
          const float sum = static_cast<float>(p.sums[(row + r) * w.layout.groups + g]);
          value = value + offset * _mm512_set1_ps(sum);
        }
        value = value * scale;
        float* const target = values[r] + t * kTileOutputs;
        if (g > 0) value = _mm512_loadu_ps(target) + value;
        _mm512_storeu_ps(target, value);
      }
    }
  }

  void run() const {
    alignas(64) float values[R][T * kTileOutputs];
    const Format format(p.weight, tile);
    for (int64_t g = 0; g < p.weight.layout.groups; ++g) {
      __m512i d[R][T];
      sum_group(format, g, g * p.weight.layout.group_blocks, d);
      add_group(g, d, values);
    }
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
  for (; tile + kPanelTiles <= p.last_tile; tile += kPanelTiles) {
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
