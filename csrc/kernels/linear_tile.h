// What the kernels of every tier share, for linear.tier.cpp: the way from sums to outputs.
#pragma once
#include <csrc/core/bundle.h>
#include <csrc/kernels/linear_codes.h>
#include <csrc/kernels/linear_float.h>

namespace torchquant {
namespace {

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
    constexpr int kBundle = kVectorLanes == 16 ? 6 : 3;
    int64_t i = 0;
    for (; i + kBundle * kVectorLanes <= count; i += kBundle * kVectorLanes)
      store(gelu(load_bundle<kBundle>(y + i)), y + i);
    for (; i + kVectorLanes <= count; i += kVectorLanes) store(gelu(load_bundle<1>(y + i)), y + i);
    for (; i < count; ++i) y[i] = gelu(y[i]);
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
