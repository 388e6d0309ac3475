// Codes whose groups have multipliers (Note [integer groups]), for the kernels of 64-byte vectors.
#pragma once
#include <csrc/kernels/linear_zmm.h>

namespace torchquant {
namespace {

template <int kBits>
struct MultipliedCodes : UniformCodes<kBits> {
  static constexpr int64_t kPanelRows = INT64_MAX;  // of those that meet `starts`
  using UniformCodes<kBits>::UniformCodes;
};

template <class Format>
constexpr bool is_multiplied = false;
template <int kBits>
constexpr bool is_multiplied<MultipliedCodes<kBits>> = true;

// Multipliers, and the u that are zero, of a tile's outputs in the group of `block`, in 32 bits.
inline __attribute__((always_inline)) __m512i group_multipliers(const PackedWeight& w,
                                                                int64_t block, int64_t tile) {
  const int64_t at = block / w.multipliers.blocks * w.stride + tile * kTileOutputs;
  return _mm512_cvtepu8_epi32(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.multipliers.values + at)));
}

inline __attribute__((always_inline)) __m512i group_zeros(const PackedWeight& w, int64_t block,
                                                          int64_t tile) {
  const __m512i origin = _mm512_set1_epi32(1 << (w.layout.bits - 1));
  if (w.multipliers.offset == nullptr) return origin;
  const int64_t at = block / w.multipliers.blocks * w.stride + tile * kTileOutputs;
  return _mm512_sub_epi32(origin, _mm512_cvtps_epi32(_mm512_loadu_ps(w.multipliers.offset + at)));
}

// 128 + (u - zero) * m. One product of 16 bits is that of two bytes: u * m stays below 2^8.
template <int kBits>
void unpack_blocks(const MultipliedCodes<kBits>& codes, const PackedWeight& w, int64_t tile,
                   int64_t block, int64_t blocks, uint8_t* to) {
  const uint8_t* lines = lines_of(w, tile, block);
  const int64_t end = block + blocks, ahead = blocks * kBits * kLine;
  while (block < end) {
    const __m512i by = group_multipliers(w, block, tile);
    const __m512i zero = _mm512_mullo_epi32(by, group_zeros(w, block, tile));
    const __m512i by_two = _mm512_or_si512(by, _mm512_slli_epi32(by, 16));
    const __m512i added = _mm512_mullo_epi32(_mm512_sub_epi32(_mm512_set1_epi32(kByteOrigin), zero),
                                             _mm512_set1_epi32(0x01010101));
    const int64_t next = (block / w.multipliers.blocks + 1) * w.multipliers.blocks;
    for (; block < next && block < end; ++block, lines += kBits * kLine) {
      for (int64_t i = 0; i < kBits; ++i) __builtin_prefetch(lines + ahead + i * kLine);
#pragma GCC unroll 8
      for (int step = 0; step < 8; ++step, to += kLine) {
        const __m512i products = _mm512_mullo_epi16(codes.at(step, lines), by_two);
        _mm512_store_si512(to, _mm512_add_epi8(products, added));
      }
    }
  }
}

}  // namespace
}  // namespace torchquant
