#include <csrc/kernels/attention.h>

#include <csrc/core/lanes.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

using Int8 = int32_t __attribute__((vector_size(32)));
constexpr int64_t kVectors = kRowPad / kFloat8;
constexpr float kInfinity = __builtin_inff();
// e^x is 0 from here on: hardly a normal float any more, 2^-124.
constexpr float kLeastExponent = -86.0f, kLeastPower = -124.0f;

float larger(float a, float b) { return a > b ? a : b; }

int64_t padded(int64_t keys) { return (keys + kRowPad - 1) / kRowPad * kRowPad; }

// x - shift <= 0 becomes e^(x - shift), within an ulp: 2^n e^r with |r| <= ln(2) / 2, by Taylor's
// sum up to r^7 / 7!, whose rest is 6e-9. NaN stays NaN. No fused multiply-add: every tier gives
// the same bits. One loop a step, or compilers do not see vectors.
inline __attribute__((always_inline)) void exponential(float* __restrict__ x, float shift) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f,
                  kLn2Low = -2.12194440e-4f;  // 9 bits: n times them is exact
  float n[kRowPad];
  for (int64_t j = 0; j < kRowPad; ++j) {
    const float difference = x[j] - shift;
    x[j] = difference < kLeastExponent ? kLeastExponent : difference;
  }
  for (int64_t j = 0; j < kRowPad; ++j) n[j] = round_to_integer(x[j] * kLog2E);
  for (int64_t j = 0; j < kRowPad; ++j) {
    const float r = x[j] - n[j] * kLn2High - n[j] * kLn2Low;
    float sum = 1.0f / 5040;
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 1.0f / 2;
    sum = sum * (r * r) + r + 1.0f;
    const int32_t power = static_cast<int32_t>(n[j]) * (1 << 23);
    x[j] = __builtin_bit_cast(float, __builtin_bit_cast(int32_t, sum) + power);
  }
  for (int64_t j = 0; j < kRowPad; ++j) x[j] = n[j] <= kLeastPower ? 0.0f : x[j];
}

// scale * scores + mask, -inf for keys that take no part and behind the last one.
void load_row(const AttentionRows& work, int64_t r) {
  const float* __restrict__ scores = work.scores + r * work.keys;
  float* __restrict__ row = work.row;
  const float scale = work.scale;
  for (int64_t i = 0; i < work.keys; ++i) row[i] = scores[i] * scale;
  if (work.mask != nullptr) {
    const float* __restrict__ mask = work.mask + r * work.mask_stride;
    for (int64_t i = 0; i < work.keys; ++i) row[i] += mask[i];
  }
  if (work.allowed != nullptr) {
    const bool* __restrict__ allowed = work.allowed + r * work.mask_stride;
    for (int64_t i = 0; i < work.keys; ++i) row[i] = allowed[i] ? row[i] : -kInfinity;
  }
  const int64_t causal = work.causal_keys + r;
  for (int64_t i = causal < work.keys ? causal : work.keys; i < padded(work.keys); ++i)
    row[i] = -kInfinity;
}

float maximum(const float* row, int64_t count) {
  float most[kRowPad];
  for (int64_t j = 0; j < kRowPad; ++j) most[j] = -kInfinity;
  for (int64_t i = 0; i < count; i += kRowPad) {
    for (int64_t j = 0; j < kRowPad; ++j) most[j] = larger(row[i + j], most[j]);
  }
  float result = -kInfinity;
  for (int64_t j = 0; j < kRowPad; ++j) result = larger(most[j], result);
  return result;
}

// row = e^(row - shift); returns the sum.
float exponentials(float* row, int64_t count, float shift) {
  float sums[kRowPad] = {};
  for (int64_t i = 0; i < count; i += kRowPad) {
    float* const e = row + i;
    exponential(e, shift);
    for (int64_t j = 0; j < kRowPad; ++j) sums[j] += e[j];
  }
  for (int64_t width = kRowPad / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) sums[j] += sums[j + width];
  }
  return sums[0];
}

// --- levels of row / sum ---

void divide(float* row, int64_t count, float sum) {
  for (int64_t i = 0; i < count; ++i) row[i] /= sum;
}

// The value of the last threshold below stays.
void level_by_counting(const Levels& levels, float* row, int64_t count, float sum) {
  for (int64_t i = 0; i < count; i += kRowPad) {
    Float8 p[kVectors], value[kVectors];
#pragma GCC unroll 4
    for (int64_t j = 0; j < kVectors; ++j) {
      p[j] = TORCHQUANT_LOAD8(row + i + j * kFloat8) / sum;
      value[j] = levels.values[0] + Float8{};
    }
    for (int64_t t = 0; t < levels.threshold_count; ++t) {
      const Float8 threshold = levels.thresholds[t] + Float8{};
      const Float8 above = levels.values[t + 1] + Float8{};
#pragma GCC unroll 4
      for (int64_t j = 0; j < kVectors; ++j) value[j] = p[j] > threshold ? above : value[j];
    }
#pragma GCC unroll 4
    for (int64_t j = 0; j < kVectors; ++j) TORCHQUANT_STORE8(row + i + j * kFloat8, value[j]);
  }
}

void level_by_bucket(const Levels& levels, float* row, int64_t count, float sum) {
  const int32_t first = levels.first_bucket, last = levels.last_bucket;
  const int32_t shift = levels.bucket_shift;
  for (int64_t i = 0; i < count; i += kRowPad) {
    float* const p = row + i;
    int32_t bucket_of[kRowPad];
    for (int64_t j = 0; j < kRowPad; ++j) {
      p[j] /= sum;
      int32_t bucket = __builtin_bit_cast(int32_t, p[j]) >> shift;
      bucket = bucket > first ? bucket : first;
      bucket_of[j] = (bucket < last ? bucket : last) - first;
    }
    for (int64_t j = 0; j < kRowPad; ++j) {
      const Bucket& bucket = levels.buckets[bucket_of[j]];
      p[j] = bucket.values[p[j] > bucket.threshold ? 1 : 0];  // no branch: nobody could predict it
    }
  }
}

void level_by_grid(const Levels& levels, float* row, int64_t count, float sum) {
  const float scale = levels.grid.scale, zero_point = levels.grid.zero_point;
  const float max_code = levels.max_code;
  for (int64_t i = 0; i < count; ++i)
    row[i] = to_value(to_code(row[i] / sum, scale, zero_point, max_code), scale, zero_point);
}

void level_row(const Levels& levels, float* row, int64_t count, float sum) {
  switch (levels.kind) {
    case LevelKind::none:
      return divide(row, count, sum);
    case LevelKind::counted:
      return level_by_counting(levels, row, count, sum);
    case LevelKind::bucketed:
      return level_by_bucket(levels, row, count, sum);
    case LevelKind::uniform:
      return level_by_grid(levels, row, count, sum);
  }
}

}  // namespace

void attention_rows(const AttentionRows& work) {
  const int64_t count = padded(work.keys);
  for (int64_t r = 0; r < work.rows; ++r) {
    load_row(work, r);
    const float most = maximum(work.row, count);
    // Without any key the shift would be infinite; so all are e^-inf = 0, and 0 / 1 in the end.
    float sum = exponentials(work.row, count, most == -kInfinity ? 0.0f : most);
    if (sum == 0.0f) sum = 1.0f;
    if (sum == sum) {
      level_row(work.levels, work.row, count, sum);
    } else {
      for (int64_t i = 0; i < count; ++i) work.row[i] = work.levels.of_nan;
    }
    __builtin_memcpy(work.scores + r * work.keys, work.row,
                     static_cast<size_t>(work.keys) * sizeof(float));
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
