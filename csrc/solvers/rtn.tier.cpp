#include <csrc/solvers/rtn.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

constexpr int kLanes = 16;  // partial sums in a fixed number of lanes: the same error, and so the same choice, on every tier

float squared_error(const float* weight, int64_t length, float scale, float zero_point, float max_code) {
  float lanes[kLanes] = {};
  for (int64_t start = 0; start < length; start += kLanes) {
    const int64_t lanes_here = length - start < kLanes ? length - start : kLanes;
    for (int64_t l = 0; l < lanes_here; ++l) {
      const float w = weight[start + l];
      const float e = w - to_value(to_code(w, scale, zero_point, max_code), scale, zero_point);
      lanes[l] += e * e;
    }
  }
  float sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

float best_scale(const RtnRows& rows, const float* weight, int64_t length, Grid grid) {
  float best = grid.scale * rows.shrink[0];
  if (rows.shrinks == 1) return best;
  float best_error = squared_error(weight, length, best, grid.zero_point, rows.max_code);
  for (int64_t s = 1; s < rows.shrinks; ++s) {
    const float scale = grid.scale * rows.shrink[s];
    const float error = squared_error(weight, length, scale, grid.zero_point, rows.max_code);
    if (error < best_error) {
      best_error = error;
      best = scale;
    }
  }
  return best;
}

}  // namespace

void rtn_rows(const RtnRows& rows) {
  const int64_t groups = (rows.columns + rows.group_size - 1) / rows.group_size;
  for (int64_t n = 0; n < rows.rows; ++n) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t start = g * rows.group_size;
      const int64_t length = rows.columns - start < rows.group_size ? rows.columns - start : rows.group_size;
      const float* weight = rows.weight + n * rows.columns + start;
      const Grid grid = grid_of_range(weight, length, rows.type, rows.max_code);
      const float scale = best_scale(rows, weight, length, grid);
      rows.scale[n * groups + g] = scale;
      rows.zero_point[n * groups + g] = grid.zero_point;
      if (rows.codes == nullptr) continue;
      uint8_t* codes = rows.codes + n * rows.columns + start;
      for (int64_t i = 0; i < length; ++i) {
        codes[i] = static_cast<uint8_t>(to_code(weight[i], scale, grid.zero_point, rows.max_code));
      }
    }
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
