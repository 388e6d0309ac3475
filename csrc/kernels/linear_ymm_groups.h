// Codes whose groups have multipliers (Note [integer groups]), for the kernels of 32-byte vectors.
#pragma once
#include <csrc/kernels/linear_ymm.h>

namespace torchquant {
namespace {

constexpr int64_t kSegmentBlocks = 32;  // of a panel: 1024 inputs x 16 outputs = 16 KB

// What the sums of each group of a segment are multiplied by, and what the starts: by zero points,
// or (GroupStarts::pairs) by -zero times the former. These are there twice, in 16 bits each.
struct GroupTable {
  alignas(32) int32_t by[kSegmentBlocks][kTileOutputs];
  alignas(32) int32_t starts_by[kSegmentBlocks][kTileOutputs];

  void fill(const PackedProduct& p, int64_t tile, int64_t block, int64_t blocks) {
    const GroupMultipliers& m = p.weight.multipliers;
    const __m256i zeros = _mm256_setzero_si256();
    const __m256i origin = _mm256_set1_epi32(1 << (p.weight.layout.bits - 1));
    int64_t at = block / m.blocks * p.weight.stride + tile * kTileOutputs;
    for (int64_t b = 0, g = 0; b < blocks; b += m.blocks, ++g, at += p.weight.stride) {
      for (int64_t o = 0; o < kTileOutputs; o += 8) {
        const __m256i value = _mm256_cvtepu8_epi32(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(m.values + at + o)));
        __m256i zero = origin;
        if (m.offset != nullptr)
          zero = _mm256_sub_epi32(zero, _mm256_cvtps_epi32(_mm256_loadu_ps(m.offset + at + o)));
        if (p.group_starts.pairs) {
          store(by[g] + o, twice(value));
          store(starts_by[g] + o, twice(_mm256_mullo_epi32(_mm256_sub_epi32(zeros, zero), value)));
        } else {
          store(by[g] + o, value);
          store(starts_by[g] + o, zero);
        }
      }
    }
  }

 private:
  static __m256i twice(__m256i x) { return _mm256_blend_epi16(x, _mm256_slli_epi32(x, 16), 0xaa); }
};

// A run of whole groups, and the starts of its first row.
struct GroupRun {
  const GroupTable& table;
  bool same_zero;  // of all groups: it is in the starts
  int64_t blocks;
  int64_t group_blocks;
  int64_t window;
  int64_t stride;  // from row to row of activations
  const int32_t* starts;
  int64_t starts_stride;  // from group to group
};

// sums[r][16] -= multiplier * zero * a over groups, for R rows.
template <int R>
inline __attribute__((always_inline)) void add_starts(const GroupRun& run, int32_t* sums) {
  __m256i d[R][2];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    d[r][0] = load(sums + r * kTileOutputs);
    d[r][1] = load(sums + r * kTileOutputs + 8);
  }
  const int32_t* starts = run.starts;
  const int64_t groups = (run.blocks + run.group_blocks - 1) / run.group_blocks;
  for (int64_t g = 0; g < groups; ++g, starts += run.starts_stride) {
    const __m256i by[2] = {load(run.table.starts_by[g]), load(run.table.starts_by[g] + 8)};
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m256i start = _mm256_set1_epi32(starts[r]);
      d[r][0] = _mm256_add_epi32(d[r][0], _mm256_madd_epi16(start, by[0]));
      d[r][1] = _mm256_add_epi32(d[r][1], _mm256_madd_epi16(start, by[1]));
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    store(sums + r * kTileOutputs, d[r][0]);
    store(sums + r * kTileOutputs + 8, d[r][1]);
  }
}

// sums[r][16] += multiplier * (u - zero) * a over groups, for R rows, by sums in int16 of windows.
template <int R, class Source>
__attribute__((noinline)) void add_group_windows(const Source& source, const GroupRun& run,
                                                 const int8_t* a, int32_t* sums) {
  add_starts<R>(run, sums);
  int64_t end = 0;
  for (int64_t first = 0, g = 0; first < run.blocks; ++g) {
    const __m256i by[2] = {load(run.table.by[g]), load(run.table.by[g] + 8)};
    end = end + run.group_blocks < run.blocks ? end + run.group_blocks : run.blocks;
    while (first < end) {
      const int64_t next = first + run.window < end ? first + run.window : end;
      add_window<R>(source, first, next, a, run.stride, by, sums);
      first = next;
    }
  }
}

// The same by sums in int32 of groups.
template <int R, bool kVnni, bool kWide, class Source>
__attribute__((noinline)) void add_groups(const Source& source, const GroupRun& run,
                                          const int8_t* a, int32_t* sums) {
  const int32_t* starts = run.starts;
  for (int64_t first = 0, g = 0; first < run.blocks; first += run.group_blocks, ++g) {
    __m256i d[R][2];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        d[r][h] = _mm256_set1_epi32(starts[r]);
        if (!run.same_zero)
          d[r][h] = _mm256_mullo_epi32(d[r][h], load(run.table.starts_by[g] + 8 * h));
      }
    }
    starts += run.starts_stride;
    const int64_t next = first + run.group_blocks, end = next < run.blocks ? next : run.blocks;
    add_blocks<R, kVnni, kWide>(source, first, end, a, run.stride, d);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h)
        add_to(sums + r * kTileOutputs + 8 * h,
               _mm256_mullo_epi32(d[r][h], load(run.table.by[g] + 8 * h)));
    }
  }
}

// 128 + (u - zero) * m. One product of 16 bits is that of two bytes: u * m stays below 2^8.
template <int kBits>
void unpack_multiplied(const PackedWeight& w, int64_t tile, int64_t block, int64_t blocks,
                       uint8_t* panel) {
  const uint8_t* lines = w.packed + (tile * w.layout.blocks + block) * kBits * kLine;
  const int64_t end = block + blocks;
  while (block < end) {
    alignas(32) int32_t by[kTileOutputs], added[kTileOutputs];
    for (int64_t o = 0; o < kTileOutputs; ++o) {
      const Multiplier m = multiplier_of(w, block, tile * kTileOutputs + o);
      by[o] = m.value * 0x10001;
      added[o] =
          static_cast<int32_t>(static_cast<uint32_t>(kByteOrigin - m.zero * m.value) * 0x01010101);
    }
    const int64_t next = (block / w.multipliers.blocks + 1) * w.multipliers.blocks;
    for (; block < next && block < end; ++block, lines += kBits * kLine, panel += kSteps * kLine) {
#pragma GCC unroll 8
      for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const __m256i products =
              _mm256_mullo_epi16(half_step<kBits>(lines, step, h), load(by + 8 * h));
          store(panel + step * kLine + 32 * h, _mm256_add_epi8(products, load(added + 8 * h)));
        }
      }
    }
  }
}

void unpack_multiplied(const PackedWeight& w, int64_t tile, int64_t block, int64_t blocks,
                       uint8_t* panel) {
  switch (w.layout.bits) {
    case 2:
      return unpack_multiplied<2>(w, tile, block, blocks, panel);
    case 3:
      return unpack_multiplied<3>(w, tile, block, blocks, panel);
    default:
      return unpack_multiplied<4>(w, tile, block, blocks, panel);
  }
}

}  // namespace
}  // namespace torchquant
