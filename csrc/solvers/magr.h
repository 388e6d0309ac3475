// MagR (arXiv 2406.00800): per row w0 of the weight, min_w 1/2 (w - w0) H (w - w0)^T + alpha
// max|w|, so that the quantizer's grid has less to span. A proximal method: a matrix product for
// all rows, then per row the prox of the maximum, which is a clamp.
#pragma once
#include <csrc/core/cpu_tier.h>

#include <cstdint>

namespace torchquant {

enum class MagrSolver : int32_t { ista, fista, admm };

constexpr int64_t kMagrLanes = 16;  // partial sums of a row
constexpr float kMagrWarmStart =
    0.98f;  // of the last clamp: mostly just left of the next one, where Newton needs two passes

// What follows the product of one iteration. P is the n x K product's result for N rows of K
// columns, cut into groups of group_size columns (the last may be ragged), G groups a row, each
// with a maximum of its own.
//   ista   value = prox(P), point = value
//   fista  value = prox(P), point = value + momentum (value - last value), per row without momentum
//          once it points uphill
//   admm   value = prox(P + dual), dual += P - value, point = value - dual
struct MagrRows {
  MagrSolver solver;
  int64_t rows;
  int64_t columns;
  int64_t group_size;
  const float* weight;     // [N, K] w0
  const float* threshold;  // [N] of the prox; 0 = the row stays as it is
  float* point;            // [N, K] in: P; out: where the next iteration starts
  float* offset;           // [N, K] point - weight, the left operand of the next product
  float* value;            // [N, K] the solution so far; ista: not used, it is `point`
  float* dual;             // [N, K] admm only
  float* clamp;            // [N, G] last clamp, 0 before the first
  float* inertia;          // [N] fista only: Nesterov's t, 1 before the first
  int32_t* changed;        // [N] out: did any offset change?
};

TORCHQUANT_TIER_LEAF(magr_rows, MagrRows)

}  // namespace torchquant
