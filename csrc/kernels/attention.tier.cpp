#include <csrc/kernels/attention_powers.h>
#include <csrc/kernels/attention_widen.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

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

// Note [one product for two quotients]: e * (1 / (sum * scale)) is within a few ulp of (e / sum) /
// scale, so a code can differ only where the product lies that near to a tie. Rows in which that
// happens are written again, by division. Products of rows whose ends are codes need not be
// clamped.
enum class By { division, product, product_inside };

// What turns the powers of some rows into codes.
struct RowCodes {
  RowCodes(const Levels& levels, const FourFloats& of_rows)
      : grid(levels.grid), max_code(levels.max_code), sum(of_rows) {
    const FourDoubles unit = __builtin_convertvector(sum, FourDoubles) * double{grid.scale};
    factor = __builtin_convertvector(1.0 / unit, FourFloats);
    // Powers are at most 1.
    const float least = 1.000001f / (grid.scale * (max_code - grid.zero_point));
    const FourInts fits = sum >= least;
    inside = grid.zero_point >= 0.0f && grid.zero_point < max_code &&
             (fits[0] & fits[1] & fits[2] & fits[3]) != 0;
  }

  // Of the power 1. to_code of vectors.
  FourFloats largest() const {
    FourFloats x = 1.0f / sum / grid.scale + grid.zero_point;
    x = x > 0.0f ? x : FourFloats{};
    x = x < max_code ? x : FourFloats{} + max_code;
    return (x + kMagic) - kMagic;
  }

  Grid grid;
  float max_code;
  FourFloats sum, factor;
  FourInts shift = {};
  bool inside;  // no product of a power is beyond the codes
};

float safe_distance(const Grid& grid) {
  // Where p or its quotient could be subnormal the error is no matter of ulp.
  if (!(grid.scale > 0x1p-60f && grid.scale < 0x1p60f)) return -1.0f;
  return 0.5f - (256.0f + absolute(grid.zero_point)) * 0x1p-20f;
}

// write(by what, first, last) writes some rows and returns each one's largest distance from a whole
// number.
template <class Write>
void write_safely(const RowCodes& codes, int64_t rows, const Write& write) {
  const float safe = safe_distance(codes.grid);
  constexpr Known<By::division> kByDivision;
  if (!(safe > 0.0f)) {
    write(kByDivision, 0, rows);
    return;
  }
  const FourFloats farthest = codes.inside ? write(Known<By::product_inside>(), 0, rows)
                                           : write(Known<By::product>(), 0, rows);
  for (int64_t r = 0; r < rows; ++r)
    if (!(farthest[r] < safe)) write(kByDivision, r, r + 1);
}

// Integers of kRowPad keys by division.
inline void divide_block(const RowCodes& codes, int64_t r, const float* e, Ints (&a)[kParts]) {
  int32_t integers[kRowPad];
  for (int64_t j = 0; j < kRowPad; ++j) {
    const float p = e[j] / codes.sum[r];
    const float code = to_code(p, codes.grid.scale, codes.grid.zero_point, codes.max_code);
    integers[j] = static_cast<int32_t>(code) - codes.shift[r];
  }
  for_each_part([&](int64_t j) { a[j] = load<Ints>(integers + j * kVectorLanes); });
}

template <By kBy>
inline __attribute__((always_inline)) void block_integers(const RowCodes& codes, int64_t r,
                                                          const float* e,
                                                          Floats (&farthest)[kParts],
                                                          Ints (&a)[kParts]) {
  if constexpr (kBy == By::division) return divide_block(codes, r, e, a);
  const Floats none{};
  for_each_part([&](int64_t j) __attribute__((always_inline)) {
    const Floats power = load<Floats>(e + j * kVectorLanes);
    Floats x = fused(power, none + codes.factor[r], none + codes.grid.zero_point);
    if constexpr (kBy == By::product) x = smaller(larger(x, none), none + codes.max_code);
    farthest[j] = farther(past_integer(x), farthest[j]);
    a[j] = rounded(x, codes.shift[r]);
  });
}

// Integers of kRowPad keys, zeros behind the first `count`. Note [bytes before words]: every
// integer of a code fits in a byte. Where products want 16 bits their order is that of the bytes'
// even and odd halves, so that bytes are made first.
template <By kBy, class To>
inline __attribute__((always_inline)) void write_block(const RowCodes& codes, int64_t r,
                                                       const float* e, int64_t count,
                                                       Floats (&farthest)[kParts],
                                                       Ints (&sums)[kParts], To* to) {
  Ints a[kParts];
  block_integers<kBy>(codes, r, e, farthest, a);
  if (count < kRowPad)
    for_each_part([&](int64_t j) { a[j] &= first_lanes(count - j * kVectorLanes); });
  int8_t own[kRowPad];
  int8_t* bytes = own;
  if constexpr (sizeof(To) == 1) bytes = to;
  for_each_part([&](int64_t j) __attribute__((always_inline)) {
    sums[j] += a[j];
    store_narrow(a[j], bytes + j * kVectorLanes);
  });
  if constexpr (sizeof(To) == 2) widen_block(bytes, to);
}

// Integers of keys [0, count) of a group; behind them zeros up to a whole block.
template <By kBy, class To>
inline __attribute__((always_inline)) void write_group(const RowCodes& codes, int64_t r,
                                                       const float* e, int64_t count,
                                                       Floats (&farthest)[kParts],
                                                       Ints (&sums)[kParts], To* to) {
  Floats far[kParts];  // in registers: bytes that are stored could be anything's
  Ints sum[kParts] = {};
  for_each_part([&](int64_t j) { far[j] = farthest[j]; });
  int64_t i = 0;
  for (; i + kRowPad <= count; i += kRowPad)
    write_block<kBy>(codes, r, e + i, kRowPad, far, sum, to + i);
  if (i < count) write_block<kBy>(codes, r, e + i, count - i, far, sum, to + i);
  for_each_part([&](int64_t j) {
    farthest[j] = far[j];
    sums[j] = sum[j];
  });
}

// Codes of the powers of rows [first, last) of `e`; the largest distances, as of write_safely.
template <By kBy, class To>
FourFloats write_codes(const ProbabilityRows& out, const RowCodes& codes, int64_t first,
                       int64_t last, const float* e, int64_t keys, int32_t* sums, To* to) {
  const int64_t stride = padded(keys);
  RowParts<Floats> farthest;
  clear(farthest);
  for (int64_t g = 0; g < out.groups; ++g) {
    const int64_t key = g * out.group_size;
    const int64_t count = g + 1 < out.groups ? out.group_size : keys - key;
    RowParts<Ints> parts;
    clear(parts);
    for (int64_t r = first; r < last; ++r) {
      const int64_t at = r * stride + key;
      write_group<kBy>(codes, r, e + at, count, farthest[r], parts[r], to + at);
    }
    const FourInts of_group = joined_rows(parts, kSum);
    for (int64_t r = first; r < last; ++r) sums[r * out.groups + g] = of_group[r];
  }
  return joined_rows(farthest, kLargest);
}

template <class To>
void code_rows(const AttentionRows& work, int64_t first, int64_t rows, const FourFloats& sum,
               To* to) {
  constexpr float kMost = 127.0f;
  const ProbabilityRows& out = *work.codes;
  RowCodes codes(work.levels, sum);
  const FourFloats beyond = codes.largest() - kMost;
  const FourFloats shift = beyond > 0.0f ? beyond : FourFloats{};
  codes.shift = __builtin_convertvector(shift, FourInts);
  const FourFloats scale = sum == sum ? FourFloats{} + out.unit : FourFloats{} + work.levels.of_nan;
  const FourFloats zero = codes.grid.zero_point - shift;
  for (int64_t r = 0; r < rows; ++r) {
    out.scale[first + r] = scale[r];
    out.zero[first + r] = zero[r];
  }
  to += first * padded(work.keys);
  int32_t* const sums = out.sums + first * out.groups;
  write_safely(codes, rows, [&](auto by, int64_t from, int64_t end) {
    return write_codes<decltype(by)::value>(out, codes, from, end, work.row, work.keys, sums, to);
  });
}

// The nearest values of the grid for kRowPad keys.
template <By kBy>
inline __attribute__((always_inline)) void write_value_block(const RowCodes& codes, int64_t r,
                                                             const float* e,
                                                             Floats (&farthest)[kParts],
                                                             float* to) {
  Ints a[kParts];
  block_integers<kBy>(codes, r, e, farthest, a);
  for_each_part([&](int64_t j) __attribute__((always_inline)) {
    store((to_floats(a[j]) - codes.grid.zero_point) * codes.grid.scale, to + j * kVectorLanes);
  });
}

template <By kBy>
inline __attribute__((always_inline)) void write_values(const RowCodes& codes, int64_t r,
                                                        const float* e, int64_t keys,
                                                        Floats (&farthest)[kParts], float* to) {
  int64_t i = 0;
  for (; i + kRowPad <= keys; i += kRowPad)
    write_value_block<kBy>(codes, r, e + i, farthest, to + i);
  if (i < keys) {
    float last[kRowPad];
    write_value_block<kBy>(codes, r, e + i, farthest, last);
    __builtin_memcpy(to + i, last, static_cast<size_t>(keys - i) * sizeof(float));
  }
}

void level_by_grid(const AttentionRows& work, int64_t first, int64_t rows, const FourFloats& sum) {
  const RowCodes codes(work.levels, sum);
  write_safely(codes, rows, [&](auto by, int64_t from, int64_t end) {
    RowParts<Floats> farthest;
    clear(farthest);
    for (int64_t r = from; r < end; ++r)
      write_values<decltype(by)::value>(codes, r, work.row + r * padded(work.keys), work.keys,
                                        farthest[r], work.scores + (first + r) * work.stride);
    return joined_rows(farthest, kLargest);
  });
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
      break;
  }
}

// Levels of some rows in the place of their scores.
void level_rows(const AttentionRows& work, int64_t first, int64_t rows, const FourFloats& sum) {
  const bool by_grid = work.levels.kind == LevelKind::uniform;
  if (by_grid) level_by_grid(work, first, rows, sum);
  const int64_t count = padded(work.keys);
  for (int64_t r = 0; r < rows; ++r) {
    float* const scores = work.scores + (first + r) * work.stride;
    if (sum[r] != sum[r]) {
      for (int64_t i = 0; i < work.keys; ++i) scores[i] = work.levels.of_nan;
    } else if (!by_grid) {
      float* const row = work.row + r * count;
      level_row(work.levels, row, count, sum[r]);
      __builtin_memcpy(scores, row, static_cast<size_t>(work.keys) * sizeof(float));
    }
  }
}

// What becomes of powers and their sums.
void finish_rows(const AttentionRows& work, int64_t first, int64_t rows, const FourFloats& sum) {
  if (work.codes == nullptr) return level_rows(work, first, rows, sum);
  work.codes->wide != nullptr ? code_rows(work, first, rows, sum, work.codes->wide)
                              : code_rows(work, first, rows, sum, work.codes->narrow);
}

}  // namespace

void attention_rows(const AttentionRows& work) {
  const int64_t count = padded(work.keys), left = keys_left(work);
  const float scale = scale_of(work);
  for (int64_t first = 0; first < work.rows; first += kRowGroup) {
    const int64_t more = work.rows - first, rows = more < kRowGroup ? more : kRowGroup;
    float* const scores = work.scores + first * work.stride;
    RowParts<Floats> most, parts;
    clear(most);
    clear(parts);
    for (int64_t r = 0; r < rows; ++r) {
      float* const row = work.row + r * count;
      if (left == count) fill_behind(scores + r * work.stride, work.keys);
      load_row(work, first + r, left, row);
      largest_of(scores + r * work.stride, left, scale, row, count, most[r]);
    }
    const FourFloats largest = joined_rows(most, kLargest);
    for (int64_t r = 0; r < rows; ++r) {
      float* const row = work.row + r * count;
      // Without any key the shift would be infinite; so all are 2^-inf = 0, and 0 / 1 in the end.
      const float shift = largest[r] == -kInfinity ? 0.0f : largest[r];
      powers(scores + r * work.stride, scale, shift, left, row, parts[r]);
      powers(row + left, 1.0f, shift, count - left, row + left, parts[r]);
    }
    const FourFloats sum = joined_rows(parts, kSum);
    finish_rows(work, first, rows, sum == 0.0f ? FourFloats{} + 1.0f : sum);
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
