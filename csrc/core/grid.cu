#include <csrc/core/grid.cuh>

namespace torchquant {
namespace {

__global__ void fit_grid_kernel(const GridRows rows) {
  for_each_group(rows, [&](int64_t first, int64_t length, int64_t group) {
    float lo = rows.weight[first];
    float hi = lo;
    for (int64_t i = first + warp_lane(); i < first + length; i += kWarpSize) {
      lo = rows.weight[i] < lo ? rows.weight[i] : lo;
      hi = rows.weight[i] > hi ? rows.weight[i] : hi;
    }
    lo = warp_reduce(lo, [](float a, float b) { return b < a ? b : a; });
    hi = warp_reduce(hi, [](float a, float b) { return b > a ? b : a; });
    const Grid grid = fit_grid(rows.type, lo, hi, rows.max_code);
    if (warp_lane() != 0) return;
    rows.scale[group] = grid.scale;
    rows.zero_point[group] = grid.zero_point;
  });
}

__global__ void encode_kernel(const GridRows rows) {
  for_each_group(rows, [&](int64_t first, int64_t length, int64_t group) {
    const float scale = rows.scale[group];
    const float zero_point = rows.zero_point[group];
    for (int64_t i = first + warp_lane(); i < first + length; i += kWarpSize) {
      rows.codes[i] =
          static_cast<uint8_t>(to_code(rows.weight[i], scale, zero_point, rows.max_code));
    }
  });
}

}  // namespace

void launch_fit_grid_rows(const GridRows& rows, void* stream) {
  launch_rows("fit_grid_rows", fit_grid_kernel, rows, rows.rows * groups_per_row(rows), stream);
}

void launch_encode_rows(const GridRows& rows, void* stream) {
  launch_rows("encode_rows", encode_kernel, rows, rows.rows * groups_per_row(rows), stream);
}

}  // namespace torchquant
