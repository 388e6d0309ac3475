// Vectors of the tier's width: integers of values and codes, pairs of 16-bit integers and the sums
// of their products.
#pragma once
#include <csrc/core/floats.h>

#include <utility>

#if defined(__AVX512BW__)
// g++ 12 takes the "undefined" operands inside its own intrinsics for mistakes of the caller.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace torchquant {
namespace {

#if defined(__AVX512BW__)
constexpr int64_t kVectorLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kVectorLanes = 8;
#else
constexpr int64_t kVectorLanes = 4;
#endif

using Ints = int32_t __attribute__((vector_size(kVectorLanes * 4)));
using Floats = float __attribute__((vector_size(kVectorLanes * 4)));

// As many on every tier.
using FourInts = int32_t __attribute__((vector_size(16)));
using FourFloats = float __attribute__((vector_size(16)));
using FourDoubles = double __attribute__((vector_size(32)));

template <class Vector, class Element>
inline __attribute__((always_inline)) Vector load(const Element* from) {
  static_assert(sizeof(Element) == 4);
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <class Vector, class Element>
inline __attribute__((always_inline)) void store(Vector vector, Element* to) {
  static_assert(sizeof(Element) == 4);
  __builtin_memcpy(to, &vector, sizeof(vector));
}

// Which lanes are among the first `count`: all bits of an Int.
inline __attribute__((always_inline)) Ints first_lanes(int64_t count) {
  alignas(64) static constexpr int32_t kLanes[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                     8, 9, 10, 11, 12, 13, 14, 15};
  const int64_t most = count < kVectorLanes ? count : kVectorLanes;
  return load<Ints>(kLanes) < static_cast<int32_t>(most < 0 ? 0 : most);
}

// The first `count` floats from memory (none if negative), zeros behind them.
inline __attribute__((always_inline)) Floats load_first(const float* from, int64_t count) {
#if defined(__AVX512BW__)
  const int64_t most = count < 0 ? 0 : count < kVectorLanes ? count : kVectorLanes;
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << most) - 1), from);
#elif defined(__AVX2__)
  return _mm256_maskload_ps(from, (__m256i)first_lanes(count));
#else
  Floats floats{};
  for (int64_t i = 0; i < count && i < kVectorLanes; ++i) floats[i] = from[i];
  return floats;
#endif
}

inline __attribute__((always_inline)) Floats to_floats(Ints integers) {
  return __builtin_convertvector(integers, Floats);
}

// Values, or codes.
inline __attribute__((always_inline)) Floats load_inputs(const float* from) {
  return load<Floats>(from);
}
inline __attribute__((always_inline)) Ints load_inputs(const uint8_t* bytes) {
#if defined(__AVX512BW__)
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
#else
  Ints codes;
  for (int64_t i = 0; i < kVectorLanes; ++i) codes[i] = bytes[i];
  return codes;
#endif
}

// sums + the two products of 16-bit integers in each lane.
template <bool kDot>
inline __attribute__((always_inline)) Ints add_pairs(Ints sums, Ints a, Ints b) {
#if defined(__AVX512BW__)
  if constexpr (kDot) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
    return sums;
  }
  return sums + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sums + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return sums + (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return sums + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// a where a < b, else (where one is NaN, too) b; and the same for a > b.
using torchquant::larger, torchquant::smaller;  // of two numbers
inline __attribute__((always_inline)) Floats smaller(Floats a, Floats b) {
#if defined(__AVX512BW__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

inline __attribute__((always_inline)) Floats larger(Floats a, Floats b) {
#if defined(__AVX512BW__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

template <int kDistance, class Vector, int... kLane>
inline __attribute__((always_inline)) Vector swapped(Vector x,
                                                     std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(x, x, (kLane ^ kDistance)...);
}

// All lanes in one; `join` takes two vectors, in any order.
template <class Vector, class Join>
inline __attribute__((always_inline)) auto joined(Vector x, const Join& join) {
  constexpr std::make_integer_sequence<int, kVectorLanes> kLanes;
  if constexpr (kVectorLanes > 8) x = join(x, swapped<8>(x, kLanes));
  if constexpr (kVectorLanes > 4) x = join(x, swapped<4>(x, kLanes));
  x = join(x, swapped<2>(x, kLanes));
  return join(x, swapped<1>(x, kLanes))[0];
}

template <class Vector, class Join, int... kLane>
inline __attribute__((always_inline)) auto folded(Vector x, const Join& join,
                                                  std::integer_sequence<int, kLane...>) {
  constexpr int kHalf = sizeof...(kLane);
  return join(__builtin_shufflevector(x, x, kLane...),
              __builtin_shufflevector(x, x, (kLane + kHalf)...));
}

// The upper half joins the lower one until four lanes are left.
template <class Vector, class Join>
inline __attribute__((always_inline)) auto folded_to_four(Vector x, const Join& join) {
  constexpr int kLanes = sizeof(x) / sizeof(x[0]);
  if constexpr (kLanes == 4) {
    return x;
  } else {
    return folded_to_four(folded(x, join, std::make_integer_sequence<int, kLanes / 2>()), join);
  }
}

// All lanes of each vector in one. `join` takes vectors of any width.
template <class Vector, class Join>
inline __attribute__((always_inline)) auto joined_each(const Vector (&x)[4], const Join& join) {
  const auto a = folded_to_four(x[0], join), b = folded_to_four(x[1], join);
  const auto c = folded_to_four(x[2], join), d = folded_to_four(x[3], join);
  const auto ab =
      join(__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7));
  const auto cd =
      join(__builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7));
  return join(__builtin_shufflevector(ab, cd, 0, 2, 4, 6),
              __builtin_shufflevector(ab, cd, 1, 3, 5, 7));
}

// The same of four rows of vectors whose lanes follow each other: a tree of one shape on every
// tier.
template <class Vector, size_t kVectors, class Join>
inline __attribute__((always_inline)) auto joined_rows(Vector (&rows)[4][kVectors],
                                                       const Join& join) {
  Vector x[4];
#pragma GCC unroll 4
  for (size_t r = 0; r < 4; ++r) {
#pragma GCC unroll 4
    for (size_t half = kVectors / 2; half > 0; half /= 2) {
#pragma GCC unroll 4
      for (size_t v = 0; v < half; ++v) rows[r][v] = join(rows[r][v], rows[r][v + half]);
    }
    x[r] = rows[r][0];
  }
  return joined_each(x, join);
}

constexpr auto kSum = [](auto a, auto b) { return a + b; };
constexpr auto kLargest = [](auto a, auto b) { return a > b ? a : b; };

// a * b + c, rounded once.
using torchquant::fused;  // of one number
inline __attribute__((always_inline)) Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512BW__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  for (int64_t i = 0; i < kVectorLanes; ++i) c[i] = fused(a[i], b[i], c[i]);
  return c;
#endif
}

using torchquant::absolute;  // of one number
inline __attribute__((always_inline)) Floats absolute(Floats x) {
  return (Floats)((Ints)x & 0x7fffffff);
}

// The larger absolute value; b's where a is NaN.
inline __attribute__((always_inline)) Floats farther(Floats a, Floats b) {
#if defined(__AVX512BW__)
  constexpr int kLargerAbsolute = 3, kWithoutSign = 2 << 2;
  return _mm512_range_ps(a, b, kLargerAbsolute | kWithoutSign);
#else
  return larger(absolute(a), absolute(b));
#endif
}

constexpr float kLargestFloat = 3.40282347e38f;
constexpr float kMagic = 12582912.0f;  // of round_to_integer

using torchquant::round_to_integer;  // of one number
inline __attribute__((always_inline)) Floats round_to_integer(Floats x) {
  return (x + kMagic) - kMagic;
}

// x - round_to_integer(x)
inline __attribute__((always_inline)) Floats past_integer(Floats x) {
#if defined(__AVX512BW__)
  return _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT);
#else
  return x - round_to_integer(x);
#endif
}

// round_to_integer(x) - shift, from the bits that its sum leaves.
inline __attribute__((always_inline)) Ints rounded(Floats x, int32_t shift) {
  return (Ints)(x + kMagic) - (static_cast<int32_t>(bits_of(kMagic)) + shift);
}

// NaN where x or an x before was not finite.
inline __attribute__((always_inline)) Floats note_finite(Floats noted, Floats x) {
#if defined(__FMA__)
  return fused(x, Floats{}, noted);
#else
  return noted + x * 0.0f;
#endif
}
inline __attribute__((always_inline)) Floats note_finite(Floats noted, Ints) { return noted; }

// Integers that fit, as bytes with or without a sign or as halves.
template <class To>
inline __attribute__((always_inline)) void store_narrow(Ints integers, To* to) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(To) == 1) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)integers));
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)integers));
  }
#elif defined(__AVX2__)
  const __m128i upper = _mm256_extracti128_si256((__m256i)integers, 1);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)integers), upper);
  if constexpr (sizeof(To) == 1) {
    constexpr bool kSigned = static_cast<To>(-1) < 0;
    const __m128i bytes =
        kSigned ? _mm_packs_epi16(halves, halves) : _mm_packus_epi16(halves, halves);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), bytes);
  } else {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
  }
#else
  for (int64_t i = 0; i < kVectorLanes; ++i) to[i] = static_cast<To>(integers[i]);
#endif
}

inline bool all_finite(Floats noted) {
  bool finite = true;
  for (int64_t i = 0; i < kVectorLanes; ++i) finite = finite && noted[i] == noted[i];
  return finite;
}

// Codes minus `shift`.
inline __attribute__((always_inline)) void code_integers(const uint8_t* __restrict__ codes,
                                                         int32_t shift, int64_t count,
                                                         int8_t* __restrict__ a) {
  using Bytes = uint8_t __attribute__((vector_size(16)));
  using Line = uint8_t __attribute__((vector_size(kVectorLanes * 4)));
  const auto less = static_cast<uint8_t>(shift);
  const auto take = [&](auto bytes, int64_t i) __attribute__((always_inline)) {
    __builtin_memcpy(&bytes, codes + i, sizeof(bytes));
    bytes -= less;
    __builtin_memcpy(a + i, &bytes, sizeof(bytes));
  };
  int64_t i = 0;
  for (; i + int64_t{sizeof(Line)} <= count; i += sizeof(Line)) take(Line{}, i);
  for (; i + int64_t{sizeof(Bytes)} <= count; i += sizeof(Bytes)) take(Bytes{}, i);
  if (i == count) return;
  if (count >= int64_t{sizeof(Bytes)})
    return take(Bytes{}, count - int64_t{sizeof(Bytes)});  // some twice
  for (; i < count; ++i) a[i] = static_cast<int8_t>(codes[i] - less);
}

inline void code_integers(const uint8_t* __restrict__ codes, int32_t shift, int64_t count,
                          int16_t* __restrict__ a) {
  for (int64_t i = 0; i < count; ++i) a[i] = static_cast<int16_t>(codes[i] - shift);
}

// Sum of whole blocks of 32.
inline int32_t sum_of(const int8_t* __restrict__ a, int64_t count) {
#if defined(__AVX2__)
  __m256i total = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += 32) {
    const __m256i u = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i)),
                                       _mm256_set1_epi8(-128));
    total = _mm256_add_epi64(total, _mm256_sad_epu8(u, _mm256_setzero_si256()));
  }
  const __m128i half =
      _mm_add_epi64(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  const int64_t sum = _mm_cvtsi128_si64(half) + _mm_extract_epi64(half, 1);
  return static_cast<int32_t>(sum - 128 * count);
#else
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += a[i];
  return sum;
#endif
}

inline int32_t sum_of(const int16_t* __restrict__ a, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += a[i];
  return sum;
}

struct Ends {
  float low;
  float high;
};

// Smallest and largest of x, which has at least one value.
inline Ends ends_of(const float* x, int64_t count) {
  Ends ends{x[0], x[0]};
  if (count < kVectorLanes) {
    for (int64_t i = 1; i < count; ++i)
      ends = {x[i] < ends.low ? x[i] : ends.low, x[i] > ends.high ? x[i] : ends.high};
    return ends;
  }
  // Two of each, so that steps need not wait; the last vectors perhaps twice.
  Floats low[2], high[2];
  low[0] = low[1] = high[0] = high[1] = load<Floats>(x + count - kVectorLanes);
  const auto take = [&](int64_t at, int64_t part) __attribute__((always_inline)) {
    const Floats values = load<Floats>(x + at);
    low[part] = smaller(values, low[part]);
    high[part] = larger(values, high[part]);
  };
  int64_t i = 0;
  for (; i + 2 * kVectorLanes <= count; i += 2 * kVectorLanes) {
    take(i, 0);
    take(i + kVectorLanes, 1);
  }
  if (i + kVectorLanes <= count) take(i, 0);
  const auto first = [](Floats a, Floats b) { return smaller(a, b); };
  const auto last = [](Floats a, Floats b) { return larger(a, b); };
  return {joined(first(low[0], low[1]), first), joined(last(high[0], high[1]), last)};
}

}  // namespace
}  // namespace torchquant
