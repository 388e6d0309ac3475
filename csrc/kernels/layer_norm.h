// LayerNorm over rows whose results are codes: y = (x - mean) / sqrt(variance + eps) * weight +
// bias, code = clamp(round(y / scale + zero_point), 0, 2^bits - 1), with no y in memory.
//
// Note [moments of a row]: the mean m of a row's floats is off by its own rounding, which shows
// where a row lies far from zero. The values less m also sum to what m misses, rest = mean(x - m):
// so y takes x - m - rest, and the variance is mean((x - m)^2) - rest^2 without cancellation
// (Chan, Golub, LeVeque 1983). All sums run in the same number of lanes on every tier.
#pragma once
#include <csrc/core/cpu_tier.h>
#include <csrc/core/quant_math.h>

namespace torchquant {

constexpr int64_t kNormLanes = 32;  // of sums over a row

struct LayerNormRows {
  int64_t rows;
  int64_t columns;
  const float* x;       // [rows, columns]
  const float* weight;  // [columns rounded up to kNormLanes]
  const float* bias;    // the same
  float eps;
  Grid grid;
  float max_code;
  uint8_t* codes;  // [rows, columns]; 0 where y is NaN
  bool* finite;    // set to false where x may hold a NaN or Inf
};

TORCHQUANT_TIER_LEAF(layer_norm_codes, LayerNormRows)

}  // namespace torchquant
