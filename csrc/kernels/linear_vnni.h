// The kernel for 64-byte vectors with vpdpbusd and vpdpwssd. Codes are unpacked on the way; of many
// rows the first leave them in a panel for the others.
#pragma once
#include <csrc/kernels/linear_plain.h>
#include <csrc/kernels/linear_vnni_tile.h>
#include <stdlib.h>

#include <new>

namespace torchquant {
namespace {

// Sums of group g, d(r, t), to `values`, and those of the last group to outputs. for_each calls its
// argument with every tile's outputs, r, t and the place of a tile's values.
template <class ForEach, class Sums>
inline __attribute__((always_inline)) void finish_group(const PackedProduct& p, int64_t g,
                                                        int64_t tile, int64_t row,
                                                        const ForEach& for_each, const Sums& d,
                                                        float* values, int64_t count) {
  const bool last = g + 1 == p.weight.layout.groups, activates = p.epilogue != Epilogue::none;
  const auto value = [&](const TileOutputs& outputs, int64_t r, int64_t t, const float* before)
                         __attribute__((always_inline)) {
                           const __m512 y = outputs.value(p, g, row + r, d(r, t), before);
                           return last ? outputs.scaled(p, row + r, y) : y;
                         };
  if (last && !activates) {
    for_each([&](const TileOutputs& outputs, int64_t r, int64_t t, const float* before)
                 __attribute__((always_inline)) {
                   outputs.store(p, row + r, tile + t, value(outputs, r, t, before));
                 });
    return;
  }
  for_each([&](const TileOutputs& outputs, int64_t r, int64_t t, float* to)
               __attribute__((always_inline)) { _mm512_store_ps(to, value(outputs, r, t, to)); });
  if (!last) return;
  activate(p.epilogue, values, count);
  for_each([&](const TileOutputs& outputs, int64_t r, int64_t t, const float* from) __attribute__((
               always_inline)) { outputs.store(p, row + r, tile + t, _mm512_load_ps(from)); });
}

// Sums of some rows and tiles in memory, [rows, tiles * 16], and room for their values.
struct StoredSums {
  int64_t rows;
  int64_t tiles;
  const int32_t* sums;
  float* values;
};

// Not cloned for numbers of rows and tiles.
template <class What>
__attribute__((noinline, noclone)) void finish_stored(const PackedProduct& all, int64_t g,
                                                      int64_t tile, int64_t row,
                                                      const StoredSums& stored) {
  PackedProduct p = all;  // copied: stores to `out` could change what is behind a reference
  What::know(p);
  const int64_t rows = stored.rows, tiles = stored.tiles;
  const auto for_each = [&](const auto& visit) __attribute__((always_inline)) {
#pragma GCC unroll 1
    for (int64_t t = 0; t < tiles; ++t) {
      const TileOutputs outputs(p, g, tile + t);
#pragma GCC unroll 1
      for (int64_t r = 0; r < rows; ++r)
        visit(outputs, r, t, stored.values + (r * tiles + t) * kTileOutputs);
    }
  };
  const auto d = [&](int64_t r, int64_t t) __attribute__((always_inline)) {
    return _mm512_load_si512(stored.sums + (r * tiles + t) * kTileOutputs);
  };
  finish_group(p, g, tile, row, for_each, d, stored.values, rows * tiles * kTileOutputs);
}

using FinishStored = void (*)(const PackedProduct&, int64_t g, int64_t tile, int64_t row,
                              const StoredSums&);

__attribute__((noinline)) FinishStored stored_finisher(const PackedProduct& p) {
  FinishStored finish = nullptr;
  with_plain(p, [&](auto what) { finish = finish_stored<decltype(what)>; });
  return finish;
}

// R rows at a time, by way of memory: the code for finishing them is there only once. Not inlined,
// as it has no registers for what its caller knows.
template <int R, int T, bool kWide, class Codes>
__attribute__((noinline)) void run_by_memory(const PackedProduct& p, const Codes& codes,
                                             int64_t tile, int64_t& row) {
  alignas(64) int32_t sums[R][T][kTileOutputs];
  alignas(64) float values[R * T * kTileOutputs];
  const StoredSums stored{R, T, sums[0][0], values};
  const FinishStored finish = stored_finisher(p);
  for (; row + R <= p.rows; row += R) {
    for (int64_t g = 0; g < p.weight.layout.groups; ++g) {
      using Tile = VnniTile<R, T, Codes, kWide>;
      __m512i d[R][T];
      Tile{p, codes, row, tile}.sum(g, d);
      Tile::for_each_sum([&](int r, int t) __attribute__((always_inline)) {
        _mm512_store_si512(sums[r][t], d[r][t]);
      });
      finish(p, g, tile, row, stored);
    }
  }
}

// The same in registers, for what most rows go through.
template <int R, int T, class What>
void run_in_registers(const PackedProduct& all, const Panel& panel, int64_t tile, int64_t& row) {
  PackedProduct p = all;  // copied: stores to `out` could change what is behind a reference
  What::know(p);
  int64_t at = row;
  for (; at + R <= p.rows; at += R) {
    alignas(64) float values[R * T * kTileOutputs];
    for (int64_t g = 0; g < p.weight.layout.groups; ++g) {
      __m512i d[R][T];
      VnniTile<R, T, Panel, false>{p, panel, at, tile}.sum(g, d);
      const auto sum = [&](int64_t r, int64_t t) __attribute__((always_inline)) { return d[r][t]; };
      const auto for_each = [&](const auto& visit) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const TileOutputs outputs(p, g, tile + t);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) visit(outputs, r, t, values + (r * T + t) * kTileOutputs);
        }
      };
      finish_group(p, g, tile, at, for_each, sum, values, R * T * kTileOutputs);
    }
  }
  row = at;
}

template <int R, int T>
void run_in_registers(const PackedProduct& p, const Panel& panel, int64_t tile, int64_t& row) {
  with_plain(p, [&](auto what) { run_in_registers<R, T, decltype(what)>(p, panel, tile, row); });
}

// From `row` on, with T tiles. Three or five rows are one pass where registers are full.
template <int T, bool kWide, class Codes>
void run_rows(const PackedProduct& p, const Codes& codes, int64_t tile, int64_t row) {
  run_by_memory<6, T, kWide>(p, codes, tile, row);
  if constexpr (T >= 3 && !kWide) run_by_memory<5, T, kWide>(p, codes, tile, row);
  run_by_memory<4, T, kWide>(p, codes, tile, row);
  if constexpr (T >= 3 && !kWide) run_by_memory<3, T, kWide>(p, codes, tile, row);
  run_by_memory<2, T, kWide>(p, codes, tile, row);
  run_by_memory<1, T, kWide>(p, codes, tile, row);
}

constexpr int64_t kPanelRows = 8;  // in registers, with kPanelTiles; from here on panels pay
constexpr int kPanelTiles = 3;

// All rows with T tiles. The first fill a panel for the others.
template <class Format, int T, bool kWide>
void run_panel(const PackedProduct& p, int64_t tile, uint8_t* lines) {
  int64_t row = 0;
  PackedProduct q = p;
  if (is_multiplied<Format>) q.weight.origin = kByteOrigin;
  const auto codes = unpacked<Format, T>(lines, p.weight, tile);
  if constexpr (is_multiplied<Format>) {
    if (p.rows < kPanelRows) return run_by_memory<1, T, kWide>(q, codes, tile, row);
  }
  q.rows = kPanelRows;
  run_by_memory<kPanelRows, T, kWide>(q, codes, tile, row);
  q.rows = p.rows;
  const Panel panel{lines};
  kWide ? run_by_memory<kPanelRows, T, true>(q, panel, tile, row)
        : run_in_registers<kPanelRows, T>(q, panel, tile, row);
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

template <bool kWide, class Format, int kTiles = 4>
void run_format(const PackedProduct& p) {
  if (is_multiplied<Format> ? p.starts == nullptr : p.rows >= kPanelRows)
    return run_panels<Format, kWide>(p);
  int64_t tile = p.first_tile;
  // For one row the weights are read once: in the order in which they lie.
  for (; p.rows > 1 && tile + kTiles <= p.last_tile; tile += kTiles)
    run_rows<kTiles, kWide>(p, Format(p.weight, tile), tile, 0);
  for (; tile < p.last_tile; ++tile) run_rows<1, kWide>(p, Format(p.weight, tile), tile, 0);
}

template <bool kWide, template <int> class Codes>
void run_vnni_codes(const PackedProduct& p) {
  switch (p.weight.layout.bits) {
    case 2:
      return run_format<kWide, Codes<2>>(p);
    case 3:
      return run_format<kWide, Codes<3>>(p);
    case 4:
      return run_format<kWide, Codes<4>>(p);
    default:
      return run_format<kWide, UniformCodes<8>>(p);
  }
}

template <bool kWide>
void run_vnni(const PackedProduct& p) {
  const PackedWeight& w = p.weight;
  if (w.levels != nullptr)
    return w.level_stride == 0 ? run_format<kWide, SharedLevels>(p)
                               : run_format<kWide, RowLevels, 1>(p);
  w.multipliers.values != nullptr ? run_vnni_codes<kWide, MultipliedCodes>(p)
                                  : run_vnni_codes<kWide, UniformCodes>(p);
}

}  // namespace
}  // namespace torchquant
