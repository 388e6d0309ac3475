// The kernel for 64-byte vectors with vpdpbusd and vpdpwssd: R rows x T tiles of 16 outputs in
// registers over all inputs. For few rows codes are unpacked on the way, for many once, to a panel.
#pragma once
#include <csrc/kernels/linear_zmm_groups.h>
#include <stdlib.h>

#include <new>

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
    for_each_sum([&](int r, int t) __attribute__((always_inline)) {
      d[r][t] = _mm512_set1_epi32(start_of(p, g, row + r));
    });
    add_blocks(format, block, p.weight.layout.blocks_of_group(g), d);
  }

  // D of one span, whose groups are summed and multiplied one by one: Note [integer groups].
  inline __attribute__((always_inline)) void sum_span(const Format& format, int64_t span,
                                                      int64_t block, __m512i (&d)[R][T]) const {
    const PackedWeight& w = p.weight;
    const int64_t end = block + w.layout.blocks_of_group(span), size = w.multipliers.blocks;
    for_each_sum([&](int r, int t)
                     __attribute__((always_inline)) { d[r][t] = _mm512_setzero_si512(); });
    for (; block < end; block += size) {
      const int32_t* const starts = p.starts + block / size * p.group_starts.rows + row;
      __m512i sums[R][T];
      for_each_sum([&](int r, int t) __attribute__((always_inline)) {
        sums[r][t] = _mm512_set1_epi32(starts[r]);
        if (w.multipliers.offset != nullptr)
          sums[r][t] = _mm512_mullo_epi32(sums[r][t], group_zeros(w, block, tile + t));
      });
      add_blocks(format, block, end - block < size ? end - block : size, sums);
      for_each_sum([&](int r, int t) __attribute__((always_inline)) {
        const __m512i by = group_multipliers(w, block, tile + t);
        d[r][t] = _mm512_add_epi32(d[r][t], _mm512_mullo_epi32(sums[r][t], by));
      });
    }
  }

  // d += u * a over `blocks` blocks.
  inline __attribute__((always_inline)) void add_blocks(const Format& format, int64_t block,
                                                        int64_t blocks, __m512i (&d)[R][T]) const {
    const PackedWeight& w = p.weight;
    const int64_t depth = w.layout.blocks * kBlockInputs * kSize;
    const int64_t line_bytes = w.layout.bits * kLine;
    const int8_t* a = kWide ? reinterpret_cast<const int8_t*>(p.wide) : p.narrow;
    a += row * depth + block * kBlockInputs * kSize;
    const uint8_t* lines = lines_of(w, tile, block);
    __m512i sums[R][T][kChains];
    for_each_sum([&](int r, int t) __attribute__((always_inline)) {
      sums[r][t][0] = d[r][t];
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) sums[r][t][c] = _mm512_setzero_si512();
    });
    const int64_t tile_bytes = w.layout.blocks * line_bytes;
    for (int64_t b = blocks; b > 0; --b) {
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

  void run() const {
    alignas(64) float values[R][T * kTileOutputs];
    const PackedProduct own = p;  // stores to `out` could change what is behind a reference
    const Format format(p.weight, tile);
    const int64_t groups = p.weight.layout.groups;
    const bool activates = p.epilogue != Epilogue::none;
    for (int64_t g = 0; g < groups; ++g) {
      __m512i d[R][T];
      const int64_t block = g * p.weight.layout.group_blocks;
      if constexpr (is_multiplied<Format>) {
        sum_span(format, g, block, d);
      } else {
        sum_group(format, g, block, d);
      }
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const TileOutputs outputs(own, g, tile + t);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          float* const before = values[r] + t * kTileOutputs;
          __m512 value = outputs.value(own, g, row + r, d[r][t], before);
          if (g + 1 == groups) value = outputs.scaled(own, row + r, value);
          if (g + 1 == groups && !activates) {
            outputs.store(own, row + r, tile + t, value);
          } else {
            _mm512_store_ps(before, value);
          }
        }
      }
    }
    if (!activates) return;
    activate(p.epilogue, values[0], R * T * kTileOutputs);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const TileOutputs outputs(own, groups - 1, tile + t);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
        outputs.store(own, row + r, tile + t, _mm512_load_ps(values[r] + t * kTileOutputs));
    }
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

constexpr int64_t kVnniTiles = 4;  // in registers

// T tiles at a time, with their u in eight bits each.
template <int T, class Format>
void run_panels(const PackedProduct& p, int64_t& tile, uint8_t* panel) {
  PackedProduct bytes = p;
  bytes.weight.layout.bits = 8;
  bytes.weight.packed = panel;
  if (is_multiplied<Format>) bytes.weight.origin = kByteOrigin;
  for (; tile + T <= p.last_tile; tile += T) {
    const int64_t blocks = p.weight.layout.blocks;
    for (int64_t t = 0; t < T; ++t)
      unpack_blocks(Format(p.weight, tile + t), p.weight, tile + t, 0, blocks,
                    panel + t * blocks * kBlockBytes);
    bytes.weight.packed_tile = tile;
    p.wide != nullptr ? run_tiles<T, UniformCodes<8>, true>(bytes, tile)
                      : run_tiles<T, UniformCodes<8>, false>(bytes, tile);
  }
}

template <class Format, int kTiles = kVnniTiles>
void run_format(const PackedProduct& p) {
  int64_t tile = p.first_tile;
  const bool multiplied = is_multiplied<Format> && p.starts == nullptr;
  const bool is_bytes = p.weight.levels == nullptr && p.weight.layout.bits == 8;
  const bool many = p.rows >= Format::kPanelRows && !is_bytes && tile + kVnniTiles <= p.last_tile;
  if (multiplied || many) {
    const auto size = static_cast<size_t>(kVnniTiles * p.weight.layout.blocks * kBlockBytes);
    auto* const panel = static_cast<uint8_t*>(aligned_alloc(kLine, size));
    if (panel == nullptr && multiplied) throw std::bad_alloc();
    if (panel != nullptr) run_panels<kVnniTiles, Format>(p, tile, panel);
    if (multiplied) run_panels<1, Format>(p, tile, panel);
    free(panel);
  }
  // For one row the weights are read once: in the order in which they lie.
  for (; p.rows > 1 && tile + kTiles <= p.last_tile; tile += kTiles) {
    p.wide != nullptr ? run_tiles<kTiles, Format, true>(p, tile)
                      : run_tiles<kTiles, Format, false>(p, tile);
  }
  for (; tile < p.last_tile; ++tile)
    p.wide != nullptr ? run_tiles<1, Format, true>(p, tile) : run_tiles<1, Format, false>(p, tile);
}

template <template <int> class Codes>
void run_vnni_codes(const PackedProduct& p) {
  switch (p.weight.layout.bits) {
    case 2:
      return run_format<Codes<2>>(p);
    case 3:
      return run_format<Codes<3>>(p);
    case 4:
      return run_format<Codes<4>>(p);
    default:
      return run_format<UniformCodes<8>>(p);
  }
}

void run_vnni(const PackedProduct& p) {
  const PackedWeight& w = p.weight;
  if (w.levels != nullptr)
    return w.level_stride == 0 ? run_format<SharedLevels>(p) : run_format<RowLevels, 1>(p);
  w.multipliers.values != nullptr ? run_vnni_codes<MultipliedCodes>(p)
                                  : run_vnni_codes<UniformCodes>(p);
}

}  // namespace
}  // namespace torchquant
