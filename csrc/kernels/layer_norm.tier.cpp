#include <csrc/kernels/layer_norm.h>

#include <csrc/core/value_integers.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

constexpr int64_t kVectors = kNormLanes / kVectorLanes;
constexpr int64_t kRowGroup = 4;  // sums of so many rows are folded at once

struct Lanes {
  Floats part[kVectors];
};

// visit(v) for the vectors of kNormLanes neighbours.
template <class Visit>
inline __attribute__((always_inline)) void for_each_vector(const Visit& visit) {
#pragma GCC unroll 8
  for (int64_t v = 0; v < kVectors; ++v) visit(v);
}

inline __attribute__((always_inline)) Lanes load_lanes(const float* x) {
  Lanes lanes;
  for_each_vector([&](int64_t v) { lanes.part[v] = load<Floats>(x + v * kVectorLanes); });
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

// visit(lanes) for all values of a row.
template <class Visit>
inline __attribute__((always_inline)) void for_all_lanes(const float* x, int64_t columns,
                                                         float missing, const Visit& visit) {
  int64_t i = 0;
  for (; i + kNormLanes <= columns; i += kNormLanes) visit(load_lanes(x + i));
  if (i < columns) visit(load_rest(x + i, columns - i, missing));
}

// See Note [moments of a row].
struct Moments {
  float mean;
  float factor;  // 1 / sqrt(variance + eps)
  float offset;  // -rest * factor
};

inline void moments_of(const float* const (&x)[kRowGroup], int64_t columns, float eps,
                       Moments* rows) {
  const float share = 1.0f / static_cast<float>(columns);
  Floats sums[kRowGroup][kVectors], squares[kRowGroup][kVectors];
  for (int64_t r = 0; r < kRowGroup; ++r) {
    Lanes sum{};
    for_all_lanes(x[r], columns, 0.0f, [&](const Lanes& values) __attribute__((always_inline)) {
      for_each_vector([&](int64_t v) { sum.part[v] += values.part[v]; });
    });
    for_each_vector([&](int64_t v) { sums[r][v] = sum.part[v]; });
  }
  const FourFloats mean = joined_rows(sums, kSum) * share;
  for (int64_t r = 0; r < kRowGroup; ++r) {
    Lanes sum{}, square{};
    for_all_lanes(x[r], columns, mean[r], [&](const Lanes& values) __attribute__((always_inline)) {
      for_each_vector([&](int64_t v) __attribute__((always_inline)) {
        const Floats centred = values.part[v] - mean[r];
        sum.part[v] += centred;
        square.part[v] = fused(centred, centred, square.part[v]);
      });
    });
    for_each_vector([&](int64_t v) {
      sums[r][v] = sum.part[v];
      squares[r][v] = square.part[v];
    });
  }
  const FourFloats rest = joined_rows(sums, kSum) * share;
  const FourFloats mean_square = joined_rows(squares, kSum) * share;
  for (int64_t r = 0; r < kRowGroup; ++r) {
    const float variance = fused(-rest[r], rest[r], mean_square[r]);
    const float factor = 1.0f / __builtin_sqrtf((variance < 0.0f ? 0.0f : variance) + eps);
    rows[r] = {mean[r], factor, -rest[r] * factor};
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

}  // namespace

void layer_norm_codes(const LayerNormRows& work) {
  const IntegerGrid grid{work.grid.scale, 0.0f, work.grid.zero_point, work.max_code, 0};
  const int64_t columns = work.columns;
  with_integers(grid, [&](const auto integers) {
    for (int64_t first = 0; first < work.rows; first += kRowGroup) {
      const int64_t left = work.rows - first, count = left < kRowGroup ? left : kRowGroup;
      const float* x[kRowGroup];  // behind the last row it once more
      for (int64_t r = 0; r < kRowGroup; ++r)
        x[r] = work.x + (first + (r < count ? r : count - 1)) * columns;
      Moments rows[kRowGroup];
      moments_of(x, columns, work.eps, rows);
      for (int64_t r = 0; r < count; ++r) {
        if (!(absolute(rows[r].mean) <= kLargestFloat)) *work.finite = false;
        encode(work, x[r], rows[r], integers, work.codes + (first + r) * columns);
      }
    }
  });
}

}  // namespace torchquant::TORCHQUANT_TIER
