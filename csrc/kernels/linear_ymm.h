// What the kernels of 32-byte vectors share: codes out of their lines, and products.
#pragma once
#include <csrc/kernels/linear_tile.h>
#include <immintrin.h>

namespace torchquant {
namespace {

constexpr int64_t kSteps = 8;  // of a block
constexpr int64_t kPrefetch = 2048;

using AnyInt32 = int32_t __attribute__((may_alias));

inline __attribute__((always_inline)) __m256i broadcast4(const int8_t* a) {
  return _mm256_set1_epi32(*reinterpret_cast<const AnyInt32*>(a));
}

// Written out, product and sum together: g++ 12 hoists the products of intrinsics and spills them.
// To int16 sums, or with kVnni to int32.
template <bool kVnni>
inline __attribute__((always_inline)) void add_products(__m256i& sum, __m256i u, __m256i a) {
  if constexpr (kVnni) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(u), "x"(a));
  } else {
    __m256i products;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(u), "x"(a));
  }
}
// The first product of a sum in int16, from `start` on or from zero.
struct Zero {};
inline __attribute__((always_inline)) __m256i first_products(Zero, __m256i u, __m256i a) {
  __m256i sum;
  asm("vpmaddubsw %2, %1, %0" : "=x"(sum) : "x"(u), "x"(a));
  return sum;
}
inline __attribute__((always_inline)) __m256i first_products(__m256i start, __m256i u, __m256i a) {
  __m256i sum;
  asm("vpmaddubsw %3, %2, %0\n\tvpaddw %1, %0, %0" : "=&x"(sum) : "x"(start), "x"(u), "x"(a));
  return sum;
}
// To int32 sums. With its broadcast, which otherwise would be kept for the other half of the
// outputs, in memory.
template <bool kVnni>
inline __attribute__((always_inline)) void add_pairs(__m256i& sum, __m256i u, const int8_t* a) {
  __m256i products;
  if constexpr (kVnni) {
    asm("vpbroadcastd %3, %1\n\t%{vex%} vpdpwssd %1, %2, %0"
        : "+x"(sum), "=&x"(products)
        : "x"(u), "m"(*reinterpret_cast<const AnyInt32*>(a)));
  } else {
    asm("vpbroadcastd %3, %1\n\tvpmaddwd %1, %2, %1\n\tvpaddd %1, %0, %0"
        : "+x"(sum), "=&x"(products)
        : "x"(u), "m"(*reinterpret_cast<const AnyInt32*>(a)));
  }
}

inline __attribute__((always_inline)) __m256i load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
inline __attribute__((always_inline)) void store(void* to, __m256i x) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), x);
}
inline __attribute__((always_inline)) void add_to(int32_t* sums, __m256i x) {
  store(sums, _mm256_add_epi32(load(sums), x));
}

// Half h (32 bytes, eight outputs) of V[step], uniform codes.
template <int kBits>
inline __attribute__((always_inline)) __m256i half_step(const uint8_t* lines, int step, int h) {
  constexpr int kLow = kBits == 3 ? 2 : kBits, kPerLine = 8 / kLow;
  const int j = step % kPerLine;
  const __m256i codes = load(lines + step / kPerLine * kLine + 32 * h);
  if constexpr (kBits == 8) return codes;
  __m256i u =
      _mm256_and_si256(_mm256_srli_epi16(codes, j * kLow), _mm256_set1_epi8((1 << kLow) - 1));
  if constexpr (kBits == 3) {
    const __m256i high = load(lines + 2 * kLine + 32 * h);
    const __m256i moved =
        step < 2 ? _mm256_slli_epi16(high, 2 - step) : _mm256_srli_epi16(high, step - 2);
    u = _mm256_or_si256(u, _mm256_and_si256(moved, _mm256_set1_epi8(4)));
  }
  return u;
}

// Where codes come from, and whether these can be uniform ones of at most four bits, or levels.
struct PanelSteps {
  static constexpr bool kUniform = true, kLevels = true;
  const uint8_t* panel;
  inline __attribute__((always_inline)) __m256i operator()(int64_t block, int step, int h) const {
    return load(panel + (block * kSteps + step) * kLine + 32 * h);
  }
  void prefetch(int64_t) const {}
};

template <int kBits>
struct PackedSteps {
  static constexpr bool kUniform = kBits <= 4, kLevels = false;
  const uint8_t* lines;
  inline __attribute__((always_inline)) __m256i operator()(int64_t block, int step, int h) const {
    return half_step<kBits>(lines + block * kBits * kLine, step, h);
  }
  inline __attribute__((always_inline)) void prefetch(int64_t block) const {
#pragma GCC unroll 8
    for (int i = 0; i < kBits; ++i)
      __builtin_prefetch(lines + (block * kBits + i) * kLine + kPrefetch);
  }
};

// Up to six rows by two pointers: g++ 12 would keep one for each, and set all of them up for every
// window.
struct RowPointers {
  inline __attribute__((always_inline)) RowPointers(const int8_t* a, int64_t stride)
      : first(a), stride(stride) {
    asm("" : "+r"(this->stride));
    fourth = first + 3 * this->stride;
  }
  inline __attribute__((always_inline)) const int8_t* at(int r) const {
    return (r < 3 ? first : fourth) + r % 3 * stride;
  }

  const int8_t* first;
  const int8_t* fourth;
  int64_t stride;
};

// With what the sums of some steps begin.
struct SumsBefore {
  static constexpr bool kBegins = false;
};
struct FromZero {
  static constexpr bool kBegins = true;
  Zero operator()(int) const { return {}; }
};
struct FromStarts {  // of a window, for each row
  static constexpr bool kBegins = true;
  inline __attribute__((always_inline)) __m256i operator()(int r) const {
    return _mm256_set1_epi32(first[r * stride]);
  }

  const int32_t* first;
  int64_t stride;
};

// d[r][h] = begin(r) + u * a over steps [first, end) of one block, for R rows and both halves of
// the outputs: in int16, or with kVnni in int32.
template <int R, bool kVnni, class Source, class Begin>
inline __attribute__((always_inline)) void add_steps(const Source& source, int64_t block, int first,
                                                     int end, const RowPointers& rows,
                                                     const Begin& begin, __m256i (&d)[R][2]) {
#pragma GCC unroll 8
  for (int step = first; step < end; ++step) {
    const __m256i u0 = source(block, step, 0), u1 = source(block, step, 1);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m256i four = broadcast4(rows.at(r) + 4 * step);
      if constexpr (Begin::kBegins) {
        if (step == first) {
          const auto start = begin(r);
          d[r][0] = first_products(start, u0, four);
          d[r][1] = first_products(start, u1, four);
          continue;
        }
      }
      add_products<kVnni>(d[r][0], u0, four);
      add_products<kVnni>(d[r][1], u1, four);
    }
  }
}

// The same for 16-bit activations (inputs 0 2 1 3 of every four), in int32.
template <int R, bool kVnni, class Source>
inline __attribute__((always_inline)) void add_wide_steps(const Source& source, int64_t block,
                                                          const int8_t* a, int64_t stride,
                                                          __m256i (&d)[R][2]) {
  const __m256i low = _mm256_set1_epi16(0xff);
#pragma GCC unroll 8
  for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m256i u = source(block, step, h);
      const __m256i even = _mm256_and_si256(u, low), odd = _mm256_srli_epi16(u, 8);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const int8_t* const four = a + r * stride + 8 * step;
        add_pairs<kVnni>(d[r][h], even, four);
        add_pairs<kVnni>(d[r][h], odd, four + 4);
      }
    }
  }
}

// d[r][h] += u * a over blocks [first, end).
template <int R, bool kVnni, bool kWide, class Source>
inline __attribute__((always_inline)) void add_blocks(const Source& source, int64_t first,
                                                      int64_t end, const int8_t* a, int64_t stride,
                                                      __m256i (&d)[R][2]) {
  for (int64_t b = first; b < end; ++b) {
    source.prefetch(b);
    const int8_t* const x = a + b * kBlockInputs * (kWide ? 2 : 1);
    if constexpr (kWide) {
      add_wide_steps<R, kVnni>(source, b, x, stride, d);
    } else {
      add_steps<R, kVnni>(source, b, 0, kSteps, RowPointers(x, stride), SumsBefore(), d);
    }
  }
}

// The longest window of uniform codes whose sums fit in int16, in blocks: Note [int16 windows].
inline int64_t window_blocks(int64_t bits) { return bits == 2 ? 4 : bits == 3 ? 2 : 1; }

// sums[r][16] += by * u * a over the blocks [first, end) of one window, for R rows: both 16 bits of
// by[h] are the same.
template <int R, class Source>
inline __attribute__((always_inline)) void add_window(const Source& source, int64_t first,
                                                      int64_t end, const int8_t* a, int64_t stride,
                                                      const __m256i (&by)[2], int32_t* sums) {
  __m256i d[R][2];
  const RowPointers rows(a + first * kBlockInputs, stride);
  source.prefetch(first);
  add_steps<R, false>(source, first, 0, kSteps, rows, FromZero(), d);
  add_blocks<R, false, false>(source, first + 1, end, a, stride, d);
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    const __m256i first_half = _mm256_madd_epi16(d[r][0], by[0]);
    const __m256i second_half = _mm256_madd_epi16(d[r][1], by[1]);
    add_to(sums + r * kTileOutputs, first_half);
    add_to(sums + r * kTileOutputs + 8, second_half);
  }
}

}  // namespace
}  // namespace torchquant
