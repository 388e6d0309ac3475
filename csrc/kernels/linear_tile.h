// What the kernels of every tier share, for linear.tier.cpp: codes out of their lines, and the way
// from sums to outputs.
#pragma once
#include <csrc/kernels/linear.h>
#include <csrc/kernels/linear_float.h>

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

// values (+)= scale * (D + offset * S), for one row, group and tile.
inline void add_group(const PackedProduct& p, int64_t g, int64_t row, int64_t output,
                      const int32_t* d, float* values) {
  const PackedWeight& w = p.weight;
  const float* __restrict__ scale = w.scale_of(g) + output;
  float added[kTileOutputs];
  for (int64_t o = 0; o < kTileOutputs; ++o) added[o] = static_cast<float>(d[o]);
  if (w.offset != nullptr) {
    const float sum = static_cast<float>(p.sums[row * w.layout.groups + g]);
    const float* __restrict__ offset = w.offset + g * w.stride + output;
    for (int64_t o = 0; o < kTileOutputs; ++o) added[o] = fused(offset[o], sum, added[o]);
  }
  for (int64_t o = 0; o < kTileOutputs; ++o) added[o] *= scale[o];
  for (int64_t o = 0; o < kTileOutputs; ++o) values[o] = g == 0 ? added[o] : values[o] + added[o];
}

// Not inlined: every loop to outputs would have a copy.
__attribute__((noinline)) inline void activate(Epilogue epilogue, float* __restrict__ y,
                                               int64_t count) {
  if (epilogue == Epilogue::gelu) {
    for (int64_t i = 0; i < count; ++i) y[i] = gelu(y[i]);
  } else if (epilogue == Epilogue::silu) {
    for (int64_t i = 0; i < count; ++i) y[i] = silu(y[i]);
  }
}

// One row's sums over groups to values [output, output + count) of a tile ahead of the activation
// function.
inline void scale_row(const PackedProduct& p, int64_t row, int64_t output, int64_t count,
                      float* __restrict__ y) {
  const float a_scale = p.a_scale[row];
  if (p.a_zero != nullptr) {
    const float zero = p.a_zero[row];
    const float* __restrict__ sum = p.weight.sum + output;
    for (int64_t o = 0; o < count; ++o) y[o] -= zero * sum[o];
  }
  if (p.bias != nullptr) {
    const float* __restrict__ bias = p.bias + output;
    for (int64_t o = 0; o < count; ++o) y[o] = fused(y[o], a_scale, bias[o]);
  } else {
    for (int64_t o = 0; o < count; ++o) y[o] *= a_scale;
  }
}

inline void store_row(const PackedProduct& p, int64_t row, int64_t output, int64_t count,
                      float* __restrict__ y) {
  const int64_t at = row * p.out_stride + output;
  if (p.residual != nullptr) {
    const float* __restrict__ residual = p.residual + at;
    for (int64_t o = 0; o < count; ++o) y[o] += residual[o];
  }
  if (p.codes != nullptr) {
    const float* __restrict__ scale = p.code_scale + output;
    const float* __restrict__ zero_point = p.code_zero_point + output;
    uint8_t* __restrict__ codes = p.codes + at;
    const float max_code = p.max_code;
    for (int64_t o = 0; o < count; ++o)
      codes[o] = static_cast<uint8_t>(
          static_cast<int32_t>(to_code(y[o], scale[o], zero_point[o], max_code)));
    return;
  }
  float* __restrict__ out = p.out + at;
  for (int64_t o = 0; o < count; ++o) out[o] = y[o];
}

// Sums over groups, one row of a tile after another, to outputs. The activation function takes all
// of them at once: one value waits long for each step, many hardly.
inline void finish_tile(const PackedProduct& p, int64_t tile, int64_t row, int64_t rows,
                        float* values) {
  const int64_t output = tile * kTileOutputs, left = p.weight.outputs - output;
  const int64_t count = left < kTileOutputs ? left : kTileOutputs;
  for (int64_t r = 0; r < rows; ++r)
    scale_row(p, row + r, output, count, values + r * kTileOutputs);
  activate(p.epilogue, values, rows * kTileOutputs);
  for (int64_t r = 0; r < rows; ++r)
    store_row(p, row + r, output, count, values + r * kTileOutputs);
}

}  // namespace
}  // namespace torchquant
