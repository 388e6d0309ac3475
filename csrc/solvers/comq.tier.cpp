#include <csrc/solvers/comq.h>

#include <csrc/core/row_tile.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

static_assert(kComqMaxBlock <= kTileColumns);

// Sums run in a fixed number of lanes whatever the vector width, so every tier rounds alike.
constexpr int64_t kLookLanes = 16;  // coordinates whose codes are tried at once in comq_sweep
constexpr int64_t kCacheLine = 16;  // floats
constexpr int64_t kDotVectors = kComqDotLanes / kFloat8;

// One block for up to kRowLanes rows, stored coordinate by coordinate with the rows side by side.
struct Tile {
  float weight[kComqMaxBlock][kRowLanes];
  float gradient[kComqMaxBlock][kRowLanes];
  float scale[kComqMaxBlock][kRowLanes];
  float zero_point[kComqMaxBlock][kRowLanes];
  float code[kComqMaxBlock][kRowLanes];
  float change[kComqMaxBlock][kRowLanes];
};

void load_tile(const ComqBlock& block, int64_t first, int64_t lanes, Tile& tile) {
  const RowGrids& grids = block.grids;
  const int64_t grid_columns = grids.column_stride == 0 ? 1 : block.width;
  transpose(block.weight + first * block.stride, block.stride, lanes, block.width, tile.weight[0],
            kRowLanes);
  transpose(block.gradient + first * block.stride, block.stride, lanes, block.width,
            tile.gradient[0], kRowLanes);
  transpose(grids.scale + first * grids.row_stride, grids.row_stride, lanes, grid_columns,
            tile.scale[0], kRowLanes);
  transpose(grids.zero_point + first * grids.row_stride, grids.row_stride, lanes, grid_columns,
            tile.zero_point[0], kRowLanes);
}

void store_tile(const ComqBlock& block, int64_t first, int64_t lanes, const Tile& tile) {
  transpose(tile.change[0], kRowLanes, block.width, lanes, block.change + first * block.width,
            block.width);
  store_codes(tile.code, block.width, lanes, block.codes + first * block.stride, block.stride);
}

void round_coordinate(const ComqBlock& block, int64_t j, Tile& tile) {
  const int64_t grid = block.grids.column_stride == 0 ? 0 : j;
  const float inverse = block.inverse_diagonal[j];
  const float alive = inverse > 0.0f ? 1.0f : 0.0f;
  for (int64_t l = 0; l < kRowLanes; ++l) {
    const float w = tile.weight[j][l];
    const float scale = tile.scale[grid][l];
    const float zero_point = tile.zero_point[grid][l];
    const float code =
        to_code(w + tile.gradient[j][l] * inverse, scale, zero_point, block.grids.max_code);
    tile.code[j][l] = code;
    tile.change[j][l] = (w - to_value(code, scale, zero_point)) * alive;
  }
}

void block_rows(const ComqBlock& block, int64_t first, int64_t lanes) {
  Tile tile;
  if (lanes < kRowLanes) tile = {};  // spare lanes compute on zeros and are not stored
  load_tile(block, first, lanes, tile);
  const auto round = [&](int64_t j) { round_coordinate(block, j, tile); };
  run_recurrence(block.width, block.gram, block.gram_stride, round, tile.change, tile.gradient);
  store_tile(block, first, lanes, tile);
}

void block_row_in_order(const ComqBlock& block, int64_t row) {
  const float* weight = block.weight + row * block.stride;
  float gradient[kComqMaxBlock];
  for (int64_t k = 0; k < block.width; ++k) gradient[k] = block.gradient[row * block.stride + k];
  for (int64_t t = 0; t < block.width; ++t) {
    const int64_t j = block.order[row * block.stride + t] - block.first_column;
    const int64_t grid = row * block.grids.row_stride + j * block.grids.column_stride;
    const float scale = block.grids.scale[grid];
    const float zero_point = block.grids.zero_point[grid];
    const float inverse = block.inverse_diagonal[j];
    const float code =
        to_code(weight[j] + gradient[j] * inverse, scale, zero_point, block.grids.max_code);
    const float change = inverse > 0.0f ? weight[j] - to_value(code, scale, zero_point) : 0.0f;
    const float* gram = block.gram + j * block.gram_stride;
    for (int64_t k = 0; k < block.width; ++k) gradient[k] += change * gram[k];
    block.codes[row * block.stride + j] = static_cast<uint8_t>(code);
    block.change[row * block.width + j] = change;
  }
}

// Adds 64 products to 64 running sums.
inline void add_products(const float* a, const float* b, Float8 (&sums)[kDotVectors]) {
#pragma GCC unroll 8
  for (int64_t v = 0; v < kDotVectors; ++v) {
    sums[v] += TORCHQUANT_LOAD8(a + v * kFloat8) * TORCHQUANT_LOAD8(b + v * kFloat8);
  }
}

// `ahead` is read soon after: brought into the cache on the way.
float dot(const float* a, const float* b, int64_t length, const float* ahead) {
  constexpr int64_t kLanes = kComqDotLanes;
  Float8 sums[kDotVectors] = {};
  int64_t k = 0;
  for (; k + kLanes <= length; k += kLanes) {
    for (int64_t line = 0; line < kLanes; line += kCacheLine) __builtin_prefetch(ahead + k + line);
    add_products(a + k, b + k, sums);
  }
  if (k < length) {
    float a_left[kLanes] = {};
    float b_left[kLanes] = {};
    for (int64_t l = 0; k + l < length; ++l) {
      a_left[l] = a[k + l];
      b_left[l] = b[k + l];
    }
    add_products(a_left, b_left, sums);
  }
  const Float8 sum =
      ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

// Left-looking with look-ahead: while coordinate t is rounded, the product for coordinate t + 1 is
// summed without it and corrected by one term afterwards, so nothing but `change` is written.
struct GreedyRow {
  const ComqGreedy& all;
  const float* weight;
  const float* gradient;
  const int32_t* order;
  const float* scale;
  const float* zero_point;
  uint8_t* codes;
  float* change;
  float product = 0.0f;  // sum over visited k of change_k H_jk for the coordinate j that is next

  GreedyRow(const ComqGreedy& rows, int64_t row)
      : all(rows),
        weight(rows.weight + row * rows.columns),
        gradient(rows.gradient + row * rows.columns),
        order(rows.order + row * rows.columns),
        scale(rows.grids.scale + row * rows.grids.row_stride),
        zero_point(rows.grids.zero_point + row * rows.grids.row_stride),
        codes(rows.codes + row * rows.columns),
        change(rows.change + row * rows.columns) {
    for (int64_t k = 0; k < rows.columns; ++k) change[k] = 0.0f;
  }

  // Row t of the Gram in this row's order; beyond the end any memory that may be read.
  const float* gram(int64_t t) const {
    return all.gram + (t < all.columns ? order[t] * all.columns : 0);
  }

  void step(int64_t t) {
    const float next_product = dot(change, gram(t + 1), all.columns, gram(t + 2));
    const int64_t j = order[t], grid = j * all.grids.column_stride;
    const float inverse = all.inverse_diagonal[j];
    const float best = weight[j] + (gradient[j] + product) * inverse;
    const float code = to_code(best, scale[grid], zero_point[grid], all.grids.max_code);
    const float moved = weight[j] - to_value(code, scale[grid], zero_point[grid]);
    change[j] = inverse > 0.0f ? moved : 0.0f;
    codes[j] = static_cast<uint8_t>(code);
    product = next_product + change[j] * gram(t + 1)[j];
  }
};

// Codes change rarely after the first sweep: kLookLanes coordinates are tried at once, and only the
// first that changes is applied.
int64_t sweep_row(const ComqSweep& sweep, int64_t row) {
  const int64_t columns = sweep.columns;
  uint8_t* codes = sweep.codes + row * columns;
  float* gradient = sweep.gradient + row * columns;
  const int32_t* order = sweep.order == nullptr ? nullptr : sweep.order + row * columns;
  const float* scales = sweep.grids.scale + row * sweep.grids.row_stride;
  const float* zero_points = sweep.grids.zero_point + row * sweep.grids.row_stride;
  int64_t changed = 0;
  for (int64_t t = 0; t < columns;) {
    const int64_t lanes = columns - t < kLookLanes ? columns - t : kLookLanes;
    float code[kLookLanes];
    float before[kLookLanes];
    for (int64_t l = 0; l < lanes; ++l) {
      const int64_t j = order == nullptr ? t + l : order[t + l];
      const float scale = scales[j * sweep.grids.column_stride];
      const float zero_point = zero_points[j * sweep.grids.column_stride];
      before[l] = static_cast<float>(codes[j]);
      const float best =
          to_value(before[l], scale, zero_point) + gradient[j] * sweep.inverse_diagonal[j];
      const float tried = to_code(best, scale, zero_point, sweep.grids.max_code);
      code[l] = sweep.inverse_diagonal[j] > 0.0f ? tried : before[l];
    }
    int64_t l = 0;
    while (l < lanes && code[l] == before[l]) ++l;
    t += l;
    if (l == lanes) continue;
    const int64_t j = order == nullptr ? t : order[t];
    const float change = (before[l] - code[l]) * scales[j * sweep.grids.column_stride];
    const float* __restrict__ gram = sweep.gram + j * columns;
    for (int64_t k = 0; k < columns; ++k) gradient[k] += change * gram[k];
    codes[j] = static_cast<uint8_t>(code[l]);
    ++changed;
    ++t;
  }
  return changed;
}

}  // namespace

void comq_block(const ComqBlock& block) {
  if (block.order != nullptr) {
    for (int64_t row = 0; row < block.rows; ++row) block_row_in_order(block, row);
    return;
  }
  for (int64_t first = 0; first < block.rows; first += kRowLanes) {
    block_rows(block, first, block.rows - first < kRowLanes ? block.rows - first : kRowLanes);
  }
}

// Two rows in turn: the rounding of one hides behind the product of the other.
void comq_greedy(const ComqGreedy& all) {
  int64_t row = 0;
  for (; row + 2 <= all.rows; row += 2) {
    GreedyRow first(all, row), second(all, row + 1);
    for (int64_t t = 0; t < all.columns; ++t) {
      first.step(t);
      second.step(t);
    }
  }
  if (row == all.rows) return;
  GreedyRow last(all, row);
  for (int64_t t = 0; t < all.columns; ++t) last.step(t);
}

void comq_sweep(const ComqSweep& sweep) {
  for (int64_t row = 0; row < sweep.rows; ++row) *sweep.changed += sweep_row(sweep, row);
}

}  // namespace torchquant::TORCHQUANT_TIER
