// What every weight solver starts and ends with: the grid of each row (or group), codes on a given
// grid, values of given codes.
#pragma once
#include <csrc/core/cpu_tier.h>
#include <csrc/core/quant_math.h>

#include <cstdint>

namespace torchquant {

// N rows of K weights, cut into groups of group_size columns (the last may be ragged), G groups a
// row.
struct GridRows {
  const float* weight;  // [N, K]
  int64_t rows;
  int64_t columns;
  int64_t group_size;
  GridType type;
  float max_code;
  float* scale;       // [N, G]
  float* zero_point;  // [N, G]
  uint8_t* codes;     // [N, K]
};

TORCHQUANT_TIER_LEAF(fit_grid_rows, GridRows)  // weight -> scale, zero_point
TORCHQUANT_TIER_LEAF(encode_rows, GridRows)    // weight, scale, zero_point -> codes

}  // namespace torchquant
