// How codes lie in memory: each row is one little-endian bit string, code i in bits
// [i * bits, (i + 1) * bits) of the row, in words of 32 bits, the last one filled up with zeros.
#pragma once
#include <csrc/core/cpu_tier.h>
#include <csrc/core/quant_math.h>

namespace torchquant {

TORCHQUANT_HOST_DEVICE int64_t packed_words(int64_t columns, int64_t bits) {
  return (columns * bits + 31) / 32;
}

struct PackRows {
  int64_t rows;
  int64_t columns;
  int64_t bits;
  const uint8_t* codes;  // [rows, columns]
  uint32_t* words;       // [rows, packed_words(columns, bits)]
  unsigned long long*
      misfits;  // grows when a code does not fit in bits; a word with one is garbage
};

struct UnpackRows {
  int64_t rows;
  int64_t columns;
  int64_t bits;
  const uint32_t* words;  // [rows, packed_words(columns, bits)]
  uint8_t* codes;         // [rows, columns]
};

TORCHQUANT_TIER_LEAF(pack_rows, PackRows)
TORCHQUANT_TIER_LEAF(unpack_rows, UnpackRows)

}  // namespace torchquant
