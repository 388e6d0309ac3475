#include <csrc/kernels/attention.h>

#include <csrc/core/lanes.h>
#include <csrc/kernels/attention_widen.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

using Int8 = int32_t __attribute__((vector_size(32)));
constexpr int64_t kVectors = kRowPad / kFloat8;
constexpr float kInfinity = __builtin_inff();
// e^x is 0 from here on: hardly a normal float any more, 2^-124.
constexpr float kLeastExponent = -86.0f, kLeastPower = -124.0f;

float larger(float a, float b) { return a > b ? a : b; }

int64_t padded(int64_t keys) { return (keys + kRowPad - 1) / kRowPad * kRowPad; }

// x - shift <= 0 becomes e^(x - shift), within an ulp: 2^n e^r with |r| <= ln(2) / 2, by the
// polynomial 1 + r + r^2 (...) of degree 6 whose largest relative error there is least, 3e-9. NaN
// stays NaN. No fused multiply-add: every tier gives the same bits. One loop a step, or compilers
// do not see vectors.
inline __attribute__((always_inline)) void exponential(float* __restrict__ x, float shift) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f,
                  kLn2Low = -2.12194440e-4f;  // 9 bits: n times them is exact
  float n[kRowPad];
  for (int64_t j = 0; j < kRowPad; ++j) {
    const float difference = x[j] - shift;
    x[j] = kLeastExponent > difference ? kLeastExponent : difference;  // one instruction
  }
  for (int64_t j = 0; j < kRowPad; ++j) n[j] = round_to_integer(x[j] * kLog2E);
  for (int64_t j = 0; j < kRowPad; ++j) {
    const float r = x[j] - n[j] * kLn2High - n[j] * kLn2Low;
    float sum = 0.00138145406f;
    sum = sum * r + 0.00836874545f;
    sum = sum * r + 0.041668389f;
    sum = sum * r + 0.166665211f;
    sum = sum * r + 0.49999994f;
    sum = sum * (r * r) + r + 1.0f;
    const int32_t power = static_cast<int32_t>(n[j]) * (1 << 23);
    x[j] = __builtin_bit_cast(float, __builtin_bit_cast(int32_t, sum) + power);
  }
  for (int64_t j = 0; j < kRowPad; ++j) x[j] = n[j] <= kLeastPower ? 0.0f : x[j];
}

// kRowPad scores times `scale`, -inf behind the first `count`.
inline void load_block(const float* __restrict__ scores, int64_t count, float scale,
                       float* __restrict__ row) {
  if (count >= kRowPad) {
    for (int64_t j = 0; j < kRowPad; ++j) row[j] = scores[j] * scale;
    return;
  }
  const auto there = static_cast<int32_t>(count > 0 ? count : 0);
  float some[kRowPad] = {};
  __builtin_memcpy(some, scores, static_cast<size_t>(there) * sizeof(float));
  for (int32_t j = 0; j < kRowPad; ++j) row[j] = j < there ? some[j] * scale : -kInfinity;
}

// scale * scores + mask, -inf for keys that take no part and behind the last one.
void load_row(const AttentionRows& work, int64_t r, float* __restrict__ row) {
  const int64_t causal = work.causal_keys + r, keys = causal < work.keys ? causal : work.keys;
  for (int64_t i = 0; i < padded(work.keys); i += kRowPad)
    load_block(work.scores + r * work.stride + i, keys - i, work.scale, row + i);
  if (work.mask != nullptr) {
    const float* __restrict__ mask = work.mask + r * work.mask_stride;
    for (int64_t i = 0; i < keys; ++i) row[i] += mask[i];
  }
  if (work.allowed != nullptr) {
    const bool* __restrict__ allowed = work.allowed + r * work.mask_stride;
    for (int64_t i = 0; i < keys; ++i) row[i] = allowed[i] ? row[i] : -kInfinity;
  }
}

// The upper half joins the lower one until one lane is left: a tree of one shape on every tier.
template <class Join>
inline __attribute__((always_inline)) float fold(const float* lanes, const Join& join) {
  Float8 x[kVectors];
#pragma GCC unroll 4
  for (int64_t j = 0; j < kVectors; ++j) x[j] = TORCHQUANT_LOAD8(lanes + j * kFloat8);
  join(x[0], x[2]);
  join(x[1], x[3]);
  join(x[0], x[1]);
  join(x[0], __builtin_shufflevector(x[0], x[0], 4, 5, 6, 7, 4, 5, 6, 7));
  join(x[0], __builtin_shufflevector(x[0], x[0], 2, 3, 2, 3, 2, 3, 2, 3));
  join(x[0], __builtin_shufflevector(x[0], x[0], 1, 1, 1, 1, 1, 1, 1, 1));
  return x[0][0];
}

float largest_of(const float* lanes) {
  return fold(lanes, [](Float8& a, const Float8& b) { a = a > b ? a : b; });
}

float maximum(const float* row, int64_t count) {
  float most[kRowPad];
  for (int64_t j = 0; j < kRowPad; ++j) most[j] = -kInfinity;
  for (int64_t i = 0; i < count; i += kRowPad) {
    for (int64_t j = 0; j < kRowPad; ++j) most[j] = larger(row[i + j], most[j]);
  }
  return largest_of(most);
}

// row = e^(row - shift); returns the sum.
float exponentials(float* row, int64_t count, float shift) {
  float sums[kRowPad] = {};
  for (int64_t i = 0; i < count; i += kRowPad) {
    float* const e = row + i;
    exponential(e, shift);
    for (int64_t j = 0; j < kRowPad; ++j) sums[j] += e[j];
  }
  return fold(sums, [](Float8& a, const Float8& b) { a = a + b; });
}

// --- levels of row / sum ---

void divide(float* row, int64_t count, float sum) {
  for (int64_t i = 0; i < count; ++i) row[i] /= sum;
}

#if defined(__AVX512F__)
constexpr int64_t kWidest = 16;
#else
constexpr int64_t kWidest = 8;
#endif
using Widest = float __attribute__((vector_size(kWidest * sizeof(float))));
using UnalignedWidest =
    float __attribute__((vector_size(kWidest * sizeof(float)), aligned(4), may_alias));

// The value of the last threshold below stays.
void level_by_counting(const Levels& levels, float* row, int64_t count, float sum) {
  constexpr int64_t kParts = kRowPad / kWidest;
  for (int64_t i = 0; i < count; i += kRowPad) {
    auto* const parts = reinterpret_cast<UnalignedWidest*>(row + i);
    Widest p[kParts], value[kParts];
#pragma GCC unroll 4
    for (int64_t j = 0; j < kParts; ++j) {
      p[j] = parts[j] / sum;
      value[j] = levels.values[0] + Widest{};
    }
    for (int64_t t = 0; t < levels.threshold_count; ++t) {
      const Widest threshold = levels.thresholds[t] + Widest{};
      const Widest above = levels.values[t + 1] + Widest{};
#pragma GCC unroll 4
      for (int64_t j = 0; j < kParts; ++j) value[j] = p[j] > threshold ? above : value[j];
    }
#pragma GCC unroll 4
    for (int64_t j = 0; j < kParts; ++j) parts[j] = value[j];
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

// What turns exponentials into codes. See Note [one product for two quotients].
struct RowCodes {
  Grid grid;
  float max_code;
  float sum;
  int32_t shift;
};

// Note [one product for two quotients]: e * (1 / (sum * scale)) is within a few ulp of (e / sum) /
// scale, so a code can differ only where the product lies that near to a tie. Rows in which that
// happens are written again, by division.
float safe_distance(const RowCodes& row) {
  // Where p or its quotient could be subnormal the error is no matter of ulp.
  if (!(row.grid.scale > 0x1p-60f && row.grid.scale < 0x1p60f)) return -1.0f;
  return 0.5f - (256.0f + absolute(row.grid.zero_point)) * 0x1p-20f;
}

// Note [bytes before words]: every integer of a code fits in a byte. Where products want 16 bits
// their order is that of the bytes' even and odd halves, so that bytes are made first.
inline void store_block(const int8_t* bytes, int8_t* to) {
  __builtin_memcpy(to, bytes, static_cast<size_t>(kRowPad));
}
inline void store_block(const int8_t* bytes, int16_t* to) { widen_block(bytes, to); }

// What is known of a group's integers so far.
struct GroupSums {
  int32_t sums[kRowPad] = {};
  float farthest[kRowPad] = {};  // squares of distances from whole numbers
};

// Integers of kRowPad keys, zeros behind the first `count`.
template <bool kDivide, class To>
inline __attribute__((always_inline)) void write_block(const RowCodes& row, float factor,
                                                       const float* __restrict__ e, int32_t count,
                                                       GroupSums& group, To* __restrict__ to) {
  const float sum = row.sum, scale = row.grid.scale, zero_point = row.grid.zero_point;
  const float most = row.max_code;
  const int32_t shift = row.shift;
  int32_t a[kRowPad];
  int8_t bytes[kRowPad];
  for (int32_t j = 0; j < kRowPad; ++j) {
    float code;
    if constexpr (kDivide) {
      code = to_code(e[j] / sum, scale, zero_point, most);
    } else {
      float x = e[j] * factor + zero_point;
      x = x > 0.0f ? x : 0.0f;
      x = x < most ? x : most;
      code = round_to_integer(x);
      group.farthest[j] = larger((x - code) * (x - code), group.farthest[j]);
    }
    a[j] = static_cast<int32_t>(code) - shift;
  }
  if (count < kRowPad) {
    for (int32_t j = 0; j < kRowPad; ++j) a[j] = j < count ? a[j] : 0;
  }
  for (int64_t j = 0; j < kRowPad; ++j) group.sums[j] += a[j];
  for (int64_t j = 0; j < kRowPad; ++j) bytes[j] = static_cast<int8_t>(a[j]);
  store_block(bytes, to);
}

// Integers of keys [0, count) of a group; behind them zeros up to a whole block. The largest square
// of a distance from a whole number goes to `farthest`.
template <bool kDivide, class To>
inline __attribute__((always_inline)) int32_t write_group(const RowCodes& row, const float* e,
                                                          int64_t count, float& farthest, To* to) {
  const auto factor = static_cast<float>(1.0 / (static_cast<double>(row.sum) * row.grid.scale));
  GroupSums group;
  int64_t i = 0;
  for (; i + kRowPad <= count; i += kRowPad)
    write_block<kDivide>(row, factor, e + i, kRowPad, group, to + i);
  if (i < count)
    write_block<kDivide>(row, factor, e + i, static_cast<int32_t>(count - i), group, to + i);
  if constexpr (!kDivide) farthest = larger(largest_of(group.farthest), farthest);
  int32_t total = 0;
  for (int64_t j = 0; j < kRowPad; ++j) total += group.sums[j];
  return total;
}

// The largest square, as of write_group.
template <bool kDivide, class To>
float write_codes(const ProbabilityRows& out, const RowCodes& row, const float* e, int64_t keys,
                  int32_t* sums, To* to) {
  float farthest = 0;
  for (int64_t g = 0; g < out.groups; ++g) {
    const int64_t first = g * out.group_size;
    const int64_t count = g + 1 < out.groups ? out.group_size : keys - first;
    sums[g] = write_group<kDivide>(row, e + first, count, farthest, to + first);
  }
  return farthest;
}

template <class To>
void code_row(const AttentionRows& work, int64_t r, const float* e, float sum, To* to) {
  constexpr float kMost = 127.0f;
  const ProbabilityRows& out = *work.codes;
  RowCodes row{work.levels.grid, work.levels.max_code, sum, 0};
  // The exponential 1 has the largest code.
  const float largest = to_code(1.0f / sum, row.grid.scale, row.grid.zero_point, row.max_code);
  row.shift = largest > kMost ? static_cast<int32_t>(largest - kMost) : 0;
  out.scale[r] = sum == sum ? out.unit : work.levels.of_nan;
  out.zero[r] = row.grid.zero_point - static_cast<float>(row.shift);
  to += r * padded(work.keys);
  int32_t* const sums = out.sums + r * out.groups;
  const float safe = safe_distance(row);
  if (!(safe > 0.0f && write_codes<false>(out, row, e, work.keys, sums, to) < safe * safe))
    write_codes<true>(out, row, e, work.keys, sums, to);
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

// What becomes of exponentials and their sum.
void finish_row(const AttentionRows& work, int64_t r, float* row, float sum) {
  if (work.codes != nullptr) {
    return work.codes->wide != nullptr ? code_row(work, r, row, sum, work.codes->wide)
                                       : code_row(work, r, row, sum, work.codes->narrow);
  }
  if (sum == sum) {
    level_row(work.levels, row, padded(work.keys), sum);
  } else {
    for (int64_t i = 0; i < work.keys; ++i) row[i] = work.levels.of_nan;
  }
  __builtin_memcpy(work.scores + r * work.stride, row,
                   static_cast<size_t>(work.keys) * sizeof(float));
}

}  // namespace

void attention_rows(const AttentionRows& work) {
  const int64_t count = padded(work.keys);
  for (int64_t first = 0; first < work.rows; first += kRowGroup) {
    const int64_t left = work.rows - first, rows = left < kRowGroup ? left : kRowGroup;
    float shifts[kRowGroup], sums[kRowGroup];
    for (int64_t r = 0; r < rows; ++r) {
      float* const row = work.row + r * count;
      load_row(work, first + r, row);
      const float most = maximum(row, count);
      // Without any key the shift would be infinite; so all are e^-inf = 0, and 0 / 1 in the end.
      shifts[r] = most == -kInfinity ? 0.0f : most;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float sum = exponentials(work.row + r * count, count, shifts[r]);
      sums[r] = sum == 0.0f ? 1.0f : sum;
    }
    for (int64_t r = 0; r < rows; ++r) finish_row(work, first + r, work.row + r * count, sums[r]);
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
