// Codes of packed weights out of their lines, one by one.
#pragma once
#include <csrc/kernels/linear.h>

namespace torchquant {
namespace {

// The u of a weight (see linear.h) from its code, for tile-relative output o.
TORCHQUANT_HOST_DEVICE uint8_t entry_of(const PackedWeight& weight, int64_t tile, int64_t o,
                                        uint8_t code) {
  if (weight.levels == nullptr) return code;
  const int64_t row = (tile * kTileOutputs + o) * weight.level_stride;
  return static_cast<uint8_t>(weight.levels[row + code] + 128);
}

inline const uint8_t* lines_of(const PackedWeight& w, int64_t tile, int64_t block) {
  return w.packed + (tile * w.layout.blocks + block) * w.layout.bits * kLine;
}

constexpr int32_t kByteOrigin = 128;  // the u of a multiplied weight that is zero

// What output o's u are multiplied with in block `block`, and the u that is zero there.
struct Multiplier {
  int32_t value;
  int32_t zero;
};
inline Multiplier multiplier_of(const PackedWeight& w, int64_t block, int64_t output) {
  const GroupMultipliers& m = w.multipliers;
  const int64_t at = block / m.blocks * w.stride + output;
  const int32_t offset = m.offset == nullptr ? 0 : static_cast<int32_t>(m.offset[at]);
  return {m.values[at], (1 << (w.layout.bits - 1)) - offset};
}

// Code of byte i of V[step] in a block (Note [weight tiles]).
TORCHQUANT_HOST_DEVICE uint8_t code_in_block(const uint8_t* lines, int64_t bits, int64_t step,
                                             int64_t i) {
  switch (bits) {
    case 8:
      return lines[step * kLine + i];
    case 4:
      return (lines[step / 2 * kLine + i] >> (step % 2 * 4)) & 15;
    case 2:
      return (lines[step / 4 * kLine + i] >> (step % 4 * 2)) & 3;
    default: {
      const uint8_t low = (lines[step / 4 * kLine + i] >> (step % 4 * 2)) & 3;
      const uint8_t high = (lines[2 * kLine + i] >> step) & 1;
      return static_cast<uint8_t>(low | (high << 2));
    }
  }
}

}  // namespace
}  // namespace torchquant
