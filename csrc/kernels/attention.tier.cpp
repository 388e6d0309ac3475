#include <csrc/kernels/attention.h>

#include <csrc/core/lanes.h>
#include <csrc/core/vectors.h>
#include <csrc/kernels/attention_widen.h>
#include <csrc/kernels/linear_plain.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

constexpr int64_t kVectors = kRowPad / kFloat8;
constexpr int64_t kParts = kRowPad / kVectorLanes;
constexpr float kInfinity = __builtin_inff();
// e^x is 0 from here on: hardly a normal float any more, 2^-124.
constexpr float kLeastExponent = -86.0f, kLeastPower = -124.0f;

using torchquant::larger;  // of vectors
float larger(float a, float b) { return a > b ? a : b; }

int64_t padded(int64_t keys) { return (keys + kRowPad - 1) / kRowPad * kRowPad; }

// visit(j) for the vectors of kRowPad neighbours.
template <class Visit>
inline __attribute__((always_inline)) void for_each_part(const Visit& visit) {
#pragma GCC unroll 8
  for (int64_t j = 0; j < kParts; ++j) visit(j);
}

// e^x for x <= 0, within an ulp: 2^n e^r with |r| <= ln(2) / 2, by the polynomial 1 + r + r^2 (...)
// of degree 6 whose largest relative error there is least, 3e-9. NaN stays NaN.
inline __attribute__((always_inline)) Floats exponential(Floats x) {
  const Floats none{};
  x = larger(none + kLeastExponent, x);
  const Floats n = round_to_integer(x * 1.44269504f);
  const Floats r = fused(n, none + 2.12194440e-4f, fused(n, none - 0.693359375f, x));
  Floats sum = none + 0.00138145406f;
  sum = fused(sum, r, none + 0.00836874545f);
  sum = fused(sum, r, none + 0.041668389f);
  sum = fused(sum, r, none + 0.166665211f);
  sum = fused(sum, r, none + 0.49999994f);
  sum = fused(sum, r * r, r) + 1.0f;
  const Floats power = (Floats)((Ints)sum + (__builtin_convertvector(n, Ints) << 23));
  return n <= kLeastPower ? none : power;
}

// The first `count` of kRowPad scores times `scale`, -inf behind them.
inline void load_block(const float* scores, int64_t count, float scale, float* row) {
  for_each_part([&](int64_t j) __attribute__((always_inline)) {
    const int64_t at = j * kVectorLanes, left = count - at;
    const Floats x = load_first(scores + at, left) * scale;
    store(first_lanes(left) ? x : Floats{} - kInfinity, row + at);
  });
}

// scale * scores + mask, -inf for keys that take no part and behind the last one, from the first
// key on that is not left where it is.
void load_row(const AttentionRows& work, int64_t r, int64_t first, float* __restrict__ row) {
  const int64_t causal = work.causal_keys + r, keys = causal < work.keys ? causal : work.keys;
  for (int64_t i = first; i < padded(work.keys); i += kRowPad)
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

// Where all keys take part, whole blocks of scores are read where they lie.
int64_t keys_left(const AttentionRows& work) {
  const bool all = work.mask == nullptr && work.allowed == nullptr && work.causal_keys >= work.keys;
  return all && work.scale > 0.0f ? work.keys / kRowPad * kRowPad : 0;
}

// The upper half joins the lower one until one lane is left: a tree of one shape on every tier.
inline __attribute__((always_inline)) float sum_of(const Floats (&parts)[kParts]) {
  alignas(64) float lanes[kRowPad];
  for_each_part([&](int64_t j) { store(parts[j], lanes + j * kVectorLanes); });
  Float8 x[kVectors];
#pragma GCC unroll 4
  for (int64_t j = 0; j < kVectors; ++j) x[j] = TORCHQUANT_LOAD8(lanes + j * kFloat8);
  const Float8 sums = (x[0] + x[2]) + (x[1] + x[3]);
  float rest[kFloat8];
  TORCHQUANT_STORE8(rest, sums);
  return ((rest[0] + rest[4]) + (rest[2] + rest[6])) + ((rest[1] + rest[5]) + (rest[3] + rest[7]));
}

inline __attribute__((always_inline)) float largest_of(const Floats (&parts)[kParts]) {
  Floats most = parts[0];
  for_each_part([&](int64_t j) { most = larger(parts[j], most); });
  return joined(most, [](Floats a, Floats b) { return larger(a, b); });
}

// Of scale * scores for the first `left` keys, and of what is in `row` for the others.
float maximum(const float* scores, int64_t left, float scale, const float* row, int64_t count) {
  Floats most[kParts];
  for_each_part([&](int64_t j) { most[j] = Floats{} - kInfinity; });
  const auto take = [&](const float* from) __attribute__((always_inline)) {
    for_each_part([&](int64_t j) __attribute__((always_inline)) {
      most[j] = larger(load<Floats>(from + j * kVectorLanes), most[j]);
    });
  };
  for (int64_t i = 0; i < left; i += kRowPad) take(scores + i);
  if (left > 0) for_each_part([&](int64_t j) { most[j] *= scale; });
  for (int64_t i = left; i < count; i += kRowPad) take(row + i);
  return largest_of(most);
}

// e^(x * factor - shift); adds to the sums.
void exponentials(const float* x, float factor, float shift, int64_t count, float* e,
                  Floats (&sums)[kParts]) {
  for (int64_t i = 0; i < count; i += kRowPad)
    for_each_part([&](int64_t j) __attribute__((always_inline)) {
      const int64_t at = i + j * kVectorLanes;
      const Floats power = exponential(load<Floats>(x + at) * factor - shift);
      store(power, e + at);
      sums[j] += power;
    });
}

// --- levels of row / sum ---

void divide(float* row, int64_t count, float sum) {
  for (int64_t i = 0; i < count; ++i) row[i] /= sum;
}

// The value of the last threshold below stays.
void level_by_counting(const Levels& levels, float* row, int64_t count, float sum) {
  for (int64_t i = 0; i < count; i += kRowPad) {
    Floats p[kParts], value[kParts];
    for_each_part([&](int64_t j) {
      p[j] = load<Floats>(row + i + j * kVectorLanes) / sum;
      value[j] = Floats{} + levels.values[0];
    });
    for (int64_t t = 0; t < levels.threshold_count; ++t) {
      const Floats threshold = Floats{} + levels.thresholds[t];
      const Floats above = Floats{} + levels.values[t + 1];
      for_each_part([&](int64_t j) { value[j] = p[j] > threshold ? above : value[j]; });
    }
    for_each_part([&](int64_t j) { store(value[j], row + i + j * kVectorLanes); });
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

float factor_of(const RowCodes& row) {
  return static_cast<float>(1.0 / (static_cast<double>(row.sum) * row.grid.scale));
}

// What is known of a group's integers so far.
struct GroupSums {
  Ints sums[kParts] = {};
  Floats farthest[kParts] = {};  // squares of distances from whole numbers
};

// Integers of kRowPad keys by division.
inline void divide_block(const RowCodes& row, const float* e, Ints (&a)[kParts]) {
  int32_t integers[kRowPad];
  for (int64_t j = 0; j < kRowPad; ++j) {
    const float p = e[j] / row.sum;
    const float code = to_code(p, row.grid.scale, row.grid.zero_point, row.max_code);
    integers[j] = static_cast<int32_t>(code) - row.shift;
  }
  for_each_part([&](int64_t j) { a[j] = load<Ints>(integers + j * kVectorLanes); });
}

// The same by one product.
inline __attribute__((always_inline)) void multiply_block(const RowCodes& row, float factor,
                                                          const float* e, GroupSums& group,
                                                          Ints (&a)[kParts]) {
  const Floats none{};
  for_each_part([&](int64_t j) __attribute__((always_inline)) {
    const Floats power = load<Floats>(e + j * kVectorLanes);
    Floats x = fused(power, none + factor, none + row.grid.zero_point);
    x = smaller(larger(x, none), none + row.max_code);
    const Floats distance = x - round_to_integer(x);
    group.farthest[j] = larger(distance * distance, group.farthest[j]);
    a[j] = rounded(x, row.shift);
  });
}

template <bool kDivide>
inline __attribute__((always_inline)) void block_integers(const RowCodes& row, float factor,
                                                          const float* e, GroupSums& group,
                                                          Ints (&a)[kParts]) {
  kDivide ? divide_block(row, e, a) : multiply_block(row, factor, e, group, a);
}

// write(by division?) writes a row and returns the largest square of a distance from a whole
// number.
template <class Write>
void write_safely(const RowCodes& row, const Write& write) {
  const float safe = safe_distance(row);
  if (!(safe > 0.0f && write(Known<false>()) < safe * safe)) write(Known<true>());
}

// Integers of kRowPad keys, zeros behind the first `count`. Note [bytes before words]: every
// integer of a code fits in a byte. Where products want 16 bits their order is that of the bytes'
// even and odd halves, so that bytes are made first.
template <bool kDivide, class To>
inline __attribute__((always_inline)) void write_block(const RowCodes& row, float factor,
                                                       const float* e, int32_t count,
                                                       GroupSums& group, To* to) {
  Ints a[kParts];
  block_integers<kDivide>(row, factor, e, group, a);
  if (count < kRowPad)
    for_each_part([&](int64_t j) { a[j] &= first_lanes(count - j * kVectorLanes); });
  int8_t own[kRowPad];
  int8_t* bytes = own;
  if constexpr (sizeof(To) == 1) bytes = to;
  for_each_part([&](int64_t j) __attribute__((always_inline)) {
    group.sums[j] += a[j];
    store_narrow(a[j], bytes + j * kVectorLanes);
  });
  if constexpr (sizeof(To) == 2) widen_block(bytes, to);
}

// Integers of keys [0, count) of a group; behind them zeros up to a whole block. The largest square
// of a distance from a whole number goes to `farthest`.
template <bool kDivide, class To>
inline __attribute__((always_inline)) int32_t write_group(const RowCodes& row, const float* e,
                                                          int64_t count, float& farthest, To* to) {
  const float factor = factor_of(row);
  GroupSums group;
  int64_t i = 0;
  for (; i + kRowPad <= count; i += kRowPad)
    write_block<kDivide>(row, factor, e + i, kRowPad, group, to + i);
  if (i < count)
    write_block<kDivide>(row, factor, e + i, static_cast<int32_t>(count - i), group, to + i);
  if constexpr (!kDivide) farthest = larger(largest_of(group.farthest), farthest);
  Ints sums{};
  for_each_part([&](int64_t j) { sums += group.sums[j]; });
  return joined(sums, [](Ints a, Ints b) { return a + b; });
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
  write_safely(row, [&](auto divides) {
    return write_codes<decltype(divides)::value>(out, row, e, work.keys, sums, to);
  });
}

// The nearest values of the grid for kRowPad keys.
template <bool kDivide>
inline __attribute__((always_inline)) void write_value_block(const RowCodes& row, float factor,
                                                             const float* e, GroupSums& group,
                                                             float* to) {
  Ints a[kParts];
  block_integers<kDivide>(row, factor, e, group, a);
  for_each_part([&](int64_t j) __attribute__((always_inline)) {
    store((to_floats(a[j]) - row.grid.zero_point) * row.grid.scale, to + j * kVectorLanes);
  });
}

// The largest square, as of write_group.
template <bool kDivide>
float write_values(const RowCodes& row, const float* e, int64_t keys, float* to) {
  const float factor = factor_of(row);
  GroupSums group;
  int64_t i = 0;
  for (; i + kRowPad <= keys; i += kRowPad)
    write_value_block<kDivide>(row, factor, e + i, group, to + i);
  if (i < keys) {
    float last[kRowPad];
    write_value_block<kDivide>(row, factor, e + i, group, last);
    __builtin_memcpy(to + i, last, static_cast<size_t>(keys - i) * sizeof(float));
  }
  return largest_of(group.farthest);
}

void level_by_grid(const Levels& levels, const float* e, int64_t keys, float sum, float* to) {
  const RowCodes row{levels.grid, levels.max_code, sum, 0};
  write_safely(
      row, [&](auto divides) { return write_values<decltype(divides)::value>(row, e, keys, to); });
}

void level_row(const Levels& levels, float* row, int64_t keys, float sum, float* to) {
  const int64_t count = padded(keys);
  switch (levels.kind) {
    case LevelKind::none:
      divide(row, count, sum);
      break;
    case LevelKind::counted:
      level_by_counting(levels, row, count, sum);
      break;
    case LevelKind::bucketed:
      level_by_bucket(levels, row, count, sum);
      break;
    case LevelKind::uniform:
      return level_by_grid(levels, row, keys, sum, to);
  }
  __builtin_memcpy(to, row, static_cast<size_t>(keys) * sizeof(float));
}

// What becomes of exponentials and their sum.
void finish_row(const AttentionRows& work, int64_t r, float* row, float sum) {
  if (work.codes != nullptr) {
    return work.codes->wide != nullptr ? code_row(work, r, row, sum, work.codes->wide)
                                       : code_row(work, r, row, sum, work.codes->narrow);
  }
  float* const scores = work.scores + r * work.stride;
  if (sum == sum) return level_row(work.levels, row, work.keys, sum, scores);
  for (int64_t i = 0; i < work.keys; ++i) scores[i] = work.levels.of_nan;
}

}  // namespace

void attention_rows(const AttentionRows& work) {
  const int64_t count = padded(work.keys), left = keys_left(work);
  for (int64_t first = 0; first < work.rows; first += kRowGroup) {
    const int64_t more = work.rows - first, rows = more < kRowGroup ? more : kRowGroup;
    const float* const scores = work.scores + first * work.stride;
    float shifts[kRowGroup], sums[kRowGroup];
    for (int64_t r = 0; r < rows; ++r) {
      float* const row = work.row + r * count;
      load_row(work, first + r, left, row);
      const float most = maximum(scores + r * work.stride, left, work.scale, row, count);
      // Without any key the shift would be infinite; so all are e^-inf = 0, and 0 / 1 in the end.
      shifts[r] = most == -kInfinity ? 0.0f : most;
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* const row = work.row + r * count;
      Floats parts[kParts] = {};
      exponentials(scores + r * work.stride, work.scale, shifts[r], left, row, parts);
      exponentials(row + left, 1.0f, shifts[r], count - left, row + left, parts);
      const float sum = sum_of(parts);
      sums[r] = sum == 0.0f ? 1.0f : sum;
    }
    for (int64_t r = 0; r < rows; ++r) finish_row(work, first + r, work.row + r * count, sums[r]);
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
