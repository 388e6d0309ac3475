#include <csrc/solvers/gptq.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

constexpr int64_t kRowLanes = 32;  // rows side by side: two chains of divisions hide each other's latency

struct Tile {  // column by column, the rows side by side
  float weight[kGptqMaxBlock][kRowLanes];
  float scale[kGptqMaxBlock][kRowLanes];
  float zero_point[kGptqMaxBlock][kRowLanes];
};

void load_tile(const GptqBlock& block, int64_t first, int64_t lanes, Tile& tile) {
  const int64_t grid_columns = block.grid_column_stride == 0 ? 1 : block.width;
  for (int64_t l = 0; l < kRowLanes; ++l) {
    const int64_t row = l < lanes ? first + l : first;  // spare lanes repeat the first row
    for (int64_t j = 0; j < block.width; ++j) tile.weight[j][l] = block.weight[row * block.stride + j];
    for (int64_t j = 0; j < grid_columns; ++j) {
      tile.scale[j][l] = block.scale[row * block.grid_row_stride + j];
      tile.zero_point[j][l] = block.zero_point[row * block.grid_row_stride + j];
    }
  }
}

void block_rows(const GptqBlock& block, int64_t first, int64_t lanes) {
  Tile tile;
  load_tile(block, first, lanes, tile);
  float objective[kRowLanes] = {};
  for (int64_t j = 0; j < block.width; ++j) {
    const int64_t grid = block.grid_column_stride == 0 ? 0 : j;
    const float* scale = tile.scale[grid];
    const float* zero_point = tile.zero_point[grid];
    const float* factor = block.factor + j * block.factor_stride;
    float code[kRowLanes];
    float error[kRowLanes];
    for (int64_t l = 0; l < kRowLanes; ++l) {
      const float w = tile.weight[j][l];
      code[l] = to_code(w, scale[l], zero_point[l], block.max_code);
      error[l] = (w - to_value(code[l], scale[l], zero_point[l])) / factor[j];
      objective[l] += error[l] * error[l];
    }
    for (int64_t k = j + 1; k < block.width; ++k) {
      const float u = factor[k];
      for (int64_t l = 0; l < kRowLanes; ++l) tile.weight[k][l] -= error[l] * u;
    }
    for (int64_t l = 0; l < lanes; ++l) {
      block.codes[(first + l) * block.stride + j] = static_cast<uint8_t>(code[l]);
      block.error[(first + l) * block.width + j] = error[l];
    }
  }
  for (int64_t l = 0; l < lanes; ++l) block.objective[first + l] += objective[l];
}

}  // namespace

void gptq_block(const GptqBlock& block) {
  for (int64_t first = 0; first < block.rows; first += kRowLanes) {
    block_rows(block, first, block.rows - first < kRowLanes ? block.rows - first : kRowLanes);
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
