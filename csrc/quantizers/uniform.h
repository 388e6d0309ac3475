// Uniform quantizers of activations: code = clamp(round(x / scale + zero_point), 0, 2^bits - 1),
// value = (code - zero_point) * scale, with one grid for a tensor, a token, a channel or a group.
#pragma once
#include <csrc/core/cpu_tier.h>
#include <csrc/core/quant_math.h>

namespace torchquant {

// Element j of row n lies on grid n * row_stride + j / group_size.
struct UniformGrids {
  int64_t rows;
  int64_t columns;
  int64_t group_size;
  int64_t row_stride;  // 0: all rows share their grids
  const float* scale;
  const float* zero_point;
};

struct UniformEncode {
  UniformGrids grids;
  float max_code;
  const float* x;  // [rows, columns]
  uint8_t* codes;
};

struct UniformDecode {
  UniformGrids grids;
  const uint8_t* codes;  // [rows, columns]
  float* values;
};

// Rows that each get the grid of their own extremes: codes and grids, or values alone.
struct UniformRows {
  int64_t rows;
  int64_t columns;
  int64_t row_stride;  // of x
  GridType grid;
  float max_code;
  const float* x;
  float* values;      // [rows, columns], or null
  uint8_t* codes;     // [rows, columns]
  float* scale;       // [rows]
  float* zero_point;  // [rows]
  bool* finite;       // set to false where x is not
};

TORCHQUANT_TIER_LEAF(uniform_encode, UniformEncode)
TORCHQUANT_TIER_LEAF(uniform_encode_rows, UniformRows)
TORCHQUANT_TIER_LEAF(uniform_decode, UniformDecode)

}  // namespace torchquant
