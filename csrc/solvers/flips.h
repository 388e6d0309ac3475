// Flips of ERQ's Wqer (arXiv 2407.06794): among the two codes next to a weight, the other one.
// With d = q - w, M = H of the columns and g = 2 d M, flipping column i changes d_i by D = -+scale
// and d M d^T by g_i D + M_ii D^2; then g += 2 D M_i.
#pragma once
#include <csrc/core/cpu_tier.h>
#include <csrc/core/quant_math.h>

#include <cstdint>

namespace torchquant {

// A flip has to gain more than this share of M_ii D^2, so that rounding errors in g never decide.
constexpr float kFlipMargin = 1e-4f;

struct FlipRows {
  int64_t rows;
  int64_t columns;
  const float* gram;  // M [columns, columns], row stride gram_stride
  int64_t gram_stride;
  const float* diagonal;  // [columns] of M
  int64_t steps;          // flips a row at most
  bool best;  // take the flip that gains most; else the one with the largest |g_i|, if it gains
  float* gradient;  // g [rows, columns] in and out, contiguous
  float* step;      // D [rows, columns] in and out, contiguous; 0: may not flip
  int64_t* flips;   // [rows] in and out: flips done are added
};

TORCHQUANT_TIER_LEAF(flip_rows, FlipRows)

}  // namespace torchquant
