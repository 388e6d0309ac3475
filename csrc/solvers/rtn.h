// Round to nearest: code = clamp(round(w / scale + zero_point), 0, 2^bits - 1), the grid spanning min..max of each row or group.
#pragma once
#include <csrc/core/cpu_tier.h>
#include <csrc/core/quant_math.h>

#include <cstdint>

namespace torchquant {

// N rows of K weights, cut into G groups of group_size columns (the last may be ragged).
struct RtnRows {
  const float* weight;  // [N, K]
  int64_t rows;
  int64_t columns;
  int64_t group_size;
  GridType type;
  float max_code;
  const float* shrink;  // [shrinks] factors on the scale; per group the one with the smallest squared error is kept
  int64_t shrinks;
  uint8_t* codes;     // [N, K] out; null when only the grid is wanted
  float* scale;       // [N, G] out
  float* zero_point;  // [N, G] out
};

TORCHQUANT_HOST_DEVICE Grid grid_of_range(const float* weight, int64_t length, GridType type, float max_code) {
  float lo = weight[0];
  float hi = weight[0];
  for (int64_t i = 1; i < length; ++i) {
    lo = weight[i] < lo ? weight[i] : lo;
    hi = weight[i] > hi ? weight[i] : hi;
  }
  return fit_grid(type, lo, hi, max_code);
}

TORCHQUANT_TIER_LEAF(rtn_rows, (const RtnRows& rows), (rows))
#ifdef TORCHQUANT_CUDA
void launch_rtn_rows(const RtnRows& rows, void* stream);
#endif

}  // namespace torchquant
