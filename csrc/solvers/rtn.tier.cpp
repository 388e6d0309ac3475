#include <csrc/solvers/rtn.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

float squared_error(const float* weight, int64_t length, float scale, float zero_point,
                    float max_code) {
  float lanes[kRtnLanes] = {};
  for (int64_t start = 0; start < length; start += kRtnLanes) {
    const int64_t lanes_here = length - start < kRtnLanes ? length - start : kRtnLanes;
    for (int64_t l = 0; l < lanes_here; ++l) {
      const float w = weight[start + l];
      const float e = w - to_value(to_code(w, scale, zero_point, max_code), scale, zero_point);
      lanes[l] += e * e;
    }
  }
  float sum = 0;
  for (int64_t l = 0; l < kRtnLanes; ++l) sum += lanes[l];
  return sum;
}

}  // namespace

void rtn_shrink(const RtnShrink& search) {
  const GridRows& rows = search.grid;
  int64_t group = 0;
  for (int64_t n = 0; n < rows.rows; ++n) {
    for (int64_t start = 0; start < rows.columns; start += rows.group_size, ++group) {
      const int64_t length =
          rows.columns - start < rows.group_size ? rows.columns - start : rows.group_size;
      const float* weight = rows.weight + n * rows.columns + start;
      const float full_scale = rows.scale[group];
      float best_error = 0;
      for (int64_t s = 0; s < search.shrinks; ++s) {
        const float scale = full_scale * search.shrink[s];
        const float error =
            squared_error(weight, length, scale, rows.zero_point[group], rows.max_code);
        if (s > 0 && !(error < best_error)) continue;
        best_error = error;
        rows.scale[group] = scale;
      }
    }
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
