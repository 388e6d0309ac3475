#include <csrc/kernels/linear.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

struct RowGrid {
  float scale;
  float factor;  // 1 / scale, for scales that come from the row
};

// Largest magnitude by comparing bits, so that NaN and Inf come out largest.
float largest_magnitude(const float* __restrict__ x, int64_t count) {
  using Bits = int32_t __attribute__((may_alias));
  const auto* __restrict__ bits = reinterpret_cast<const Bits*>(x);
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t magnitude = bits[i] & 0x7fffffff;
    largest = largest > magnitude ? largest : magnitude;
  }
  union {
    int32_t bits;
    float value;
  } result = {largest};
  return result.value;
}

bool is_finite(float magnitude) { return magnitude <= 3.4028234663852886e38f; }

// a[i] = integer_of(i); the sum of all.
template <class To, class IntegerOf>
inline __attribute__((always_inline)) int32_t fill(To* __restrict__ a, int64_t count,
                                                   const IntegerOf& integer_of) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t integer = integer_of(i);
    a[i] = static_cast<To>(integer);
    sum += integer;
  }
  return sum;
}

// Integers of `count` inputs; their sum. Copies of what the loops read: bytes written to `a` could
// change anything that is reached by a pointer, and the loops would not become vectors.
template <class To>
int32_t quantize_run(const QuantizeRows& q, float factor, const float* __restrict__ x,
                     const uint8_t* __restrict__ codes, int64_t count, To* __restrict__ a) {
  const int32_t shift = q.shift;
  if (codes != nullptr) return fill(a, count, [=](int64_t i) { return codes[i] - shift; });
  if (q.scale == 0.0f) {
    return fill(a, count,
                [=](int64_t i) { return static_cast<int32_t>(round_to_integer(x[i] * factor)); });
  }
  const float scale = q.scale, zero_point = q.zero_point, max_code = q.max_code;
  return fill(a, count, [=](int64_t i) {
    return static_cast<int32_t>(to_code(x[i], scale, zero_point, max_code)) - shift;
  });
}

// Inputs 0 2 1 3 of every four, as 16-bit dot products of bytes' even and odd halves want them.
void interleave(int16_t* a, int64_t count) {
  for (int64_t i = 0; i < count; i += 4) {
    const int16_t second = a[i + 1];
    a[i + 1] = a[i + 2];
    a[i + 2] = second;
  }
}

template <class To>
void quantize_row(const QuantizeRows& q, const RowGrid& grid, int64_t row, To* a) {
  const BlockLayout& layout = q.layout;
  for (int64_t g = 0; g < layout.groups; ++g) {
    const int64_t first = row * layout.columns + g * layout.group_size;
    const int64_t count = layout.group_columns(g);
    const float* const x = q.x == nullptr ? nullptr : q.x + first;
    const uint8_t* const codes = q.codes == nullptr ? nullptr : q.codes + first;
    q.sums[row * layout.groups + g] = quantize_run(q, grid.factor, x, codes, count, a);
    const int64_t padded = layout.blocks_of_group(g) * kBlockInputs;
    for (int64_t i = count; i < padded; ++i) a[i] = 0;
    if constexpr (sizeof(To) == 2) interleave(a, padded);
    a += padded;
  }
}

RowGrid grid_of_row(const QuantizeRows& q, int64_t row) {
  if (q.x == nullptr) return {0, 0};
  const float largest = largest_magnitude(q.x + row * q.layout.columns, q.layout.columns);
  if (!is_finite(largest)) *q.finite = false;
  if (q.scale != 0.0f) return {q.scale, 0};
  // Under the smallest normal number 1 / scale would overflow: such a row counts as zero.
  const float kSmallest = 1.17549435e-38f;
  const bool zero = !(largest >= kSmallest * q.limit) || !is_finite(largest);
  return zero ? RowGrid{0.0f, 0.0f} : RowGrid{largest / q.limit, q.limit / largest};
}

}  // namespace

void quantize_rows(const QuantizeRows& q) {
  const int64_t depth = q.layout.blocks * kBlockInputs;
  for (int64_t row = 0; row < q.rows; ++row) {
    const RowGrid grid = grid_of_row(q, row);
    if (q.a_scale != nullptr) q.a_scale[row] = grid.scale;
    q.wide != nullptr ? quantize_row(q, grid, row, q.wide + row * depth)
                      : quantize_row(q, grid, row, q.narrow + row * depth);
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
