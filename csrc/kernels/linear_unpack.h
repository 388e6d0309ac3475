// A packed weight's values or bytes in runs of sixteen inputs, for the faces of unpack_weight.
#pragma once
#include <csrc/kernels/linear_tile.h>
#include <string.h>

namespace torchquant {
namespace {

constexpr int64_t kRun = 16;  // half a block's inputs: what one lane of a warp stores

struct WeightRun {
  int64_t tile;
  int64_t group;
  int64_t block;  // of the group
  int64_t o;      // of the tile
  int64_t first;  // input of the block: 0 or 16
};

// At most `count` of them.
template <class T>
TORCHQUANT_HOST_DEVICE void store_run(void* out, int64_t at, const T (&run)[kRun], int64_t count) {
  T* const to = static_cast<T*>(out) + at;
  if (count >= kRun && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    memcpy(__builtin_assume_aligned(static_cast<void*>(to), 16), run, sizeof(run));
  } else {
    for (int64_t i = 0; i < kRun; ++i)
      if (i < count) to[i] = run[i];
  }
}

TORCHQUANT_HOST_DEVICE void store_values(const UnpackWeight& work, const WeightRun& run,
                                         const uint8_t (&u)[kRun]) {
  const PackedWeight& w = work.weight;
  const int64_t output = run.tile * kTileOutputs + run.o;
  const int64_t k = run.block * kBlockInputs + run.first, grid = run.group * w.stride + output;
  if (output >= w.outputs) return;
  float values[kRun];
  for (int64_t i = 0; i < kRun; ++i) {
    values[i] = static_cast<float>(u[i] - w.origin);
    if (w.offset != nullptr) values[i] += w.offset[grid];
    values[i] *= w.scale[grid];
  }
  const int64_t at = output * w.layout.columns + run.group * w.layout.group_size + k;
  const int64_t count = w.layout.group_columns(run.group) - k;
  if (work.type == UnpackType::float32) return store_run(work.out, at, values, count);
  uint16_t halves[kRun];
  for (int64_t i = 0; i < kRun; ++i)
    halves[i] =
        work.type == UnpackType::float16 ? float16_bits(values[i]) : bfloat16_bits(values[i]);
  store_run(work.out, at, halves, count);
}

TORCHQUANT_HOST_DEVICE void unpack_run(const UnpackWeight& work, const WeightRun& run) {
  const PackedWeight& w = work.weight;
  const BlockLayout& layout = w.layout;
  const int64_t block = run.tile * layout.blocks + run.group * layout.group_blocks + run.block;
  const uint8_t* const lines = w.packed + block * layout.bits * kLine;
  uint8_t u[kRun];
  for (int64_t i = 0; i < kRun; ++i) {
    const int64_t j = run.first + i;
    u[i] =
        entry_of(w, run.tile, run.o, code_in_block(lines, layout.bits, j / 4, 4 * run.o + j % 4));
  }
  if (work.type != UnpackType::bytes) return store_values(work, run, u);
  if (w.needs_signs()) {
    for (int64_t i = 0; i < kRun; ++i) u[i] ^= 0x80;
  }
  const int64_t row = run.tile * kTileOutputs + run.o;
  const int64_t of_row = run.group * layout.group_blocks + run.block;
  store_run(work.out, (row * layout.blocks + of_row) * kBlockInputs + run.first, u, kRun);
}

}  // namespace
}  // namespace torchquant
