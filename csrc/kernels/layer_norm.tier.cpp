#include <csrc/kernels/layer_norm.h>

#include <csrc/core/value_integers.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

constexpr int64_t kVectors = kNormLanes / kVectorLanes;
// The steps of a sum wait for each other: a second row's fill the time, where registers hold them.
#if defined(__AVX512BW__)
constexpr int64_t kRowsAtOnce = 2;
#else
constexpr int64_t kRowsAtOnce = 1;
#endif
constexpr float kLargest = 3.40282347e38f;

struct Lanes {
  Floats part[kVectors];
};

inline __attribute__((always_inline)) Lanes load_lanes(const float* x) {
  Lanes lanes;
#pragma GCC unroll 8
  for (int64_t v = 0; v < kVectors; ++v) lanes.part[v] = load<Floats>(x + v * kVectorLanes);
  return lanes;
}

// The last values of a row, with `missing` behind them.
inline __attribute__((always_inline)) Lanes load_rest(const float* x, int64_t count,
                                                      float missing) {
  float rest[kNormLanes];
  for (int64_t i = 0; i < kNormLanes; ++i) rest[i] = missing;
  for (int64_t i = 0; i < count; ++i) rest[i] = x[i];
  return load_lanes(rest);
}

// visit(row, lanes) for all values of some rows.
template <int64_t kRows, class Visit>
inline __attribute__((always_inline)) void for_all_lanes(const float* x, int64_t columns,
                                                         const float* missing, const Visit& visit) {
  int64_t i = 0;
  for (; i + kNormLanes <= columns; i += kNormLanes) {
#pragma GCC unroll 2
    for (int64_t r = 0; r < kRows; ++r) visit(r, load_lanes(x + r * columns + i));
  }
  if (i == columns) return;
#pragma GCC unroll 2
  for (int64_t r = 0; r < kRows; ++r)
    visit(r, load_rest(x + r * columns + i, columns - i, missing[r]));
}

// The upper half joins the lower one until one lane is left: a tree of one shape on every tier.
inline __attribute__((always_inline)) float fold(Lanes sums) {
#pragma GCC unroll 4
  for (int64_t half = kVectors / 2; half > 0; half /= 2) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < half; ++v) sums.part[v] += sums.part[v + half];
  }
  const Floats all = sums.part[0];
#if defined(__AVX512BW__)
  const auto eight = __builtin_shufflevector(all, all, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
  const Floats eight = all;
#endif
#if defined(__AVX2__)
  const auto four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                    __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#else
  const Floats four = all;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// See Note [moments of a row].
struct Moments {
  float mean;
  float factor;  // 1 / sqrt(variance + eps)
  float offset;  // -rest * factor
};

template <int64_t kRows>
inline __attribute__((always_inline)) void moments_of(const float* x, int64_t columns, float eps,
                                                      Moments* rows) {
  const float share = 1.0f / static_cast<float>(columns);
  float mean[kRows] = {};
  Lanes sums[kRows] = {}, squares[kRows] = {};
  for_all_lanes<kRows>(x, columns, mean,
                       [&](int64_t r, const Lanes& values) __attribute__((always_inline)) {
#pragma GCC unroll 8
                         for (int64_t v = 0; v < kVectors; ++v) sums[r].part[v] += values.part[v];
                       });
#pragma GCC unroll 2
  for (int64_t r = 0; r < kRows; ++r) {
    mean[r] = fold(sums[r]) * share;
    sums[r] = Lanes{};
  }
  for_all_lanes<kRows>(x, columns, mean,
                       [&](int64_t r, const Lanes& values) __attribute__((always_inline)) {
#pragma GCC unroll 8
                         for (int64_t v = 0; v < kVectors; ++v) {
                           const Floats centred = values.part[v] - mean[r];
                           sums[r].part[v] += centred;
                           squares[r].part[v] = fused(centred, centred, squares[r].part[v]);
                         }
                       });
#pragma GCC unroll 2
  for (int64_t r = 0; r < kRows; ++r) {
    const float rest = fold(sums[r]) * share;
    const float variance = fused(-rest, rest, fold(squares[r]) * share);
    const float factor = 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + eps);
    rows[r] = {mean[r], factor, -rest * factor};
  }
}

// All codes of a row. Copies of what the loop reads: bytes written could change the rest.
template <class Integers>
inline __attribute__((always_inline)) void encode(const LayerNormRows& work, const float* x,
                                                  const Moments& row, const Integers& integers,
                                                  uint8_t* codes) {
  const float *const weight = work.weight, *const bias = work.bias;
  const float mean = row.mean, factor = row.factor, offset = row.offset;
  const auto take = [=](auto vectors, const float* from, int64_t column, uint8_t* to)
                        __attribute__((always_inline)) {
                          constexpr int kCount = decltype(vectors)::value;
                          const auto values = load_bundle<kCount>(from);
                          const auto normal = fused(values - mean, factor, offset);
                          store_narrow(integers(fused(normal, load_bundle<kCount>(weight + column),
                                                      load_bundle<kCount>(bias + column))),
                                       to);
                        };
  constexpr std::integral_constant<int, kIntegerBundle> kMany;
  constexpr std::integral_constant<int, 1> kOne;
  const int64_t columns = work.columns;
  int64_t i = 0;
  for (; i + kMany * kVectorLanes <= columns; i += kMany * kVectorLanes)
    take(kMany, x + i, i, codes + i);
  for (; i + kVectorLanes <= columns; i += kVectorLanes) take(kOne, x + i, i, codes + i);
  if (i == columns) return;
  float rest[kVectorLanes] = {};
  uint8_t last[kVectorLanes];
  for (int64_t j = i; j < columns; ++j) rest[j - i] = x[j];
  take(kOne, rest, i, last);
  for (int64_t j = i; j < columns; ++j) codes[j] = last[j - i];
}

template <int64_t kRows, class Integers>
inline __attribute__((always_inline)) void encode_rows(const LayerNormRows& work, int64_t first,
                                                       const Integers& integers) {
  const float* const x = work.x + first * work.columns;
  Moments rows[kRows];
  moments_of<kRows>(x, work.columns, work.eps, rows);
  for (int64_t r = 0; r < kRows; ++r) {
    if (!(absolute(rows[r].mean) <= kLargest)) *work.finite = false;
    encode(work, x + r * work.columns, rows[r], integers, work.codes + (first + r) * work.columns);
  }
}

}  // namespace

void layer_norm_codes(const LayerNormRows& work) {
  const IntegerGrid grid{work.grid.scale, 0.0f, work.grid.zero_point, work.max_code, 0};
  with_integers(grid, [&](const auto integers) {
    int64_t r = 0;
    for (; r + kRowsAtOnce <= work.rows; r += kRowsAtOnce)
      encode_rows<kRowsAtOnce>(work, r, integers);
    for (; r < work.rows; ++r) encode_rows<1>(work, r, integers);
  });
}

}  // namespace torchquant::TORCHQUANT_TIER
