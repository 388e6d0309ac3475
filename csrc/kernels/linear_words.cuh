// Words of packed weights on CUDA: loads of several at once, and bytes of tables by byte
// permutations.
#pragma once
#include <string.h>

#include <csrc/core/warp.cuh>

namespace torchquant {
namespace {

// N words that one instruction loads or stores.
template <int N>
struct alignas(N >= 4 ? 16 : 4 * N) LineWords {
  uint32_t at[N];
};

template <int N>
__device__ LineWords<N> load_words(const void* from) {
  LineWords<N> words;
  memcpy(&words, __builtin_assume_aligned(from, alignof(LineWords<N>)), sizeof(words));
  return words;
}

// Four nibbles of `codes` to their bytes of the table. A byte permutation picks among eight bytes
// by three bits (the fourth would repeat signs), a second one between the halves.
__device__ inline uint32_t look_up_four(const LineWords<4>& table, uint32_t codes) {
  const uint32_t low = __byte_perm(table.at[0], table.at[1], codes & 0x7777);
  const uint32_t high = __byte_perm(table.at[2], table.at[3], codes & 0x7777);
  return __byte_perm(low, high, 0x3210 | (codes & 0x8888) >> 1);
}

// The low nibbles of a line's word, then the high ones.
__device__ inline void look_up(const LineWords<4>& table, uint32_t line, uint32_t (&out)[2]) {
  const uint32_t first = look_up_four(table, line), last = look_up_four(table, line >> 16);
  out[0] = __byte_perm(first, last, 0x6420);
  out[1] = __byte_perm(first, last, 0x7531);
}

}  // namespace
}  // namespace torchquant
