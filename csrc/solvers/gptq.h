// GPTQ (arXiv 2210.17323): columns are rounded one after another and the error of each is moved
// onto the columns behind it. With H^-1 = U^T U, U upper triangular: e = (w_j - q_j) / U_jj, then
// w_k -= e U_jk for k > j; the sum of e^2 is the objective.
#pragma once
#include <csrc/core/cpu_tier.h>
#include <csrc/core/quant_math.h>

#include <cstdint>

namespace torchquant {

constexpr int64_t kGptqMaxBlock = 128;

struct GptqBlock {
  int64_t rows;
  int64_t width;  // <= kGptqMaxBlock
  const float*
      weight;  // [rows, width], row stride `stride`: with every earlier block's error moved in
  int64_t stride;
  const float* factor;  // U [width, width], row stride factor_stride
  int64_t factor_stride;
  const float* scale;  // [rows, 1] or [rows, width]
  const float* zero_point;
  int64_t grid_row_stride;
  int64_t grid_column_stride;  // 0: one scale a row
  float max_code;
  uint8_t* codes;    // [rows, width] out, row stride `stride`
  float* change;     // [rows, width] out, contiguous: -e
  float* objective;  // [rows] in and out: sum of e^2
};

TORCHQUANT_TIER_LEAF(gptq_block, GptqBlock)

}  // namespace torchquant
