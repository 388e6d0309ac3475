#include <csrc/quantizers/uniform.h>

#include <csrc/core/value_integers.h>

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

// Codes of x on one grid. Returns what note_finite does.
Floats encode(Grid grid, float max_code, Floats noted, const float* x, int64_t count,
              uint8_t* codes) {
  with_integers({grid.scale, 0.0f, grid.zero_point, max_code, 0}, [&](const auto& integers) {
    noted = value_integers(integers, noted, x, count, codes);
  });
  return noted;
}

// Nearest values of the grid. Returns what note_finite does.
Floats round_row(Grid grid, float max_code, Floats noted, const float* x, int64_t count,
                 float* values) {
  with_integers({grid.scale, 0.0f, grid.zero_point, max_code, 0}, [&](const auto& integers) {
    const auto take = [&](const float* from, float* to) __attribute__((always_inline)) {
      const Floats some = load<Floats>(from);
      noted = note_finite(noted, some);
      store((to_floats(integers(some)) - grid.zero_point) * grid.scale, to);
    };
    int64_t i = 0;
    for (; i + kVectorLanes <= count; i += kVectorLanes) take(x + i, values + i);
    if (i == count) return;
    float rest[kVectorLanes] = {};
    for (int64_t j = i; j < count; ++j) rest[j - i] = x[j];
    take(rest, rest);
    for (int64_t j = i; j < count; ++j) values[j] = rest[j - i];
  });
  return noted;
}

}  // namespace

void uniform_encode_rows(const UniformRows& work) {
  Floats noted{};
  for (int64_t n = 0; n < work.rows; ++n) {
    const float* const x = work.x + n * work.row_stride;
    const Ends ends = ends_of(x, work.columns);
    const Grid grid = fit_grid(work.grid, ends.low, ends.high, work.max_code);
    if (work.values != nullptr) {
      noted =
          round_row(grid, work.max_code, noted, x, work.columns, work.values + n * work.columns);
      continue;
    }
    work.scale[n] = grid.scale;
    work.zero_point[n] = grid.zero_point;
    noted = encode(grid, work.max_code, noted, x, work.columns, work.codes + n * work.columns);
  }
  if (!all_finite(noted)) *work.finite = false;
}

void uniform_encode(const UniformEncode& work) {
  const float* const scales = work.grids.scale;
  const float* const zeros = work.grids.zero_point;
  for_each_run(work.grids, [&](int64_t first, int64_t length, int64_t grid, int64_t step) {
    const float* __restrict__ x = work.x + first;
    uint8_t* __restrict__ codes = work.codes + first;
    const float max_code = work.max_code;
    if (step == 0) {
      encode({scales[grid], zeros[grid]}, max_code, Floats{}, x, length, codes);
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
