// The kernel for 64-byte vectors with vpdpbusd and vpdpwssd: R rows x T tiles of 16 outputs in
// registers over all inputs. Codes are unpacked on the way; of many rows the first leave them in a
// panel for the others.
#pragma once
#include <csrc/kernels/linear_plain.h>
#include <csrc/kernels/linear_zmm_groups.h>
#include <stdlib.h>

#include <array>
#include <new>
#include <type_traits>
#include <utility>

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

// All blocks of T tiles with their u in eight bits each: [blocks, T, 8, 64].
struct Panel {
  uint8_t* lines;

  inline __attribute__((always_inline)) __m512i at(int step, const uint8_t* from) const {
    return _mm512_load_si512(from + step * kLine);
  }
};

// Codes of T tiles that go to a panel as they are used.
template <class Codes, int T>
struct Unpacked {
  using Format = Codes;
  static constexpr int kFormats = std::is_same_v<Format, SharedLevels> ? 1 : T;

  inline __attribute__((always_inline)) __m512i at(int t, int step, const uint8_t* lines) const {
    return formats[t % kFormats].at(step, lines);
  }

  std::array<Format, kFormats> formats;
  uint8_t* panel;
};

template <class Format, int T, class... Where>
Unpacked<Format, T> unpacked(uint8_t* panel, const PackedWeight& w, int64_t tile, Where... where) {
  return [&]<size_t... t>(std::index_sequence<t...>) {
    return Unpacked<Format, T>{{Format(w, tile + static_cast<int64_t>(t), where...)...}, panel};
  }(std::make_index_sequence<Unpacked<Format, T>::kFormats>());
}

template <class Codes>
constexpr bool is_unpacked = false;
template <class Format, int T>
constexpr bool is_unpacked<Unpacked<Format, T>> = true;

template <class Codes>
constexpr bool is_unpacked_of_groups = false;
template <int kBits, int T>
constexpr bool is_unpacked_of_groups<Unpacked<MultipliedCodes<kBits>, T>> = true;

// `Codes`: a format, a panel, or Unpacked.
template <int R, int T, class Codes, bool kWide>
struct VnniTile {
  static constexpr int64_t kSize = kWide ? 2 : 1;
  // Sums side by side: with few of them every product would wait for the one before.
  static constexpr int kChains = R * T == 1 ? 4 : 1;

  const PackedProduct& p;
  const Codes& codes;
  const int64_t row;
  const int64_t tile;

  // D of one group, starting at `block`.
  inline __attribute__((always_inline)) void sum_group(int64_t g, int64_t block,
                                                       __m512i (&d)[R][T]) const {
    for_each_sum([&](int r, int t) __attribute__((always_inline)) {
      d[r][t] = _mm512_set1_epi32(start_of(p, g, row + r));
    });
    const int64_t blocks = p.weight.layout.blocks_of_group(g);
    if constexpr (is_unpacked_of_groups<Codes>) {
      for_each_group(p.weight, block, block + blocks,
                     [&](int64_t first, int64_t count) __attribute__((always_inline)) {
                       using Group = typename Codes::Format::Group;
                       add_blocks(unpacked<Group, T>(codes.panel, p.weight, tile, first), first,
                                  count, d);
                     });
    } else {
      add_blocks(codes, block, blocks, d);
    }
  }

  // D of one span, whose groups are summed and multiplied one by one: Note [integer groups].
  inline __attribute__((always_inline)) void sum_span(int64_t span, int64_t block,
                                                      __m512i (&d)[R][T]) const {
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
      add_blocks(codes, block, end - block < size ? end - block : size, sums);
      for_each_sum([&](int r, int t) __attribute__((always_inline)) {
        const __m512i by = group_multipliers(w, block, tile + t);
        d[r][t] = _mm512_add_epi32(d[r][t], _mm512_mullo_epi32(sums[r][t], by));
      });
    }
  }

  // d += u * a over `blocks` blocks.
  template <class Some>
  inline __attribute__((always_inline)) void add_blocks(const Some& some, int64_t block,
                                                        int64_t blocks, __m512i (&d)[R][T]) const {
    const PackedWeight& w = p.weight;
    const int64_t depth = w.layout.blocks * kBlockInputs * kSize;
    const int8_t* a = kWide ? reinterpret_cast<const int8_t*>(p.wide) : p.narrow;
    a += row * depth + block * kBlockInputs * kSize;
    const uint8_t* lines = nullptr;
    int64_t tile_bytes = kBlockBytes, block_bytes = T * kBlockBytes;
    uint8_t* panel = nullptr;
    if constexpr (std::is_same_v<Codes, Panel>) {
      lines = some.lines + block * block_bytes;
    } else {
      if constexpr (is_unpacked<Some>) panel = some.panel + block * block_bytes;
      lines = lines_of(w, tile, block);
      block_bytes = w.layout.bits * kLine;
      tile_bytes = w.layout.blocks * block_bytes;
    }
    __m512i sums[R][T][kChains];
    for_each_sum([&](int r, int t) __attribute__((always_inline)) {
      sums[r][t][0] = d[r][t];
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) sums[r][t][c] = _mm512_setzero_si512();
    });
    for (int64_t b = blocks; b > 0; --b) {
      add_block(some, lines, tile_bytes, panel, a, depth, sums);
      lines += block_bytes;
      if (is_unpacked<Some>) panel += T * kBlockBytes;
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
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) visit(r, t);
    }
  }

  // One block of every tile, for all rows.
  template <class Some>
  inline __attribute__((always_inline)) void add_block(const Some& some, const uint8_t* lines,
                                                       int64_t tile_bytes, uint8_t* panel,
                                                       const int8_t* a, int64_t depth,
                                                       __m512i (&sums)[R][T][kChains]) const {
    if (R <= 2 && !std::is_same_v<Codes, Panel>) {
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
      for (int t = 0; t < T; ++t) {
        if constexpr (is_unpacked<Some>) {
          u[t] = some.at(t, step, lines + t * tile_bytes);
          _mm512_store_si512(panel + t * kBlockBytes + step * kLine, u[t]);
        } else {
          u[t] = some.at(step, lines + t * tile_bytes);
        }
      }
#pragma GCC unroll 8
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

  inline __attribute__((always_inline)) void run() const {
    alignas(64) float values[R][T * kTileOutputs];
    const int64_t groups = p.weight.layout.groups;
    const bool activates = p.epilogue != Epilogue::none;
    for (int64_t g = 0; g < groups; ++g) {
      __m512i d[R][T];
      const int64_t block = g * p.weight.layout.group_blocks;
      if constexpr (is_multiplied<Codes>) {
        sum_span(g, block, d);
      } else {
        sum_group(g, block, d);
      }
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const TileOutputs outputs(p, g, tile + t);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          float* const before = values[r] + t * kTileOutputs;
          __m512 value = outputs.value(p, g, row + r, d[r][t], before);
          if (g + 1 == groups) value = outputs.scaled(p, row + r, value);
          if (g + 1 == groups && !activates) {
            outputs.store(p, row + r, tile + t, value);
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
      const TileOutputs outputs(p, groups - 1, tile + t);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        outputs.store(p, row + r, tile + t, _mm512_load_ps(values[r] + t * kTileOutputs));
    }
  }
};

// R rows at a time.
template <int R, int T, bool kWide, class What = Anything, class Codes>
void run_tile_rows(const PackedProduct& all, const Codes& codes, int64_t tile, int64_t& row) {
  PackedProduct p = all;  // copied: stores to `out` could change what is behind a reference
  What::know(p);
  int64_t at = row;
  for (; at + R <= p.rows; at += R) VnniTile<R, T, Codes, kWide>{p, codes, at, tile}.run();
  row = at;
}

// From `row` on, with T tiles. Three or five rows are one pass where registers are full.
template <int T, bool kWide, class Codes>
void run_rows(const PackedProduct& p, const Codes& codes, int64_t tile, int64_t row) {
  run_tile_rows<6, T, kWide>(p, codes, tile, row);
  if constexpr (T >= 3 && !kWide) run_tile_rows<5, T, kWide>(p, codes, tile, row);
  run_tile_rows<4, T, kWide>(p, codes, tile, row);
  if constexpr (T >= 3 && !kWide) run_tile_rows<3, T, kWide>(p, codes, tile, row);
  run_tile_rows<2, T, kWide>(p, codes, tile, row);
  run_tile_rows<1, T, kWide>(p, codes, tile, row);
}

template <int T, class Codes>
void run_tiles(const PackedProduct& p, const Codes& codes, int64_t tile) {
  p.wide != nullptr ? run_rows<T, true>(p, codes, tile, 0) : run_rows<T, false>(p, codes, tile, 0);
}

constexpr int64_t kPanelRows = 8;  // in registers, with kPanelTiles; from here on panels pay
constexpr int kPanelTiles = 3;

// All rows with T tiles, by way of a panel.
template <class Format, int T, bool kWide>
void run_panel(const PackedProduct& p, int64_t tile, uint8_t* lines) {
  int64_t row = 0;
  PackedProduct q = p;
  if (is_multiplied<Format>) q.weight.origin = kByteOrigin;
  if constexpr (std::is_same_v<Format, RowLevels>) {  // their tables leave no registers for sums
    const int64_t blocks = p.weight.layout.blocks;
    for (int64_t t = 0; t < T; ++t)
      unpack_blocks(Format(p.weight, tile + t), p.weight, tile + t,
                    {0, blocks, blocks, T * kBlockBytes}, lines + t * kBlockBytes);
  } else {
    const auto codes = unpacked<Format, T>(lines, p.weight, tile);
    if (is_multiplied<Format> && p.rows < kPanelRows) {
      q.rows = 1;
      run_tile_rows<1, T, kWide>(q, codes, tile, row);
    } else {
      q.rows = kPanelRows;
      run_tile_rows<kPanelRows, T, kWide>(q, codes, tile, row);
    }
    q.rows = p.rows;
  }
  const Panel panel{lines};
  if constexpr (kWide) {
    run_tile_rows<kPanelRows, T, true>(q, panel, tile, row);
  } else {
    with_plain(q, [&](auto what) {
      run_tile_rows<kPanelRows, T, false, decltype(what)>(q, panel, tile, row);
    });
  }
  run_rows<T, kWide>(q, panel, tile, row);
}

template <class Format, bool kWide>
void run_panels(const PackedProduct& p) {
  const auto size = static_cast<size_t>(kPanelTiles * p.weight.layout.blocks * kBlockBytes);
  auto* const lines = static_cast<uint8_t*>(aligned_alloc(kLine, size));
  if (lines == nullptr) throw std::bad_alloc();
  for (int64_t tile = p.first_tile; tile < p.last_tile;) {
    const int64_t left = p.last_tile - tile;
    if (left == 1) {
      run_panel<Format, 1, kWide>(p, tile, lines);
      tile += 1;
    } else if (left == 2 || left == 4) {
      run_panel<Format, 2, kWide>(p, tile, lines);
      tile += 2;
    } else {
      run_panel<Format, 3, kWide>(p, tile, lines);
      tile += 3;
    }
  }
  free(lines);
}

template <class Format, int kTiles = 4>
void run_format(const PackedProduct& p) {
  if (is_multiplied<Format> ? p.starts == nullptr : p.rows >= kPanelRows)
    return p.wide != nullptr ? run_panels<Format, true>(p) : run_panels<Format, false>(p);
  int64_t tile = p.first_tile;
  // For one row the weights are read once: in the order in which they lie.
  for (; p.rows > 1 && tile + kTiles <= p.last_tile; tile += kTiles)
    run_tiles<kTiles>(p, Format(p.weight, tile), tile);
  for (; tile < p.last_tile; ++tile) run_tiles<1>(p, Format(p.weight, tile), tile);
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
