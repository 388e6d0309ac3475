#include <csrc/quantizers/uniform.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

// Calls visit(first element, length, grid of the first, step of the grid from one element to the
// next) for runs whose elements share a grid (step 0) or each have their own (step 1).
template <class Visit>
void for_each_run(const UniformGrids& grids, const Visit& visit) {
  for (int64_t n = 0; n < grids.rows; ++n) {
    const int64_t row = n * grids.columns, grid = n * grids.row_stride;
    if (grids.group_size == 1) {
      visit(row, grids.columns, grid, int64_t{1});
      continue;
    }
    for (int64_t start = 0, g = 0; start < grids.columns; start += grids.group_size, ++g) {
      const int64_t left = grids.columns - start;
      visit(row + start, left < grids.group_size ? left : grids.group_size, grid + g, int64_t{0});
    }
  }
}

}  // namespace

void uniform_encode(const UniformEncode& work) {
  const float* const scales = work.grids.scale;
  const float* const zeros = work.grids.zero_point;
  for_each_run(work.grids, [&](int64_t first, int64_t length, int64_t grid, int64_t step) {
    const float* __restrict__ x = work.x + first;
    uint8_t* __restrict__ codes = work.codes + first;
    const float max_code = work.max_code;
    if (step == 0) {
      const float scale = scales[grid], zero_point = zeros[grid];
      for (int64_t i = 0; i < length; ++i)
        codes[i] =
            static_cast<uint8_t>(static_cast<int32_t>(to_code(x[i], scale, zero_point, max_code)));
    } else {
      for (int64_t i = 0; i < length; ++i)
        codes[i] = static_cast<uint8_t>(
            static_cast<int32_t>(to_code(x[i], scales[grid + i], zeros[grid + i], max_code)));
    }
  });
}

void uniform_decode(const UniformDecode& work) {
  const float* const scales = work.grids.scale;
  const float* const zeros = work.grids.zero_point;
  for_each_run(work.grids, [&](int64_t first, int64_t length, int64_t grid, int64_t step) {
    const uint8_t* __restrict__ codes = work.codes + first;
    float* __restrict__ values = work.values + first;
    if (step == 0) {
      const float scale = scales[grid], zero_point = zeros[grid];
      for (int64_t i = 0; i < length; ++i)
        values[i] = to_value(static_cast<float>(codes[i]), scale, zero_point);
    } else {
      for (int64_t i = 0; i < length; ++i)
        values[i] = to_value(static_cast<float>(codes[i]), scales[grid + i], zeros[grid + i]);
    }
  });
}

}  // namespace torchquant::TORCHQUANT_TIER
