// Attention whose probabilities become the values of their codes while they are still in the cache:
// softmax(q k^T scale + mask), quantized, times v, with no [L, S] tensor in memory. Levels are
// 2^exponent - eta (SULQ and its siblings: arXiv 2311.10126) or (code - zero_point) * scale.
#pragma once
#include <csrc/core/cpu_tier.h>
#include <csrc/core/quant_math.h>

namespace torchquant {

constexpr int64_t kRowPad = 32;  // the leaf works on so many neighbours at once

enum class LevelKind : int32_t { none, counted, bucketed, uniform };

// Neighbouring floats between which lies at most one threshold.
struct Bucket {
  float threshold;
  float values[2];  // of what does not exceed it, and of what does
};

// What a probability p becomes. counted: values[thresholds strictly below p]. bucketed: the same,
// decided in bucket (bits of p) >> bucket_shift. uniform: the nearest value of `grid`.
struct Levels {
  LevelKind kind;
  const float* thresholds;  // [threshold_count], rising, in [0, 1)
  int64_t threshold_count;
  const float* values;    // [threshold_count + 1]
  const Bucket* buckets;  // [last_bucket - first_bucket + 1]
  int32_t first_bucket;
  int32_t last_bucket;
  int32_t bucket_shift;
  Grid grid;
  float max_code;
  float of_nan;  // a row with a NaN has this everywhere
};

// Rows of one head, in place: q k^T becomes the levels of softmax(q k^T scale + mask).
struct AttentionRows {
  float* scores;  // [rows, keys]
  int64_t rows;
  int64_t keys;
  float scale;
  const float* mask;    // [rows, keys] to add, or nullptr
  const bool* allowed;  // [rows, keys], or nullptr
  int64_t mask_stride;  // of the rows of either
  int64_t causal_keys;  // row r takes part with its first causal_keys + r; at least keys: with all
  Levels levels;
  float* row;  // [keys rounded up to kRowPad], to work on
};

TORCHQUANT_TIER_LEAF(attention_rows, AttentionRows)

}  // namespace torchquant
