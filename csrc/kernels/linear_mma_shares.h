// How a product on tensor cores is cut into shares for the warps of a GPU.
//
// Note [shares of a matrix product]: a warp takes `tiles` tiles and 8 * tokens rows over one of
// `parts` parts of the inputs. A thread block holds the parts of `block_tiles` such shares, which
// meet in shared memory at the end, where parts are added in their order. Integers of several
// groups become floats group after group, as on the CPU: there parts take whole groups in turn, and
// meet after every turn. Every share reads its rows from L2: of many rows that is what takes the
// time.
#pragma once
#include <csrc/kernels/linear_mma.h>

#include <algorithm>

namespace torchquant {
namespace {

constexpr int kRowsAtOnce = 8;   // of a product
constexpr int kShareBlocks = 4;  // a part of the inputs is so many blocks, or a multiple

// Of a thread block; twice as many fit on an SM, with few sums for each lane.
constexpr int kMostWarps = 8, kBlockWarps = 4;
constexpr int blocks_of_sm(int tokens) { return tokens < 4 ? 2 : 1; }

// Whether groups are to be added in their order, and parts take turns over them for that.
TORCHQUANT_HOST_DEVICE bool in_order(const MatrixProduct& m) {
  return m.x.type == UnpackType::bytes && m.product.weight.layout.groups > 1;
}
TORCHQUANT_HOST_DEVICE bool in_turns(const MatrixProduct& m) { return in_order(m) && m.parts > 1; }

int64_t chunks_of(const MatrixProduct& m) {
  const int64_t rows = m.tokens * kRowsAtOnce;
  return (m.product.rows + rows - 1) / rows;
}

// Whether a warp can take two tiles: for want of registers one is faster elsewhere.
constexpr bool takes_two_tiles(int tokens, bool two_lines_of_codes) {
  return tokens == 1 || (tokens == 4 && !two_lines_of_codes);
}

// Limits found by timing shares of many products on an H200 (132 SMs).
MatrixProduct in_shares(MatrixProduct m) {
  constexpr int64_t kManyTiles = 512, kLeastBlocks = 16;  // of a part
  constexpr int64_t kShares = 3600, kFewShares = 1500;    // warps in all
  const PackedProduct& p = m.product;
  const BlockLayout& layout = p.weight.layout;
  const int64_t tiles = p.last_tile - p.first_tile;
  m.tokens = p.rows <= kRowsAtOnce ? 1 : p.rows <= 2 * kRowsAtOnce ? 2 : 4;
  const bool two_lines = layout.bits == 3 || layout.bits == 8;
  const bool two_tiles = takes_two_tiles(m.tokens, two_lines) && tiles * chunks_of(m) >= kManyTiles;
  m.tiles = two_tiles ? 2 : 1;
  const int64_t shares = (tiles + m.tiles - 1) / m.tiles * chunks_of(m);
  m.parts = 1;
  if (in_order(m)) {
    while (m.parts < kMostWarps && shares * m.parts < kFewShares) m.parts *= 2;
    if (m.parts > 1) m.parts = std::max(m.parts, m.tokens * m.tiles);  // each adds up a fragment
  } else {
    while (m.parts < kMostWarps && shares * m.parts < (m.parts < 4 ? kShares : kFewShares) &&
           layout.blocks >= 2 * m.parts * kLeastBlocks)
      m.parts *= 2;
  }
  m.block_tiles = std::max(1, kBlockWarps / m.parts);
  return m;
}

}  // namespace
}  // namespace torchquant
