// The sequential recurrence inside a block of coordinates, for *.tier.cpp: up to kRowLanes rows
// side by side, stored coordinate by coordinate. Two chains of divisions hide each other's latency.
#pragma once
#include <csrc/core/lanes.h>

namespace torchquant {

constexpr int64_t kRowLanes = 32;
constexpr int64_t kRecurrenceStep =
    8;  // coordinates rounded between two updates of the rest of their block
constexpr int64_t kTileColumns = 128;  // coordinates of the widest block

// Adds what kRecurrenceStep coordinates changed, in their order, to one coordinate behind them.
static inline void add_changes(const float (*change)[kRowLanes], const float* matrix,
                               int64_t stride, float* target) {
  constexpr int64_t kVectors = kRowLanes / kFloat8;
  Float8 sums[kVectors];
#pragma GCC unroll 4
  for (int64_t v = 0; v < kVectors; ++v) sums[v] = TORCHQUANT_LOAD8(target + v * kFloat8);
#pragma GCC unroll 8
  for (int64_t j = 0; j < kRecurrenceStep; ++j) {
    const float factor = matrix[j * stride];
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v)
      sums[v] += TORCHQUANT_LOAD8(change[j] + v * kFloat8) * factor;
  }
#pragma GCC unroll 4
  for (int64_t v = 0; v < kVectors; ++v) TORCHQUANT_STORE8(target + v * kFloat8, sums[v]);
}

// For j = 0 .. width-1: round(j) reads target[j] and writes change[j]; then target[k] += change[j]
// * matrix[j][k] for all k > j.
template <class Round>
static inline void run_recurrence(int64_t width, const float* matrix, int64_t stride,
                                  const Round& round, const float (*change)[kRowLanes],
                                  float (*target)[kRowLanes]) {
  for (int64_t start = 0; start < width; start += kRecurrenceStep) {
    const int64_t end = start + kRecurrenceStep < width ? start + kRecurrenceStep : width;
    for (int64_t j = start; j < end; ++j) {
      round(j);
      for (int64_t k = j + 1; k < end; ++k) {
        const float factor = matrix[j * stride + k];
        for (int64_t l = 0; l < kRowLanes; ++l) target[k][l] += change[j][l] * factor;
      }
    }
    for (int64_t k = end; k < width; ++k)
      add_changes(change + start, matrix + start * stride + k, stride, target[k]);
  }
}

static inline void store_codes(const float (*code)[kRowLanes], int64_t width, int64_t rows,
                               uint8_t* codes, int64_t stride) {
  float by_row[kRowLanes * kTileColumns];
  transpose(code[0], kRowLanes, width, rows, by_row, kTileColumns);
  for (int64_t l = 0; l < rows; ++l) {
    uint8_t* __restrict__ row = codes + l * stride;
    for (int64_t j = 0; j < width; ++j) row[j] = static_cast<uint8_t>(by_row[l * kTileColumns + j]);
  }
}

}  // namespace torchquant
