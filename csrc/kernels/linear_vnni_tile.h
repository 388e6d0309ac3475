// Sums of R rows x T tiles of 16 outputs in registers, with vpdpbusd and vpdpwssd.
#pragma once
#include <csrc/kernels/linear_zmm_groups.h>

#include <array>
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

// Registers are for sums: what is read through this is read again after every store.
template <class T>
inline __attribute__((always_inline)) const T& kept_in_memory(const T& value) {
  const T* at = &value;
  asm volatile("" : "+r"(at) : : "memory");
  return *at;
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

  template <class Visit>
  static inline __attribute__((always_inline)) void for_each_sum(const Visit& visit) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) visit(r, t);
    }
  }

  // D of group g.
  inline __attribute__((always_inline)) void sum(int64_t g, __m512i (&d)[R][T]) const {
    const int64_t block = g * p.weight.layout.group_blocks;
    if constexpr (is_multiplied<Codes>) {
      sum_span(g, block, d);
    } else {
      sum_group(g, block, d);
    }
  }

 private:
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
                       const auto group = unpacked<Group, T>(codes.panel, p.weight, tile, first);
                       add_blocks(kept_in_memory(group), first, count, d);
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

  // One block of every tile, for all rows.
  template <class Some>
  inline __attribute__((always_inline)) void add_block(const Some& some, const uint8_t* lines,
                                                       int64_t tile_bytes, uint8_t* panel,
                                                       const int8_t* a, int64_t depth,
                                                       __m512i (&sums)[R][T][kChains]) const {
    if (R <= 2 && !std::is_same_v<Some, Panel>) {
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
};

}  // namespace
}  // namespace torchquant
