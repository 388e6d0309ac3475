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
  float* gradient;  // g [rows, columns] in, scratch out, contiguous
  float* step;      // D [rows, columns] in and out, contiguous; 0: may not flip
  int64_t* flips;   // [rows] in and out: flips done are added
};

// What the margin leaves of a flip that no gradient helps.
TORCHQUANT_HOST_DEVICE float flip_curvature(float diagonal, float step) {
  return (1.0f + kFlipMargin) * diagonal * step * step;
}

// What the flip adds to the objective.
TORCHQUANT_HOST_DEVICE float flip_gain(float gradient, float diagonal, float step) {
  return gradient * step + flip_curvature(diagonal, step);
}

// Looking for the best flip, a row carries these sums instead of its gradient: all flips' but the
// one's own change with the gradient alone, and the curvature of that stays.
TORCHQUANT_HOST_DEVICE float gain_of_flip_back(float gain, float diagonal, float step) {
  return 2.0f * flip_curvature(diagonal, step) - gain;
}

// By the published rule the flip with the least of these is next: minus |g| of one that goes
// against the gradient. 0: may not flip.
TORCHQUANT_HOST_DEVICE float gradient_score(float gradient, float step) {
  return gradient * step < 0.0f ? -absolute(gradient) : 0.0f;
}

TORCHQUANT_TIER_LEAF(flip_rows, FlipRows)

}  // namespace torchquant
