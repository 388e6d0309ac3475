#include <csrc/solvers/gptq.h>

#include <csrc/core/row_tile.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

static_assert(kGptqMaxBlock <= kTileColumns);

struct Tile {  // column by column, the rows side by side
  float weight[kGptqMaxBlock][kRowLanes];
  float scale[kGptqMaxBlock][kRowLanes];
  float zero_point[kGptqMaxBlock][kRowLanes];
  float code[kGptqMaxBlock][kRowLanes];
  float change[kGptqMaxBlock][kRowLanes];  // minus the error
  float objective[kRowLanes];
};

void load_tile(const GptqBlock& block, int64_t first, int64_t lanes, Tile& tile) {
  const int64_t stride = block.grid_row_stride;
  const int64_t grid_columns = block.grid_column_stride == 0 ? 1 : block.width;
  transpose(block.weight + first * block.stride, block.stride, lanes, block.width, tile.weight[0],
            kRowLanes);
  transpose(block.scale + first * stride, stride, lanes, grid_columns, tile.scale[0], kRowLanes);
  transpose(block.zero_point + first * stride, stride, lanes, grid_columns, tile.zero_point[0],
            kRowLanes);
}

void round_column(const GptqBlock& block, int64_t j, Tile& tile) {
  const int64_t grid = block.grid_column_stride == 0 ? 0 : j;
  const float pivot = block.factor[j * block.factor_stride + j];
  for (int64_t l = 0; l < kRowLanes; ++l) {
    const float scale = tile.scale[grid][l];
    const float zero_point = tile.zero_point[grid][l];
    const float code = to_code(tile.weight[j][l], scale, zero_point, block.max_code);
    const float change = (to_value(code, scale, zero_point) - tile.weight[j][l]) / pivot;
    tile.code[j][l] = code;
    tile.change[j][l] = change;
    tile.objective[l] += change * change;
  }
}

void block_rows(const GptqBlock& block, int64_t first, int64_t lanes) {
  Tile tile;
  if (lanes < kRowLanes) tile = {};  // spare lanes compute on zeros and are not stored
  for (int64_t l = 0; l < kRowLanes; ++l) tile.objective[l] = 0.0f;
  load_tile(block, first, lanes, tile);
  const auto round = [&](int64_t j) { round_column(block, j, tile); };
  run_recurrence(block.width, block.factor, block.factor_stride, round, tile.change, tile.weight);
  store_codes(tile.code, block.width, lanes, block.codes + first * block.stride, block.stride);
  transpose(tile.change[0], kRowLanes, block.width, lanes, block.change + first * block.width,
            block.width);
  for (int64_t l = 0; l < lanes; ++l) block.objective[first + l] += tile.objective[l];
}

}  // namespace

void gptq_block(const GptqBlock& block) {
  for (int64_t first = 0; first < block.rows; first += kRowLanes) {
    block_rows(block, first, block.rows - first < kRowLanes ? block.rows - first : kRowLanes);
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
