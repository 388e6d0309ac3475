// Subset quantization (SQ, ECCV 2022; DFSQ, arXiv 2305.05888): the levels are a few elements of a
// universal set, a code is the index of the nearest level.
#pragma once
#include <csrc/core/cpu_tier.h>
#include <csrc/core/quant_math.h>

namespace torchquant {

constexpr int64_t kSubsetMaxLevels = 256;  // a code is a byte
constexpr int64_t kSubsetMaxCounted =
    15;  // up to so many thresholds, comparing with all is fastest
// Levels that are multiples of 2^-10 in [-1, 1] have midpoints that are multiples of 2^-11: the
// code is constant on each (i, i + 1] / 2048, so that a table over ceil(2048 x) is exact.
constexpr float kSubsetUnit = 1024.0f;
constexpr int32_t kSubsetTable = 4096;  // of ceil(2048 x) = -2047 .. 2048

// Element i of x belongs to channel i / inner % channels.
struct SubsetChannels {
  int64_t inner;
  int64_t channels;  // 1: all elements share the levels
};

// x -> codes. The CPU leaf reads thresholds and tables, the CUDA leaf levels.
struct SubsetEncode {
  const float* x;  // elements first .. first + count - 1
  int64_t first;
  int64_t count;
  SubsetChannels layout;
  const float* levels;  // [channels, level_count], rising
  int64_t level_count;
  const float* thresholds;  // [channels, level_count - 1]
  const uint8_t* tables;    // [channels, kSubsetTable], or nullptr
  uint8_t* codes;           // of the same elements as x
};

struct SubsetDecode {
  const uint8_t* codes;  // elements first .. first + count - 1
  int64_t first;
  int64_t count;
  SubsetChannels layout;
  const float* values;  // [channels, kSubsetMaxLevels]
  float* out;
};

// Number and sum of what a cell holds, and of all before it once they are accumulated.
struct SubsetCell {
  double count;
  double sum;
};

// Adds each x to cells[min(max(ceil(factor x), low), high) - low], and its square to square_sum.
struct SubsetCount {
  const float* x;
  int64_t count;
  float factor;
  float low;
  float high;
  SubsetCell* cells;
  double* square_sum;
};

TORCHQUANT_TIER_LEAF(subset_encode, SubsetEncode)
TORCHQUANT_TIER_LEAF(subset_decode, SubsetDecode)
TORCHQUANT_TIER_LEAF(subset_count, SubsetCount)

// The least integer >= y, for |y| < 2^31.
TORCHQUANT_HOST_DEVICE int32_t ceiling(float y) {
  const int32_t whole = static_cast<int32_t>(y);
  return whole + (y > static_cast<float>(whole) ? 1 : 0);
}

// The largest float that is nearest to the lower of two neighbouring levels; a tie is the lower's.
TORCHQUANT_HOST_DEVICE float threshold_between(float lower, float upper) {
  const double middle = (static_cast<double>(lower) + static_cast<double>(upper)) / 2;
  const float nearest = static_cast<float>(middle);
  if (static_cast<double>(nearest) <= middle) return nearest;
  const uint32_t bits = __builtin_bit_cast(uint32_t, nearest);
  if (nearest == 0.0f) return __builtin_bit_cast(float, 0x80000001u);  // the next below zero
  return __builtin_bit_cast(float, nearest > 0.0f ? bits - 1 : bits + 1);
}

}  // namespace torchquant
