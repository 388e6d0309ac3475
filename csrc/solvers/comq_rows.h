// COMQ on rows whose columns already stand in the order in which they are visited: sweeps, scale
// steps and the search over shrink factors.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

// Shapes: B Grams (1, or one per group of a grouped convolution), n rows each, K inputs, G groups
// of columns with one scale each; B > 1 implies G = 1.

namespace torchquant::comq {

enum class Order { shared, greedy, semi, cyclic };

struct Options {
  int64_t bits;
  int64_t sweeps;
  Order order;
  bool update_scale;
  bool from_codes;             // start from given codes instead of the float weight
  bool from_rounding;          // start from the nearest codes
  std::vector<double> shrink;  // factors searched
};

// Some rows of the layer: everything a task needs.
struct Rows {
  at::Tensor weight;            // [B, n, K]
  at::Tensor linear;            // [B, n, K] P; undefined: weight @ gram
  at::Tensor gram;              // [B, K, K]
  at::Tensor inverse_diagonal;  // [B, K]
  at::Tensor order;             // int32 [B, n, K] or undefined
  std::vector<at::Tensor>
      group_columns;  // G index tensors: where each group's columns stand; empty for one group
};

struct Solution {
  at::Tensor codes;       // uint8 [B, n, K]
  at::Tensor scale;       // [B, n, G]
  at::Tensor zero_point;  // [B, n, G]
  at::Tensor gradient;    // [B, n, K] G = P - Q H
};

// Solves the rows from the grid (and codes, when options.from_codes) in `start`.
Solution solve(const Rows& rows, const Options& options, const Solution& start);

}  // namespace torchquant::comq
