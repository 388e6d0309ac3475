#include <csrc/solvers/gptq.h>

#include <csrc/core/warp.cuh>

namespace torchquant {
namespace {

static_assert(kGptqMaxBlock <= WarpRow::kColumns);

// One warp a row, in the order of gptq.tier.cpp. The columns already rounded are updated along with
// the others: nobody reads them.
__device__ void block_row(const GptqBlock& block, int64_t row) {
  const int width = static_cast<int>(block.width);
  WarpRow weight, codes, changes;
  weight.load(block.weight + row * block.stride, width);
  float objective = 0.0f;
  for (int j = 0; j < width; ++j) {
    const int64_t grid = row * block.grid_row_stride + j * block.grid_column_stride;
    const float scale = block.scale[grid];
    const float zero_point = block.zero_point[grid];
    const float* factor = block.factor + j * block.factor_stride;
    const float w = weight.at(j);
    const float code = to_code(w, scale, zero_point, block.max_code);
    const float change = (to_value(code, scale, zero_point) - w) / factor[j];
    objective += change * change;
    weight.add(change, factor, width);
    codes.set(j, code);
    changes.set(j, change);
  }
  codes.for_each_own(width, [&](int k, float code) {
    block.codes[row * block.stride + k] = static_cast<uint8_t>(code);
  });
  changes.for_each_own(width,
                       [&](int k, float change) { block.change[row * block.width + k] = change; });
  if (warp_lane() == 0) block.objective[row] += objective;
}

__global__ void gptq_block_kernel(const GptqBlock block) {
  for (int64_t row = first_row(); row < block.rows; row += row_step()) block_row(block, row);
}

}  // namespace

void launch_gptq_block(const GptqBlock& block, void* stream) {
  launch_rows("gptq_block", gptq_block_kernel, block, block.rows, stream);
}

}  // namespace torchquant
