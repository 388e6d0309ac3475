// What the tier files of convolutions share: copies of runs, and transposes of small blocks.
#pragma once
#include <csrc/kernels/conv.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace torchquant {
namespace {

// Exactly `count` bytes, in pieces that overlap at the end.
template <class Piece>
inline __attribute__((always_inline)) void copy_pieces(const char* from, char* to, int64_t count) {
  constexpr int64_t kSize = sizeof(Piece);
  for (int64_t i = 0; i + kSize < count; i += kSize) __builtin_memcpy(to + i, from + i, kSize);
  __builtin_memcpy(to + count - kSize, from + count - kSize, kSize);
}

inline __attribute__((always_inline)) void copy_run(const void* from, void* to, int64_t count) {
  struct Sixteen {
    char bytes[16];
  };
  const auto* const source = static_cast<const char*>(from);
  auto* const target = static_cast<char*>(to);
  if (count >= 16) return copy_pieces<Sixteen>(source, target, count);
  if (count >= 4) return copy_pieces<int32_t>(source, target, count);
  for (int64_t i = 0; i < count; ++i) target[i] = source[i];
}

// `lanes` rows of `lanes` elements, 16 bytes each, from `from` (rows `step` apart) to targets(row).
template <class T>
constexpr int64_t kLanes = 16 / sizeof(T);

#if defined(__SSE2__)
template <class T>
inline __attribute__((always_inline)) __m128i low_halves(__m128i a, __m128i b) {
  return sizeof(T) == 1   ? _mm_unpacklo_epi8(a, b)
         : sizeof(T) == 2 ? _mm_unpacklo_epi16(a, b)
                          : _mm_unpacklo_epi32(a, b);
}
template <class T>
inline __attribute__((always_inline)) __m128i high_halves(__m128i a, __m128i b) {
  return sizeof(T) == 1   ? _mm_unpackhi_epi8(a, b)
         : sizeof(T) == 2 ? _mm_unpackhi_epi16(a, b)
                          : _mm_unpackhi_epi32(a, b);
}

// Interleaving row i with row i + n / 2, log2(n) times, transposes n rows of n.
template <class T, class Target>
inline __attribute__((always_inline)) void transpose(const T* from, int64_t step,
                                                     const Target& target) {
  constexpr int kRows = kLanes<T>;
  __m128i rows[kRows], next[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
    rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * step));
#pragma GCC unroll 4
  for (int size = 1; size < kRows; size *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows / 2; ++i) {
      next[2 * i] = low_halves<T>(rows[i], rows[i + kRows / 2]);
      next[2 * i + 1] = high_halves<T>(rows[i], rows[i + kRows / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(target(i)), rows[i]);
}
#else
template <class T, class Target>
inline void transpose(const T* from, int64_t step, const Target& target) {
  for (int64_t i = 0; i < kLanes<T>; ++i)
    for (int64_t j = 0; j < kLanes<T>; ++j) target(i)[j] = from[j * step + i];
}
#endif

}  // namespace
}  // namespace torchquant
