// A packed weight's values or bytes in runs of sixteen inputs, for the faces of unpack_weight.
#pragma once
#include <csrc/kernels/linear_codes.h>
#include <csrc/kernels/linear_float.h>
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

struct alignas(16) Words {
  uint32_t at[4];
};

TORCHQUANT_HOST_DEVICE uint32_t bits_of_element(float x) { return bits_of(x); }
TORCHQUANT_HOST_DEVICE uint32_t bits_of_element(uint16_t x) { return x; }
TORCHQUANT_HOST_DEVICE uint32_t bits_of_element(uint8_t x) { return x; }

// At most `count` of them; whole runs as words, where a lane's store should be one instruction.
template <class T>
TORCHQUANT_HOST_DEVICE void store_run(void* out, int64_t at, const T (&run)[kRun], int64_t count) {
  constexpr int64_t kOfWord = 4 / sizeof(T), kOfStore = 16 / sizeof(T);
  T* const to = static_cast<T*>(out) + at;
  if (count < kRun || reinterpret_cast<uintptr_t>(to) % 16 != 0) {
    for (int64_t i = 0; i < kRun; ++i)
      if (i < count) to[i] = run[i];
    return;
  }
  for (int64_t i = 0; i < kRun; i += kOfStore) {
    Words words = {};
    for (int64_t j = 0; j < kOfStore; ++j)
      words.at[j / kOfWord] |= bits_of_element(run[i + j]) << (j % kOfWord * 8 * sizeof(T));
    memcpy(__builtin_assume_aligned(static_cast<void*>(to + i), 16), &words, sizeof(words));
  }
}

TORCHQUANT_HOST_DEVICE void store_values(const UnpackWeight& work, const WeightRun& run,
                                         const uint8_t (&u)[kRun]) {
  const PackedWeight& w = work.weight;
  const int64_t output = run.tile * kTileOutputs + run.o;
  const int64_t k = run.block * kBlockInputs + run.first, grid = run.group * w.stride + output;
  if (output >= w.outputs) return;
  const float scale = w.scale[grid], offset = w.offset != nullptr ? w.offset[grid] : 0.0f;
  float values[kRun];
  for (int64_t i = 0; i < kRun; ++i)
    values[i] = (static_cast<float>(u[i] - w.origin) + offset) * scale;
  const int64_t at = output * w.layout.columns + run.group * w.layout.group_size + k;
  const int64_t count = w.layout.group_columns(run.group) - k;
  if (work.type == UnpackType::float32) return store_run(work.out, at, values, count);
  uint16_t halves[kRun];
  if (work.type == UnpackType::float16) {
    for (int64_t i = 0; i < kRun; ++i) halves[i] = float16_bits(values[i]);
  } else {
    for (int64_t i = 0; i < kRun; ++i) halves[i] = bfloat16_bits(values[i]);
  }
  store_run(work.out, at, halves, count);
}

template <int64_t kBits>
TORCHQUANT_HOST_DEVICE void codes_of_run(const uint8_t* lines, const WeightRun& run,
                                         uint8_t (&codes)[kRun]) {
  for (int64_t i = 0; i < kRun; ++i) {
    const int64_t j = run.first + i;
    codes[i] = code_in_block(lines, kBits, j / 4, 4 * run.o + j % 4);
  }
}

TORCHQUANT_HOST_DEVICE void codes_of_run(const uint8_t* lines, int64_t bits, const WeightRun& run,
                                         uint8_t (&codes)[kRun]) {
  switch (bits) {
    case 2:
      return codes_of_run<2>(lines, run, codes);
    case 3:
      return codes_of_run<3>(lines, run, codes);
    case 4:
      return codes_of_run<4>(lines, run, codes);
    default:
      return codes_of_run<8>(lines, run, codes);
  }
}

TORCHQUANT_HOST_DEVICE void unpack_run(const UnpackWeight& work, const WeightRun& run) {
  const PackedWeight& w = work.weight;
  const BlockLayout& layout = w.layout;
  const int64_t block = run.tile * layout.blocks + run.group * layout.group_blocks + run.block;
  const uint8_t* const lines = w.packed + block * layout.bits * kLine;
  uint8_t u[kRun];
  codes_of_run(lines, layout.bits, run, u);
  if (w.levels != nullptr) {
    for (int64_t i = 0; i < kRun; ++i) u[i] = entry_of(w, run.tile, run.o, u[i]);
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
