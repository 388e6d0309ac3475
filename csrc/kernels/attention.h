// Attention whose probabilities become the values of their codes while they are still in the cache:
// softmax(q k^T scale + mask), quantized, times v, with no [L, S] tensor in memory. Levels are
// 2^exponent - eta (SULQ and its siblings: arXiv 2311.10126) or (code - zero_point) * scale.
#pragma once
#include <csrc/core/cpu_tier.h>
#include <csrc/core/quant_math.h>
#include <csrc/kernels/linear.h>

namespace torchquant {

constexpr int64_t kRowPad = 32;  // the leaf works on so many neighbours at once
static_assert(kRowPad == kBlockInputs);
// Steps of so many rows alternate, so that one row's sum is folded beside the next one's elements.
constexpr int64_t kRowGroup = 4;

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

// Codes of probabilities as integer activations (see QuantizeRows), each row moved down as far as
// its largest code must be to fit: the less, the smaller what a product adds and takes away again.
struct ProbabilityRows {
  int64_t groups;      // of 512 keys, as block_layout cuts them
  int64_t group_size;  // a multiple of kRowPad, or all keys
  int8_t* narrow;      // [rows, keys rounded up to kBlockInputs], or null
  int16_t* wide;       // the same in 16 bits: inputs 0 2 1 3 of every four
  int32_t* sums;       // [rows, groups]
  float* scale;        // [rows]: `unit`, or NaN
  float* zero;         // [rows]
  float unit;
};

// Rows of one head: q k^T becomes the levels of softmax(q k^T scale + mask), in place or, of a
// uniform grid, as codes.
struct AttentionRows {
  float* scores;                 // [rows, keys], rows `stride` apart
  const ProbabilityRows* codes;  // null: values take the place of the scores
  int64_t rows;
  int64_t keys;
  int64_t stride;
  float scale;
  const float* mask;    // [rows, keys] to add, or nullptr
  const bool* allowed;  // [rows, keys], or nullptr
  int64_t mask_stride;  // of the rows of either
  int64_t causal_keys;  // row r takes part with its first causal_keys + r; at least keys: with all
  Levels levels;
  float* row;  // [kRowGroup, keys rounded up to kRowPad], to work on
};

// Rows of one head that lie row_stride apart, to codes of one grid. As the 8-bit weight of a
// product (Note [weight tiles]) keys are outputs and values are inputs; as activations, queries are
// integers: codes less `shift`. A group ends with a block.
struct QuantizeOperand {
  const float* x;        // or null: codes are given
  const uint8_t* codes;  // those of x
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  Grid grid;
  float max_code;
  BlockLayout layout;
  uint8_t* packed;  // [outputs / 16, blocks, 8, 64]
  int32_t* sums;    // [outputs rounded up to 16]: of an output's codes; of queries [rows, groups]
  float* values;    // of dequantize_operand: [rows, columns]
  uint8_t* work;    // 4 rows of columns rounded up to 32
  bool* finite;     // set to false where x is not
  int32_t shift;
  int8_t* narrow;  // as of ProbabilityRows
  int16_t* wide;
};

TORCHQUANT_TIER_LEAF(attention_rows, AttentionRows)
TORCHQUANT_TIER_LEAF(quantize_queries, QuantizeOperand)
TORCHQUANT_TIER_LEAF(pack_keys, QuantizeOperand)
TORCHQUANT_TIER_LEAF(pack_values, QuantizeOperand)
TORCHQUANT_TIER_LEAF(dequantize_operand, QuantizeOperand)

}  // namespace torchquant
