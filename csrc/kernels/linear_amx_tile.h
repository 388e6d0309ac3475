// One product of AMX: tiles of activations times tiles of weights, two or one of each, to sums.
#pragma once
#include <csrc/kernels/linear_zmm.h>

namespace torchquant {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kPanelBlocks = 16;                         // 512 inputs of two tiles: 16 KB
constexpr int64_t kPanelBytes = kPanelBlocks * kBlockBytes;  // of one tile
constexpr int64_t kSumStride = 2 * kTileOutputs;

// Ahead of tile loads, whose assembly in g++ 12 does not say so: stores could be left for later.
inline __attribute__((always_inline)) void memory_is_read() { asm volatile("" ::: "memory"); }

struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t rest[15] = {};
  uint16_t bytes[16] = {};  // of a row
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights. All have 64 bytes a row.
inline void set_tile_shapes(int64_t rows) {
  TileShapes shapes;
  for (int i = 0; i < 8; ++i) {
    shapes.bytes[i] = kLine;
    shapes.rows[i] = static_cast<uint8_t>(i < 6 && rows < kTileRows ? rows : kTileRows);
  }
  memory_is_read();
  _tile_loadconfig(&shapes);
}

// sums += u * a over `blocks` blocks, for R tiles of rows and T tiles of outputs. One tile of rows
// uses the sums of the second for every other step, lest each product wait for the one before.
template <int R, int T, bool kSigned>
struct TileProduct {
  const uint8_t* panel;
  int64_t blocks;
  int64_t depth;  // from row to row
  int32_t* sums;

  // One tile of weights, in registers 6 and 7, times activations.
  template <int kSums>
  static inline __attribute__((always_inline)) void add_row_tile() {
    if constexpr (kSums == 0 && kSigned) {
      _tile_dpbsud(0, 4, 6);
      if constexpr (T == 2) _tile_dpbsud(1, 4, 7);
    } else if constexpr (kSums == 0) {
      _tile_dpbuud(0, 4, 6);
      if constexpr (T == 2) _tile_dpbuud(1, 4, 7);
    } else if constexpr (kSigned) {
      _tile_dpbsud(2, 5, 6);
      if constexpr (T == 2) _tile_dpbsud(3, 5, 7);
    } else {
      _tile_dpbuud(2, 5, 6);
      if constexpr (T == 2) _tile_dpbuud(3, 5, 7);
    }
  }

  template <int kSums = 0>
  static inline __attribute__((always_inline)) void add(const int8_t* a, int64_t stride,
                                                        const uint8_t* u) {
    memory_is_read();
    _tile_loadd(6, u, kLine);
    if constexpr (T == 2) _tile_loadd(7, u + kPanelBytes, kLine);
    if constexpr (R == 2 || kSums == 0) {
      _tile_loadd(4, a, stride);
      add_row_tile<0>();
    }
    if constexpr (R == 2 || kSums == 1) {
      _tile_loadd(5, R == 2 ? a + kTileRows * stride : a, stride);
      add_row_tile<1>();
    }
  }

  void load_sums(bool zeros) const {
    if (zeros) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      return;
    }
    int32_t* const second = sums + kTileRows * kSumStride;
    memory_is_read();
    _tile_loadd(0, sums, kSumStride * 4);
    _tile_loadd(1, sums + kTileOutputs, kSumStride * 4);
    _tile_loadd(2, second, kSumStride * 4);
    _tile_loadd(3, second + kTileOutputs, kSumStride * 4);
  }

  void store_sums() const {
    int32_t* const second = sums + kTileRows * kSumStride;
    _tile_stored(0, sums, kSumStride * 4);
    _tile_stored(1, sums + kTileOutputs, kSumStride * 4);
    _tile_stored(2, second, kSumStride * 4);
    _tile_stored(3, second + kTileOutputs, kSumStride * 4);
  }

  void run(const int8_t* a, int64_t rows, bool from_zero) const {
    load_sums(from_zero);
    int64_t b = 0;
    for (; R == 1 && b + 4 <= blocks; b += 4) {
      add<0>(a + b * kBlockInputs, depth, panel + b * kBlockBytes);
      add<1>(a + (b + 2) * kBlockInputs, depth, panel + (b + 2) * kBlockBytes);
    }
    for (; b + 2 <= blocks; b += 2) add(a + b * kBlockInputs, depth, panel + b * kBlockBytes);
    if (b < blocks) add_last(a + b * kBlockInputs, rows, panel + b * kBlockBytes);
    store_sums();
  }

  // From zero, where next() gives one pair of blocks after another.
  template <class Next>
  void run_pairs(const int8_t* a, int64_t rows, const Next& next) const {
    load_sums(true);
    const int64_t whole = blocks / 2;
    int64_t i = 0;
    for (; R == 1 && i + 2 <= whole; i += 2) {
      add<0>(a + i * kLine, depth, next());
      add<1>(a + (i + 1) * kLine, depth, next());
    }
    for (; i < whole; ++i) add(a + i * kLine, depth, next());
    if (2 * whole < blocks) add_last(a + whole * kLine, rows, next());
    store_sums();
  }

  // A block without a second one: it has zeros behind it, whatever the panel holds there.
  void add_last(const int8_t* a, int64_t rows, const uint8_t* u) const {
    alignas(64) int8_t last[R * kTileRows * kLine];
    for (int64_t r = 0; r < rows; ++r) {
      const auto* const from = reinterpret_cast<const __m256i*>(a + r * depth);
      _mm512_store_si512(last + r * kLine, _mm512_zextsi256_si512(_mm256_loadu_si256(from)));
    }
    add(last, kLine, u);
  }
};

}  // namespace
}  // namespace torchquant
