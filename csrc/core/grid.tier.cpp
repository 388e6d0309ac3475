#include <csrc/core/grid.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

// Calls visit(first weight, length, index of the group in scale and zero_point) for every group of
// every row.
template <class Visit>
void for_each_group(const GridRows& rows, const Visit& visit) {
  int64_t group = 0;
  for (int64_t n = 0; n < rows.rows; ++n) {
    for (int64_t start = 0; start < rows.columns; start += rows.group_size, ++group) {
      const int64_t left = rows.columns - start;
      visit(n * rows.columns + start, left < rows.group_size ? left : rows.group_size, group);
    }
  }
}

}  // namespace

void fit_grid_rows(const GridRows& rows) {
  for_each_group(rows, [&](int64_t first, int64_t length, int64_t group) {
    float lo = rows.weight[first];
    float hi = lo;
    for (int64_t i = first + 1; i < first + length; ++i) {
      lo = rows.weight[i] < lo ? rows.weight[i] : lo;
      hi = rows.weight[i] > hi ? rows.weight[i] : hi;
    }
    const Grid grid = fit_grid(rows.type, lo, hi, rows.max_code);
    rows.scale[group] = grid.scale;
    rows.zero_point[group] = grid.zero_point;
  });
}

void encode_rows(const GridRows& rows) {
  for_each_group(rows, [&](int64_t first, int64_t length, int64_t group) {
    const float scale = rows.scale[group];
    const float zero_point = rows.zero_point[group];
    for (int64_t i = first; i < first + length; ++i) {
      rows.codes[i] =
          static_cast<uint8_t>(to_code(rows.weight[i], scale, zero_point, rows.max_code));
    }
  });
}

}  // namespace torchquant::TORCHQUANT_TIER
