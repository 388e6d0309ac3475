// Codes that index tables of levels, for the kernels of 32-byte vectors.
//
// Levels of at most 63 are multiplied by vpmaddubsw as u = level + origin. Sums in int16 may leave
// its range on the way, as they wrap around, if the sum over level * a fits at the end of a window:
// so both sums of an output's pairs start at -origin times the window's activations of theirs. A
// window of w steps fits when 2 w * 128 * max(|level|) < 2^15: two steps, or four of at most 32
// (-32 and -128 do not meet there).
#pragma once
#include <csrc/kernels/linear_ymm.h>

#include <vector>

namespace torchquant {
namespace {

// u of half h from four-bit codes. Of tables of rows, lane l of tables[h][q] is that of output
// 8 h + 4 l + q.
struct RowLevels {
  RowLevels(const PackedWeight& w, int64_t tile, int8_t origin) {
    for (int h = 0; h < 2; ++h) {
      for (int q = 0; q < 4; ++q) {
        const int8_t* const row = w.levels + (tile * kTileOutputs + 8 * h + q) * w.level_stride;
        const __m256i both = _mm256_set_m128i(load16(row + 4 * w.level_stride), load16(row));
        tables[h][q] = _mm256_add_epi8(both, _mm256_set1_epi8(origin));
      }
    }
  }
  inline __attribute__((always_inline)) __m256i look_up(__m256i codes, int h) const {
    const __m256i even = _mm256_set1_epi64x(0xffffffff), pair = _mm256_set_epi64x(-1, 0, -1, 0);
    const __m256i first = _mm256_blendv_epi8(_mm256_shuffle_epi8(tables[h][1], codes),
                                             _mm256_shuffle_epi8(tables[h][0], codes), even);
    const __m256i second = _mm256_blendv_epi8(_mm256_shuffle_epi8(tables[h][3], codes),
                                              _mm256_shuffle_epi8(tables[h][2], codes), even);
    return _mm256_blendv_epi8(first, second, pair);
  }

  __m256i tables[2][4];

 private:
  static __m128i load16(const int8_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  }
};

struct SharedLevels {
  SharedLevels(const PackedWeight& w, int64_t, int8_t origin) {
    const auto levels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.levels));
    table = _mm256_add_epi8(_mm256_broadcastsi128_si256(levels), _mm256_set1_epi8(origin));
  }
  inline __attribute__((always_inline)) __m256i look_up(__m256i codes, int) const {
    return _mm256_shuffle_epi8(table, codes);
  }

  __m256i table;
};

template <class Tables>
struct LevelSteps {
  static constexpr bool kUniform = false, kLevels = true;
  const PackedSteps<4> codes;
  const Tables& tables;

  inline __attribute__((always_inline)) __m256i operator()(int64_t block, int step, int h) const {
    return tables.look_up(codes(block, step, h), h);
  }
  inline __attribute__((always_inline)) void prefetch(int64_t block) const {
    codes.prefetch(block);
  }
};

// How the rows of a chunk meet small levels: in windows of `steps`.
struct LevelWindows {
  int64_t steps = 0;
  int8_t origin = 0;
  int64_t stride = 0;           // windows of a row
  std::vector<int32_t> starts;  // [rows, windows], two of 16 bits each

  int64_t of_block() const { return kSteps / steps; }

  void fill(const PackedProduct& p, int64_t first_row, int64_t rows) {
    const int64_t depth = p.weight.layout.blocks * kBlockInputs;
    const int8_t* const a = p.narrow + first_row * depth;
    const auto [least, largest] = level_range(p.weight, p.first_tile, p.last_tile);
    const bool four =
        largest <= 32 && (least > -32 || (least == -32 && !has_least(a, rows * depth)));
    steps = four ? 4 : 2;
    origin = four ? 32 : 64;
    stride = p.weight.layout.blocks * of_block();
    starts.resize(static_cast<size_t>(rows * stride));
    int32_t* to = starts.data();
    for (int64_t at = 0; at < rows * depth; at += kBlockInputs, to += of_block())
      steps == 4 ? store_starts<4>(a + at, to) : store_starts<2>(a + at, to);
  }

 private:
  // `count` is a multiple of kBlockInputs.
  static bool has_least(const int8_t* a, int64_t count) {
    __m256i least = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i += kBlockInputs) least = _mm256_min_epi8(least, load(a + i));
    const __m256i found = _mm256_cmpeq_epi8(least, _mm256_set1_epi8(-128));
    return _mm256_movemask_epi8(found) != 0;
  }

  // Of the windows of a block.
  template <int kWindow>
  void store_starts(const int8_t* a, int32_t* to) const {
    __m256i sums = _mm256_maddubs_epi16(_mm256_set1_epi8(1), load(a));  // of steps: two each
    sums = _mm256_add_epi16(sums, _mm256_shuffle_epi32(sums, 0xb1));
    if (kWindow == 4) sums = _mm256_add_epi16(sums, _mm256_shuffle_epi32(sums, 0x4e));
    sums = _mm256_mullo_epi16(sums, _mm256_set1_epi16(static_cast<int16_t>(-origin)));
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 0, 0, 0, 0);
    const __m128i found = _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(sums, order));
    if constexpr (kWindow == 4) {
      const __m128i first_of_halves = _mm_shuffle_epi32(found, 0x88);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to), first_of_halves);
    } else {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), found);
    }
  }
};

// sums += pairs * ones. Written out: g++ 12 widens many before it adds one, and spills them.
inline __attribute__((always_inline)) void add_widened(int32_t* sums, __m256i pairs, __m256i ones) {
  auto& eight = *reinterpret_cast<__m256i_u*>(sums);
  asm("vpmaddwd %2, %0, %0\n\tvpaddd %1, %0, %0\n\tvmovdqu %0, %1"
      : "+x"(pairs), "+m"(eight)
      : "xm"(ones));
}

// sums[r][16] += level * a over blocks, for R rows, in windows of kWindow steps.
template <int R, int kWindow, class Source>
__attribute__((noinline)) void add_level_windows(const Source& source, int64_t blocks,
                                                 const int32_t* starts, int64_t starts_stride,
                                                 const int8_t* a, int64_t stride, int32_t* sums) {
  constexpr bool kInRegisters = R <= 2;  // sums of all windows
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i all[R][2];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) all[r][0] = all[r][1] = _mm256_setzero_si256();
  for (int64_t b = 0; b < blocks; ++b, a += kBlockInputs) {
    source.prefetch(b);
    const RowPointers rows(a, stride);
#pragma GCC unroll 4
    for (int first = 0; first < kSteps; first += kWindow, ++starts) {
      __m256i d[R][2];
      add_steps<R, false>(source, b, first, first + kWindow, rows,
                          FromStarts{starts, starts_stride}, d);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          if constexpr (kInRegisters) {
            all[r][h] = _mm256_add_epi32(all[r][h], _mm256_madd_epi16(d[r][h], ones));
          } else {
            add_widened(sums + r * kTileOutputs + 8 * h, d[r][h], ones);
          }
        }
      }
    }
  }
  if constexpr (kInRegisters) {
    for (int r = 0; r < R; ++r) {
      for (int h = 0; h < 2; ++h) add_to(sums + r * kTileOutputs + 8 * h, all[r][h]);
    }
  }
}

}  // namespace
}  // namespace torchquant
