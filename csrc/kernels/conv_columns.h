// In which order a convolution's weight is packed: what conv_prepack and quantized_conv2d agree on.
#pragma once
#include <csrc/kernels/conv.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace torchquant {

// Sums of 16-bit activations times differences of codes fit in int32 up to here.
constexpr int64_t kDepthwiseTaps = 256;

inline bool is_depthwise(int64_t groups, int64_t columns, int64_t taps, int64_t group_size) {
  return groups > 1 && columns == taps && taps <= kDepthwiseTaps &&
         (group_size == 0 || group_size >= taps);
}

// Depthwise weights are [N, pair_taps(kernel), 2]: see Note [row pairs].
inline int64_t pair_taps(const Extent& kernel) { return (kernel.h + 1) / 2 * kernel.w; }

// Column c * taps + tap of each place in the packed row: see Note [gathered columns].
inline std::vector<int64_t> gathered_columns(int64_t columns, int64_t taps, int64_t group_size) {
  std::vector<int64_t> order;
  order.reserve(columns);
  const int64_t step = group_size == 0 ? std::max<int64_t>(columns, 1) : group_size;
  for (int64_t first = 0; first < columns; first += step) {
    const int64_t last = std::min(first + step, columns);
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t c = first / taps; c * taps < last; ++c) {
        const int64_t column = c * taps + tap;
        if (column >= first && column < last) order.push_back(column);
      }
    }
  }
  return order;
}

}  // namespace torchquant
