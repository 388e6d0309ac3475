// Codes whose groups have multipliers (Note [integer groups]), for the kernels of 64-byte vectors.
#pragma once
#include <csrc/kernels/linear_zmm.h>

namespace torchquant {
namespace {

template <int kBits>
struct MultipliedGroup;

template <int kBits>
struct MultipliedCodes : UniformCodes<kBits> {
  using UniformCodes<kBits>::UniformCodes;
  using Group = MultipliedGroup<kBits>;
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

// Codes of one group: 128 + (u - zero) * m. One product of 16 bits is that of two bytes: u * m
// stays below 2^8.
template <int kBits>
struct MultipliedGroup : UniformCodes<kBits> {
  MultipliedGroup(const PackedWeight& w, int64_t tile, int64_t block) {
    const __m512i by = group_multipliers(w, block, tile);
    const __m512i zero = _mm512_mullo_epi32(by, group_zeros(w, block, tile));
    by_two = _mm512_or_si512(by, _mm512_slli_epi32(by, 16));
    added = _mm512_mullo_epi32(_mm512_sub_epi32(_mm512_set1_epi32(kByteOrigin), zero),
                               _mm512_set1_epi32(0x01010101));
  }

  inline __attribute__((always_inline)) __m512i at(int step, const uint8_t* lines) const {
    const __m512i products = _mm512_mullo_epi16(UniformCodes<kBits>::at(step, lines), by_two);
    return _mm512_add_epi8(products, added);
  }

  __m512i by_two, added;
};

// take(first, count) for the blocks [block, end) of each group.
template <class Take>
inline __attribute__((always_inline)) void for_each_group(const PackedWeight& w, int64_t block,
                                                          int64_t end, const Take& take) {
  const int64_t size = w.multipliers.blocks;
  while (block < end) {
    const int64_t next = (block / size + 1) * size, last = next < end ? next : end;
    take(block, last - block);
    block = last;
  }
}

template <int kBits>
void unpack_blocks(const MultipliedCodes<kBits>&, const PackedWeight& w, int64_t tile,
                   const PanelBlocks& blocks, uint8_t* to) {
  const int64_t begin = blocks.first;
  for_each_group(w, begin, begin + blocks.count, [&](int64_t first, int64_t count) {
    unpack_blocks(MultipliedGroup<kBits>(w, tile, first), w, tile, {first, count, blocks.ahead},
                  to + (first - begin) * kBlockBytes);
  });
}

}  // namespace
}  // namespace torchquant
