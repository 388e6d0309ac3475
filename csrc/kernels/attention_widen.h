// Bytes with sign as the 16-bit integers of PackedProduct, for the tier files of attention.
#pragma once
#include <csrc/kernels/linear.h>

namespace torchquant {
namespace {

// One block: inputs 0 2 1 3 of every four, which as words are the even bytes and the odd ones.
inline __attribute__((always_inline)) void widen_block(const int8_t* bytes, int16_t* to) {
  constexpr int64_t kPairs = kBlockInputs / 2, kWords = kBlockInputs / 4;
  int16_t pairs[kPairs], even[kPairs], odd[kPairs];
  __builtin_memcpy(pairs, bytes, sizeof(pairs));
  for (int64_t i = 0; i < kPairs; ++i) {
    even[i] = static_cast<int8_t>(pairs[i]);
    odd[i] = static_cast<int16_t>(pairs[i] >> 8);
  }
  int32_t first[kWords], second[kWords], words[2 * kWords];
  __builtin_memcpy(first, even, sizeof(first));
  __builtin_memcpy(second, odd, sizeof(second));
  for (int64_t i = 0; i < kWords; ++i) {
    words[2 * i] = first[i];
    words[2 * i + 1] = second[i];
  }
  __builtin_memcpy(to, words, sizeof(words));
}

}  // namespace
}  // namespace torchquant
