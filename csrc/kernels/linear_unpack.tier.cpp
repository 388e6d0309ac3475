#include <csrc/kernels/linear_unpack.h>

namespace torchquant::TORCHQUANT_TIER {

void unpack_weight(const UnpackWeight& work) {
  const BlockLayout& layout = work.weight.layout;
  for (int64_t tile = work.first_tile; tile < work.last_tile; ++tile) {
    for (int64_t g = 0; g < layout.groups; ++g) {
      for (int64_t block = 0; block < layout.blocks_of_group(g); ++block) {
        for (int64_t o = 0; o < kTileOutputs; ++o) {
          unpack_run(work, {tile, g, block, o, 0});
          unpack_run(work, {tile, g, block, o, kRun});
        }
      }
    }
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
