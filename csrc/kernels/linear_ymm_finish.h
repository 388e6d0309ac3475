// The way from sums to outputs of plain products, for the kernels of 32-byte vectors.
#pragma once
#include <csrc/core/vectors.h>
#include <csrc/kernels/linear_plain.h>
#include <csrc/kernels/linear_tile.h>

namespace torchquant {
namespace {

// What eight outputs of a group have in common: see add_group, scale_row and store_row.
struct HalfOutputs {
  inline __attribute__((always_inline)) HalfOutputs(const PackedProduct& p, int64_t g,
                                                    int64_t output)
      : output(output), scale(load<Floats>(p.weight.scale_of(g) + output)) {
    const PackedWeight& w = p.weight;
    if (w.offset != nullptr) offset = load<Floats>(w.offset + g * w.stride + output);
    if (p.bias != nullptr) bias = load<Floats>(p.bias + output);
    if (p.a_zero != nullptr) sum = load<Floats>(w.sum + output);
    if (p.a_zero != nullptr && p.one_grid && p.rows > 0) zero = p.a_zero[0] * sum;
    if (p.codes != nullptr) {
      code_scale = load<Floats>(p.code_scale + output);
      code_zero_point = load<Floats>(p.code_zero_point + output);
      reciprocal = load<Floats>(p.code_reciprocal + output);
      reciprocal_rest = load<Floats>(p.code_reciprocal_rest + output);
      lowest = load<Floats>(p.code_lowest + output);
      highest = load<Floats>(p.code_highest + output);
    }
  }

  inline __attribute__((always_inline)) Floats value(const PackedProduct& p, int64_t g, int64_t row,
                                                     const int32_t* d, const float* before) const {
    Floats y = to_floats(load<Ints>(d));
    if (p.weight.offset != nullptr)
      y = fused(offset, Floats{} + static_cast<float>(p.sums[row * p.weight.layout.groups + g]), y);
    y = y * scale;
    return g > 0 ? load<Floats>(before) + y : y;
  }

  inline __attribute__((always_inline)) Floats scaled(const PackedProduct& p, int64_t row,
                                                      Floats y) const {
    if (p.a_zero != nullptr) y = y - (p.one_grid ? zero : p.a_zero[row] * sum);
    const float a_scale = p.a_scale[row];
    return p.bias != nullptr ? fused(y, Floats{} + a_scale, bias) : y * a_scale;
  }

  inline __attribute__((always_inline)) void store_at(const PackedProduct& p, int64_t row,
                                                      Floats y) const {
    const int64_t at = row * p.out_stride + output;
    if (p.codes == nullptr) {
      if (p.residual != nullptr) y += load<Floats>(p.residual + at);
      return store(y, p.out + at);
    }
    y = smaller(larger(y, lowest), highest);  // CodeByProducts
    Floats quotient = fused(y, reciprocal, y * reciprocal_rest);
    quotient = fused(fused(-quotient, code_scale, y), reciprocal, quotient);
    store_narrow(rounded(quotient + code_zero_point, 0), p.codes + at);
  }

  const int64_t output;
  const Floats scale;
  Floats offset{}, sum{}, zero{}, bias{};
  Floats code_scale{}, code_zero_point{}, reciprocal{}, reciprocal_rest{}, lowest{}, highest{};
};

// Sums of group g, [rows, 16], of a tile that has all its outputs: to values, and those of the last
// group to outputs.
template <class What>
void finish_plain(const PackedProduct& all, int64_t g, int64_t tile, int64_t row, int64_t rows,
                  const int32_t* sums, float* values) {
  PackedProduct p = all;  // copied: stores to `out` could change what is behind a reference
  What::know(p);
  const bool last = g + 1 == p.weight.layout.groups, activates = p.epilogue != Epilogue::none;
  const auto for_each_half = [&](const auto& visit) __attribute__((always_inline)) {
    for (int64_t h = 0; h < kTileOutputs; h += kVectorLanes) {
      const HalfOutputs outputs(p, g, tile * kTileOutputs + h);
      for (int64_t r = 0; r < rows; ++r) visit(outputs, row + r, r * kTileOutputs + h);
    }
  };
  with_bool(last && !activates, [&](auto stores) __attribute__((always_inline)) {
    for_each_half([&](const HalfOutputs& outputs, int64_t r, int64_t at)
                      __attribute__((always_inline)) {
                        Floats y = outputs.value(p, g, r, sums + at, values + at);
                        if (last) y = outputs.scaled(p, r, y);
                        if (decltype(stores)::value) {
                          outputs.store_at(p, r, y);
                        } else {
                          store(y, values + at);
                        }
                      });
  });
  if (!last || !activates) return;
  activate(p.epilogue, values, rows * kTileOutputs);
  for_each_half([&](const HalfOutputs& outputs, int64_t r, int64_t at) __attribute__((
                    always_inline)) { outputs.store_at(p, r, load<Floats>(values + at)); });
}

}  // namespace
}  // namespace torchquant
