// Round to nearest: code = clamp(round(w / scale + zero_point), 0, 2^bits - 1), the grid spanning
// min..max of each row or group.
#pragma once
#include <csrc/core/grid.h>

namespace torchquant {

constexpr int64_t kRtnLanes = 16;  // partial sums of an error, on every device: equal rounding

// Per row or group, the factor on the scale with the smallest squared weight error.
struct RtnShrink {
  GridRows grid;        // scale: in and out
  const float* shrink;  // [shrinks]
  int64_t shrinks;
};

TORCHQUANT_TIER_LEAF(rtn_shrink, RtnShrink)

}  // namespace torchquant
