// A packed weight's values, element by element, for the faces of unpack_weight.
#pragma once
#include <csrc/kernels/linear_tile.h>

namespace torchquant {
namespace {

struct WeightPlace {
  int64_t tile;
  int64_t group;
  int64_t block;  // of the group
};

// Element (o, j) of a block, 0 <= o < 16 and 0 <= j < 32, stored in `out` where the weight has it.
TORCHQUANT_HOST_DEVICE void unpack_element(const UnpackWeight& work, const WeightPlace& place,
                                           int64_t o, int64_t j) {
  const PackedWeight& w = work.weight;
  const BlockLayout& layout = w.layout;
  const int64_t output = place.tile * kTileOutputs + o, k = place.block * kBlockInputs + j;
  if (output >= w.outputs || k >= layout.group_columns(place.group)) return;
  const int64_t block =
      place.tile * layout.blocks + place.group * layout.group_blocks + place.block;
  const uint8_t code =
      code_in_block(w.packed + block * layout.bits * kLine, layout.bits, j / 4, 4 * o + j % 4);
  const int64_t grid = place.group * w.stride + output;
  float value = static_cast<float>(entry_of(w, place.tile, o, code) - w.origin);
  if (w.offset != nullptr) value += w.offset[grid];
  value *= w.scale[grid];
  const int64_t at = output * layout.columns + place.group * layout.group_size + k;
  if (work.type == FloatType::float32) {
    static_cast<float*>(work.out)[at] = value;
  } else {
    static_cast<uint16_t*>(work.out)[at] =
        work.type == FloatType::float16 ? float16_bits(value) : bfloat16_bits(value);
  }
}

}  // namespace
}  // namespace torchquant
