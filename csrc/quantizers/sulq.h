// Quantizers for softmax outputs (SULQ: arXiv 2311.10126) and their siblings, all as one table:
// code = how many thresholds lie strictly below x; value = 2^exponent[code] - eta.
#pragma once
#include <csrc/core/cpu_tier.h>
#include <csrc/core/float_bins.h>

namespace torchquant {

constexpr int64_t kSulqMaxLevels = 256;     // a code is a byte
constexpr uint8_t kSulqNothing = 255;       // the shift of a level that adds nothing
constexpr int64_t kSulqMaxShift = 31;       // 2^31 * 2^15 * 2^16 terms: an int64 cannot overflow
constexpr int64_t kSulqMaxInner = 1 << 16;  // terms of a sum

// x -> codes. With `start` (on the CPU, for many thresholds): bucket = ordered_pattern(x) >>
// bucket_shift; a code is between start[bucket] and `compares` more.
struct SulqEncode {
  const float* x;  // [count]
  int64_t count;
  const float* thresholds;  // [threshold_count], rising; with `start` one more, infinite
  int64_t threshold_count;
  const int32_t* start;  // [last_bucket - first_bucket + 1], or nullptr
  uint32_t first_bucket;
  uint32_t last_bucket;
  int32_t bucket_shift;
  int32_t compares;
  uint8_t* codes;  // [count]
};

struct SulqDecode {
  const uint8_t* codes;  // [count]
  int64_t count;
  const float* values;  // [kSulqMaxLevels]
  float* out;           // [count]
};

// sums[m, n] = sum_k v[k, n] << shift[codes[m, k]], in integers.
struct SulqShiftMatmul {
  const uint8_t* codes;   // [batches, rows, inner]
  const uint8_t* shifts;  // [kSulqMaxLevels]; kSulqNothing adds nothing
  const int16_t* v;       // [batches, inner, columns]
  int64_t batches;
  int64_t rows;
  int64_t inner;
  int64_t columns;
  bool narrow;    // no sum leaves int32
  int64_t* sums;  // [batches, rows, columns]
};

TORCHQUANT_TIER_LEAF(sulq_encode, SulqEncode)
TORCHQUANT_TIER_LEAF(sulq_decode, SulqDecode)
TORCHQUANT_TIER_LEAF(sulq_shift_matmul, SulqShiftMatmul)

}  // namespace torchquant
