// Codes whose groups have multipliers (Note [integer groups]), for the kernels of 32-byte vectors.
#pragma once
#include <csrc/kernels/linear_ymm.h>

namespace torchquant {
namespace {

constexpr int64_t kSegmentBlocks = 32;  // of a panel: 1024 inputs x 16 outputs = 16 KB
inline bool sums_in_int16(const PackedProduct& p) {
  return p.wide == nullptr && p.tier != CpuTier::avx2_vnni;
}

// What the sums of each group of a segment are multiplied by, and their starts: in 32 bits, or for
// sums in int16 as two numbers of 16 bits.
struct GroupTable {
  alignas(32) int32_t by[kSegmentBlocks][kTileOutputs];
  alignas(32) int32_t zero[kSegmentBlocks][kTileOutputs];
  bool has_zero;

  void fill(const PackedProduct& p, int64_t tile, int64_t block, int64_t blocks) {
    const PackedWeight& w = p.weight;
    const bool pairs = sums_in_int16(p);
    const __m256i origin = _mm256_set1_epi32(1 << (w.layout.bits - 1));
    has_zero = w.multipliers.offset != nullptr;
    int64_t at = block / w.multipliers.blocks * w.stride + tile * kTileOutputs;
    for (int64_t b = 0, g = 0; b < blocks; b += w.multipliers.blocks, ++g, at += w.stride) {
      for (int64_t o = 0; o < kTileOutputs; o += 8) {
        const __m256i m = _mm256_cvtepu8_epi32(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w.multipliers.values + at + o)));
        store(by[g] + o, pairs ? _mm256_or_si256(m, _mm256_slli_epi32(m, 16)) : m);
        if (!has_zero) continue;
        const __m256i offset = _mm256_cvtps_epi32(_mm256_loadu_ps(w.multipliers.offset + at + o));
        const __m256i z = _mm256_sub_epi32(origin, offset), half = _mm256_srli_epi32(z, 1);
        const __m256i rest = _mm256_slli_epi32(_mm256_sub_epi32(z, half), 16);
        store(zero[g] + o, pairs ? _mm256_or_si256(half, rest) : z);
      }
    }
  }
};

// A run of whole groups, and the starts of its first row.
struct GroupRun {
  const GroupTable& table;
  int64_t blocks;
  int64_t group_blocks;
  int64_t window;  // divides group_blocks
  int64_t stride;  // from row to row of activations
  const int32_t* starts;
  int64_t starts_stride;  // from window to window
};

// sums[r][16] += multiplier * (u - zero) * a over groups, for R rows. Note [int16 windows]: both
// sums of an output's pairs start at half of -zero times the window's sum of activations, and
// remain below 2^15.
template <int R, bool kVnni, bool kWide, class Source>
__attribute__((noinline)) void add_groups(const Source& source, const GroupRun& run,
                                          const int8_t* a, int32_t* sums) {
  constexpr bool kPairs = !kVnni && !kWide;
  const int32_t* starts = run.starts;
  int64_t group_end = 0;
  for (int64_t first = 0, g = 0; first < run.blocks; ++g) {
    group_end += run.group_blocks;
    for (; first < group_end && first < run.blocks;
         first += run.window, starts += run.starts_stride) {
      __m256i d[R][2];
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        d[r][0] = d[r][1] = _mm256_set1_epi32(starts[r]);
      }
      if (run.table.has_zero) {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            const __m256i zero = load(run.table.zero[g] + 8 * h);
            d[r][h] =
                kPairs ? _mm256_mullo_epi16(d[r][h], zero) : _mm256_mullo_epi32(d[r][h], zero);
          }
        }
      }
      const int64_t end = first + run.window < run.blocks ? first + run.window : run.blocks;
      add_blocks<R, kVnni, kWide>(source, first, end, a, run.stride, d);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const __m256i by = load(run.table.by[g] + 8 * h);
          add_to(sums + r * kTileOutputs + 8 * h,
                 kPairs ? _mm256_madd_epi16(d[r][h], by) : _mm256_mullo_epi32(d[r][h], by));
        }
      }
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
