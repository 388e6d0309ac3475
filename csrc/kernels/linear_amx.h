// The kernel for AMX: 32 rows x 32 outputs in four tiles of sums. Eight bits of two blocks are one
// tile of weights as it lies in memory: 64 inputs of 16 outputs (Note [weight tiles]), so narrower
// codes and levels are unpacked to that form: in panels that stay in L1 for all blocks of rows, or,
// for one block of rows, between its products.
#pragma once
#include <csrc/kernels/linear_amx_tile.h>
#include <csrc/kernels/linear_plain.h>
#include <csrc/kernels/linear_zmm_groups.h>
#include <stdlib.h>

namespace torchquant {
namespace {

constexpr int64_t kAmxRows = 8;       // for fewer, products of vectors are faster
constexpr int64_t kRowsAtOnce = 256;  // their sums stay in L2
constexpr int64_t kMostRowBlocks = kRowsAtOnce / (2 * kTileRows) + 1;
constexpr int64_t kPanelPairs = kPanelBlocks / 2;  // of blocks: each a tile of weights
constexpr int64_t kPairsAhead = 2;
constexpr int64_t kBlocksBehind = 8;
constexpr int64_t kBlockSums = 2 * kTileRows * kSumStride;

// One or two tiles of rows, [first, first + 16 * tiles). Where they would reach past the last row
// they begin earlier and take some rows again; `fresh` is the first that no block before has.
struct RowBlock {
  int64_t first;
  int64_t tiles;
  int64_t fresh;
};

inline int64_t cut_rows(int64_t rows, RowBlock (&blocks)[kMostRowBlocks]) {
  int64_t count = 0;
  for (int64_t row = 0; row < rows;) {
    const int64_t tiles = rows - row > kTileRows && rows >= 2 * kTileRows ? 2 : 1;
    const int64_t last = rows - tiles * kTileRows, first = row < last || last < 0 ? row : last;
    blocks[count++] = {first, tiles, row};
    row = first + tiles * kTileRows;
  }
  return count;
}

// Signed bytes of activations, or the upper and lower bytes of 16-bit ones: 256 * upper + lower.
struct Activations {
  const int8_t* upper;
  const uint8_t* lower;  // null: bytes
};

// The sums of a chunk of rows, and the way from there to outputs.
class AmxSums {
 protected:
  AmxSums(const PackedProduct& p, Activations a) : p_(p), w_(p.weight), a_(a) {}

  // From the sums in `place`.
  template <int T>
  void finish_rows(int64_t i, int64_t g, int64_t place) {
    with_bool(row_blocks_[i].tiles == 1, [&](auto halves) {
      if (a_.lower != nullptr)
        return finish<T, true, decltype(halves)::value, Anything>(i, g, place);
      with_plain(p_, [&](auto what) {
        finish<T, false, decltype(halves)::value, decltype(what)>(i, g, place);
      });
    });
  }

  template <bool kHalves>
  static inline __attribute__((always_inline)) __m512i sum_of(const int32_t* sums) {
    const __m512i sum = _mm512_load_si512(sums);
    if (!kHalves) return sum;
    return _mm512_add_epi32(sum, _mm512_load_si512(sums + kTileRows * kSumStride));
  }

  // Rows of a block whose sums are there. One tile of rows has half of each in the second tile.
  template <int T, bool kWide, bool kHalves, class What>
  void finish(int64_t i, int64_t g, int64_t place) {
    const RowBlock rows = row_blocks_[i];
    const int64_t tiles = kHalves ? 1 : 2;
    PackedProduct p = p_;  // copied: stores to `out` could change what is behind a reference
    What::know(p);
    const bool last_group = g + 1 == p.weight.layout.groups;
    const bool activates = p.epilogue != Epilogue::none;
    const int64_t whole = rows.first + tiles * kTileRows, end = whole < rows_ ? whole : rows_;
    const TileOutputs outputs[2] = {{p, g, tile_}, {p, g, tile_ + T - 1}};
    const int32_t* sums = sums_ + place * kBlockSums + (rows.fresh - rows.first) * kSumStride;
    const int32_t* lower = lower_sums_ + (sums - sums_);
    constexpr int64_t kStride = T * kTileOutputs;
    float* const first = values_ + rows.fresh * kStride;
    with_bool(last_group && !activates, [&](auto stores) __attribute__((always_inline)) {
      float* values = first;
      for (int64_t row = row_ + rows.fresh; row < row_ + end; ++row) {
        const __m512i start = _mm512_set1_epi32(start_of(p, g, row));
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) {
          __m512i d = sum_of<kHalves>(sums + t * kTileOutputs);
          if (kWide)
            d = _mm512_add_epi32(_mm512_slli_epi32(d, 8),
                                 sum_of<kHalves>(lower + t * kTileOutputs));
          d = _mm512_add_epi32(d, start);
          __m512 value = outputs[t].value(p, g, row, d, values + t * kTileOutputs);
          if (last_group) value = outputs[t].scaled(p, row, value);
          if (decltype(stores)::value) {
            outputs[t].store(p, row, tile_ + t, value);
          } else {
            _mm512_store_ps(values + t * kTileOutputs, value);
          }
        }
        sums += kSumStride;
        lower += kSumStride;
        values += kStride;
      }
    });
    if (!last_group || !activates) return;
    activate(p.epilogue, first, (end - rows.fresh) * kStride);
    for (int64_t row = rows.fresh; row < end; ++row) {
#pragma GCC unroll 2
      for (int t = 0; t < T; ++t) {
        const float* const from = first + (row - rows.fresh) * kStride + t * kTileOutputs;
        outputs[t].store(p, row_ + row, tile_ + t, _mm512_load_ps(from));
      }
    }
  }

  const PackedProduct& p_;
  const PackedWeight& w_;
  const Activations a_;
  int64_t row_ = 0, rows_ = 0, tile_ = 0, row_block_count_ = 0;
  RowBlock row_blocks_[kMostRowBlocks];
  alignas(64) uint8_t panel_[2 * kPanelBytes];
  alignas(64) int32_t sums_[kMostRowBlocks * kBlockSums];
  alignas(64) int32_t lower_sums_[kMostRowBlocks * kBlockSums];
  alignas(64) float values_[kRowsAtOnce * kSumStride];
};

// Unpacks pairs of blocks of each group one after another, around the panel.
template <class Format, int T>
class PairsAhead {
 public:
  PairsAhead(const PackedWeight& w, int64_t tile, uint8_t* panel)
      : w_(w), tile_(tile), panel_(panel), formats_{{w, tile}, {w, tile + T - 1}} {
    for (int64_t i = 0; i < kPairsAhead; ++i) unpack();
  }

  inline __attribute__((always_inline)) const uint8_t* next() {
    unpack();
    return place_of(used_++);
  }

 private:
  uint8_t* place_of(int64_t pair) const { return panel_ + pair % kPanelPairs * 2 * kBlockBytes; }

  void unpack() {
    const int64_t left = w_.layout.blocks_of_group(group_) - block_;
    if (left <= 0) return;  // behind the last group
    const PanelBlocks blocks{group_ * w_.layout.group_blocks + block_, left < 2 ? left : 2,
                             kPanelBlocks};
    uint8_t* const to = place_of(unpacked_++);
    for (int t = 0; t < T; ++t)
      unpack_blocks(formats_[t], w_, tile_ + t, blocks, to + t * kPanelBytes);
    block_ += 2;
    if (left > 2 || group_ + 1 == w_.layout.groups) return;
    block_ = 0;
    ++group_;
  }

  const PackedWeight& w_;
  const int64_t tile_;
  uint8_t* const panel_;
  const Format formats_[2];
  int64_t group_ = 0, block_ = 0, unpacked_ = 0, used_ = 0;
};

template <class Format>
class AmxProduct : AmxSums {
 public:
  AmxProduct(const PackedProduct& p, Activations a) : AmxSums(p, a) {}

  void run() {
    for (row_ = 0; row_ < p_.rows; row_ += rows_) {
      rows_ = p_.rows - row_ < kRowsAtOnce ? p_.rows - row_ : kRowsAtOnce;
      row_block_count_ = cut_rows(rows_, row_blocks_);
      set_tile_shapes(rows_);
      for (tile_ = p_.first_tile; tile_ < p_.last_tile; tile_ += 2)
        tile_ + 1 < p_.last_tile ? run_tiles<2>() : run_tiles<1>();
    }
    _tile_release();
  }

 private:
  template <int T>
  void run_tiles() {
    if (row_block_count_ > 1 || a_.lower != nullptr) return run_panels<T>();
    row_blocks_[0].tiles == 2 ? run_block<2, T>() : run_block<1, T>();
  }

  // One block of rows: codes are unpacked between its products, some pairs of blocks ahead. Sums
  // lie in two places in turn, as they are read a group later: they are not forwarded from stores
  // of tiles.
  template <int R, int T>
  void run_block() {
    const BlockLayout& layout = w_.layout;
    const int64_t depth = layout.blocks * kBlockInputs;
    const int64_t height = rows_ < kTileRows ? rows_ : R * kTileRows;
    PairsAhead<Format, T> pairs(w_, tile_, panel_);
    for (int64_t g = 0; g < layout.groups; ++g) {
      const int64_t first = g * layout.group_blocks;
      const int8_t* const a = a_.upper + row_ * depth + first * kBlockInputs;
      int32_t* const sums = sums_ + g % 2 * kBlockSums;
      const TileProduct<R, T, true> product{panel_, layout.blocks_of_group(g), depth, sums};
      product.run_pairs(a, height, [&]() __attribute__((always_inline)) { return pairs.next(); });
      if (g > 0) finish_rows<T>(0, g - 1, (g - 1) % 2);
    }
    finish_rows<T>(0, layout.groups - 1, (layout.groups - 1) % 2);
  }

  template <int T>
  void run_panels() {
    const BlockLayout& layout = w_.layout;
    const Format formats[2] = {{w_, tile_}, {w_, tile_ + T - 1}};
    for (int64_t g = 0; g < layout.groups; ++g) {
      const int64_t first = g * layout.group_blocks, end = first + layout.blocks_of_group(g);
      for (int64_t block = first; block < end; block += kPanelBlocks) {
        const int64_t blocks = end - block < kPanelBlocks ? end - block : kPanelBlocks;
        for (int t = 0; t < T; ++t)
          unpack_blocks(formats[t], w_, tile_ + t, {block, blocks, blocks},
                        panel_ + t * kPanelBytes);
        // Sums are read some blocks later: they are not forwarded from stores of tiles.
        const bool whole = block + blocks == end;
        const int64_t behind = blocks < kBlocksBehind ? kBlocksBehind / blocks : 1;
        for (int64_t i = 0; i < row_block_count_ + (whole ? behind : 0); ++i) {
          if (i < row_block_count_) multiply<T>(i, block, blocks, block == first);
          if (whole && i >= behind) finish_rows<T>(i - behind, g, i - behind);
        }
      }
    }
  }

  template <int T>
  void multiply(int64_t i, int64_t block, int64_t blocks, bool first) {
    const RowBlock& rows = row_blocks_[i];
    const int64_t depth = w_.layout.blocks * kBlockInputs;
    const int64_t at = (row_ + rows.first) * depth + block * kBlockInputs;
    const auto sum = [&](const auto& product, const void* a) {
      const int64_t height = rows_ < kTileRows ? rows_ : rows.tiles * kTileRows;
      product.run(static_cast<const int8_t*>(a) + at, height, first);
    };
    int32_t* const sums = sums_ + i * kBlockSums;
    if (rows.tiles == 2) {
      sum(TileProduct<2, T, true>{panel_, blocks, depth, sums}, a_.upper);
      if (a_.lower != nullptr)
        sum(TileProduct<2, T, false>{panel_, blocks, depth, lower_sums_ + i * kBlockSums},
            a_.lower);
    } else {
      sum(TileProduct<1, T, true>{panel_, blocks, depth, sums}, a_.upper);
      if (a_.lower != nullptr)
        sum(TileProduct<1, T, false>{panel_, blocks, depth, lower_sums_ + i * kBlockSums},
            a_.lower);
    }
  }
};

template <class Format>
void run_amx_format(const PackedProduct& p, const Activations& a) {
  AmxProduct<Format> product(p, a);
  product.run();
}

template <template <int> class Codes>
void run_amx_codes(const PackedProduct& p, const Activations& a) {
  switch (p.weight.layout.bits) {
    case 2:
      return run_amx_format<Codes<2>>(p, a);
    case 3:
      return run_amx_format<Codes<3>>(p, a);
    case 4:
      return run_amx_format<Codes<4>>(p, a);
    default:
      return run_amx_format<UniformCodes<8>>(p, a);
  }
}

void run_amx_bytes(const PackedProduct& p, const Activations& a) {
  const PackedWeight& w = p.weight;
  if (w.levels != nullptr)
    return w.level_stride == 0 ? run_amx_format<SharedLevels>(p, a)
                               : run_amx_format<RowLevels>(p, a);
  w.multipliers.values != nullptr ? run_amx_codes<MultipliedCodes>(p, a)
                                  : run_amx_codes<UniformCodes>(p, a);
}

// Upper and lower bytes of `count` (a multiple of 32) 16-bit integers, in the order of the inputs.
void split_bytes(const int16_t* wide, int64_t count, uint8_t* upper, uint8_t* lower) {
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
  const auto store = [order](uint8_t* to, __m512i bytes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_shuffle_epi8(_mm512_cvtepi16_epi8(bytes), order));
  };
  for (int64_t i = 0; i < count; i += kBlockInputs) {
    const __m512i a = _mm512_loadu_si512(wide + i);
    store(upper + i, _mm512_srli_epi16(a, 8));
    store(lower + i, a);
  }
}

// False where there is no memory for the bytes of 16-bit activations.
bool run_amx(PackedProduct p) {
  if (p.weight.multipliers.values != nullptr) p.weight.origin = kByteOrigin;
  if (p.narrow != nullptr) {
    run_amx_bytes(p, {p.narrow, nullptr});
    return true;
  }
  const int64_t count = p.rows * p.weight.layout.blocks * kBlockInputs;
  auto* const bytes = static_cast<uint8_t*>(malloc(static_cast<size_t>(2 * count)));
  if (bytes == nullptr) return false;
  split_bytes(p.wide, count, bytes, bytes + count);
  run_amx_bytes(p, {reinterpret_cast<const int8_t*>(bytes), bytes + count});
  free(bytes);
  return true;
}

}  // namespace
}  // namespace torchquant
