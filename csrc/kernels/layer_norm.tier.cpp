#include <csrc/kernels/layer_norm.h>

#include <csrc/core/lanes.h>
#include <csrc/kernels/linear_float.h>
#include <csrc/kernels/reciprocal.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

constexpr int64_t kLanes = 32;
constexpr float kLargest = 3.40282347e38f;

// The upper half joins the lower one until one lane is left.
inline __attribute__((always_inline)) float fold(const float* lanes) {
  const Float8 eight = (TORCHQUANT_LOAD8(lanes) + TORCHQUANT_LOAD8(lanes + 16)) +
                       (TORCHQUANT_LOAD8(lanes + 8) + TORCHQUANT_LOAD8(lanes + 24));
  const Float8 four = eight + __builtin_shufflevector(eight, eight, 4, 5, 6, 7, 4, 5, 6, 7);
  const Float8 two = four + __builtin_shufflevector(four, four, 2, 3, 2, 3, 2, 3, 2, 3);
  return two[0] + two[1];
}

float sum_of(const float* __restrict__ x, int64_t count) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) sums[j] += x[i + j];
  }
  for (int64_t j = 0; i + j < count; ++j) sums[j] += x[i + j];
  return fold(sums);
}

// See Note [moments of a row].
struct Moments {
  float mean;
  float factor;  // 1 / sqrt(variance + eps)
  float offset;  // -rest * factor
};

Moments moments_of(const float* __restrict__ x, int64_t count, float eps) {
  const float share = 1.0f / static_cast<float>(count), mean = sum_of(x, count) * share;
  float sums[kLanes] = {}, squares[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const float centred = x[i + j] - mean;
      sums[j] += centred;
      squares[j] = fused(centred, centred, squares[j]);
    }
  }
  for (int64_t j = 0; i + j < count; ++j) {
    const float centred = x[i + j] - mean;
    sums[j] += centred;
    squares[j] = fused(centred, centred, squares[j]);
  }
  const float rest = fold(sums) * share;
  const float variance = fused(-rest, rest, fold(squares) * share);
  const float factor = 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + eps);
  return {mean, factor, -rest * factor};
}

// Arguments by value: bytes written could change anything that is reached by a pointer, and the
// loop would not become vectors.
template <class CodeOf>
inline __attribute__((always_inline)) void encode_row(const float* __restrict__ x,
                                                      const float* __restrict__ weight,
                                                      const float* __restrict__ bias, int64_t count,
                                                      Moments row, CodeOf code_of,
                                                      uint8_t* __restrict__ codes) {
  for (int64_t i = 0; i < count; ++i) {
    const float normal = fused(x[i] - row.mean, row.factor, row.offset);
    const float code = code_of(fused(normal, weight[i], bias[i]));
    codes[i] = static_cast<uint8_t>(static_cast<int32_t>(code));
  }
}

template <class CodeOf>
inline __attribute__((always_inline)) void encode_rows(const LayerNormRows& work, CodeOf code_of) {
  for (int64_t r = 0; r < work.rows; ++r) {
    const float* const x = work.x + r * work.columns;
    const Moments row = moments_of(x, work.columns, work.eps);
    if (!(absolute(row.mean) <= kLargest)) *work.finite = false;
    encode_row(x, work.weight, work.bias, work.columns, row, code_of,
               work.codes + r * work.columns);
  }
}

}  // namespace

void layer_norm_codes(const LayerNormRows& work) {
  const float scale = work.grid.scale, zero_point = work.grid.zero_point;
  const float max_code = work.max_code;
  if (Reciprocal::serves(work.grid)) {
    const Reciprocal reciprocal(scale);
    encode_rows(work, [=](float y) __attribute__((always_inline)) {
      return to_code(reciprocal.times(y), 1.0f, zero_point, max_code);
    });
  } else {
    encode_rows(work, [=](float y) __attribute__((always_inline)) {
      return to_code(y, scale, zero_point, max_code);
    });
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
