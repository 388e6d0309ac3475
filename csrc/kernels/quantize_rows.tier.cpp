#include <csrc/core/value_integers.h>
#include <csrc/kernels/linear.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

// Inputs 0 2 1 3 of every four, as 16-bit dot products of bytes' even and odd halves want them.
void interleave(int8_t*, int64_t) {}
void interleave(int16_t* a, int64_t count) {
  for (int64_t i = 0; i < count; i += 4) {
    const int16_t second = a[i + 1];
    a[i + 1] = a[i + 2];
    a[i + 2] = second;
  }
}

// Starts of groups that are multiplied: Note [integer groups].
template <class To>
void sum_groups(const QuantizeRows& q, int64_t row, const To* __restrict__ a) {
  const GroupStarts& starts = q.group_starts;
  const int64_t depth = q.layout.blocks * kBlockInputs, size = starts.blocks * kBlockInputs;
  int32_t* to = q.starts + row;
  for (int64_t first = 0; first < depth; first += size, to += starts.rows) {
    const int64_t end = first + size < depth ? first + size : depth;
    const int32_t sum = sum_of(a + first, end - first) * starts.factor, half = sum >> 1;
    const auto rest = static_cast<uint32_t>(sum - half);
    *to = starts.pairs ? static_cast<int32_t>((half & 0xffff) | rest << 16) : sum;
  }
}

// One row: what `integers(from, count, to)` makes of each group's inputs, then zeros.
template <class Input, class To, class Integers>
inline __attribute__((always_inline)) void fill_row(const QuantizeRows& q, int64_t row,
                                                    const Input* x, To* a,
                                                    const Integers& integers) {
  const BlockLayout& layout = q.layout;
  x += row * layout.columns;
  a += row * layout.blocks * kBlockInputs;
  for (int64_t g = 0; g < layout.groups; ++g) {
    const int64_t count = layout.group_columns(g);
    const int64_t padded = layout.blocks_of_group(g) * kBlockInputs;
    integers(x + g * layout.group_size, count, a);
    for (int64_t i = count; i < padded; ++i) a[i] = 0;
    q.sums[row * layout.groups + g] = sum_of(a, padded);
    interleave(a, padded);
    a += padded;
  }
  if (q.starts != nullptr) sum_groups(q, row, a - layout.blocks * kBlockInputs);
}

template <class To>
void from_codes(const QuantizeRows& q, To* a) {
  const int32_t shift = q.shift;
  for (int64_t row = 0; row < q.rows; ++row)
    fill_row(q, row, q.codes, a, [shift](const uint8_t* codes, int64_t count, To* to) {
      code_integers(codes, shift, count, to);
    });
}

template <class To>
void on_grid(const QuantizeRows& q, To* a) {
  Floats noted{};
  with_integers({q.scale, 0.0f, q.zero_point, q.max_code, q.shift}, [&](const auto& integers) {
    for (int64_t row = 0; row < q.rows; ++row)
      fill_row(q, row, q.x, a, [&](const float* x, int64_t count, To* to) {
        noted = value_integers(integers, noted, x, count, to);
      });
  });
  if (!all_finite(noted)) *q.finite = false;
}

template <class To>
void on_grids_of_rows(const QuantizeRows& q, To* a) {
  for (int64_t row = 0; row < q.rows; ++row) {
    const int32_t bits = magnitude_bits(q.x + row * q.layout.columns, q.layout.columns);
    if (bits > kFiniteBits) *q.finite = false;
    const float largest = bits > kFiniteBits ? 0.0f : __builtin_bit_cast(float, bits);
    const SymmetricScale symmetric = symmetric_scale(largest, q.limit);
    q.a_scale[row] = symmetric.scale;
    const SymmetricIntegers integers(symmetric.factor);
    fill_row(q, row, q.x, a, [&](const float* x, int64_t count, To* to) {
      value_integers(integers, Floats{}, x, count, to);
    });
  }
}

// As dynamic_quantize finds grids and codes of tokens.
template <class To>
void on_fitted_grids(const QuantizeRows& q, To* a) {
  Floats noted{};
  for (int64_t row = 0; row < q.rows; ++row) {
    const float* const x = q.x + row * q.layout.columns;
    const Ends ends = q.layout.columns == 0 ? Ends{} : ends_of(x, q.layout.columns);
    const Grid grid = fit_grid(q.grid, ends.low, ends.high, q.max_code);
    q.a_scale[row] = grid.scale;
    q.a_zero[row] = grid.zero_point - static_cast<float>(q.shift);
    with_integers({grid.scale, 0.0f, grid.zero_point, q.max_code, q.shift},
                  [&](const auto& integers) {
                    fill_row(q, row, q.x, a, [&](const float* x, int64_t count, To* to) {
                      noted = value_integers(integers, noted, x, count, to);
                    });
                  });
  }
  if (!all_finite(noted)) *q.finite = false;
}

template <class To>
void quantize(const QuantizeRows& q, To* a) {
  if (q.codes != nullptr) return from_codes(q, a);
  if (q.a_zero != nullptr) return on_fitted_grids(q, a);
  q.scale != 0.0f ? on_grid(q, a) : on_grids_of_rows(q, a);
}

}  // namespace

void quantize_rows(const QuantizeRows& q) {
  q.wide != nullptr ? quantize(q, q.wide) : quantize(q, q.narrow);
}

}  // namespace torchquant::TORCHQUANT_TIER
