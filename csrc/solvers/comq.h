// COMQ: coordinate-wise minimisation of tr((W - Q) H (W - Q)^T) over integer codes and scales
// (arXiv 2403.07134). One coordinate's exact minimiser is u = Q_j + G_j / H_jj with the residual
// gradient G = P - Q H, rounded to the grid; then G -= (q - Q_j) H_j. A channel with H_jj = 0
// (dead) is rounded and never moves G.
#pragma once
#include <csrc/core/cpu_tier.h>
#include <csrc/core/quant_math.h>

#include <cstdint>

namespace torchquant {

// Scales and zero points of some rows: one a row (column_stride 0) or one a column (column_stride
// 1).
struct RowGrids {
  const float* scale;
  const float* zero_point;
  int64_t row_stride;
  int64_t column_stride;
  float max_code;
};

constexpr int64_t kComqMaxBlock = 128;
constexpr int64_t kComqDotLanes =
    64;  // partial sums of a dot product, on every device: equal rounding

// First sweep over one block of consecutive coordinates, each row starting from its float weight.
struct ComqBlock {
  int64_t rows;
  int64_t width;          // <= kComqMaxBlock
  const float* weight;    // [rows, width], row stride `stride`
  const float* gradient;  // [rows, width], row stride `stride`: G with every earlier block applied
  int64_t stride;
  const float* gram;  // [width, width], row stride gram_stride
  int64_t gram_stride;
  const float* inverse_diagonal;  // [width]; 0 marks a dead channel
  const int32_t* order;  // null: first to last; else [rows, width], row stride `stride`: every row
                         // its own order, as columns of the whole layer
  int64_t first_column;  // of the block, in the layer
  RowGrids grids;
  uint8_t* codes;  // [rows, width] out, row stride `stride`
  float* change;   // [rows, width] out, contiguous: weight - quantized, 0 for dead channels
};

// First sweep over all coordinates of each row in the row's own order.
struct ComqGreedy {
  int64_t rows;
  int64_t columns;
  const float* weight;            // [rows, columns]
  const float* gradient;          // [rows, columns] at the float weight
  const float* gram;              // [columns, columns]
  const float* inverse_diagonal;  // [columns]
  const int32_t* order;           // [rows, columns]
  RowGrids grids;
  uint8_t* codes;  // [rows, columns] out
  float* change;   // [rows, columns] out: weight - quantized, 0 for dead channels
};

// A further sweep from given codes; G moves only where a code changes.
struct ComqSweep {
  int64_t rows;
  int64_t columns;
  const float* gram;              // [columns, columns]
  const float* inverse_diagonal;  // [columns]
  const int32_t* order;           // null: first to last; else [rows, columns]
  RowGrids grids;
  uint8_t* codes;    // [rows, columns] in and out
  float* gradient;   // [rows, columns] in and out
  int64_t* changed;  // [1] out: added to
};

TORCHQUANT_TIER_LEAF(comq_block, ComqBlock)
TORCHQUANT_TIER_LEAF(comq_greedy, ComqGreedy)
TORCHQUANT_TIER_LEAF(comq_sweep, ComqSweep)

}  // namespace torchquant
