#include <csrc/kernels/integers.h>
#include <csrc/kernels/linear.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

// Inputs 0 2 1 3 of every four, as 16-bit dot products of bytes' even and odd halves want them.
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
    int32_t sum = 0;
    for (int64_t i = first; i < end; ++i) sum += a[i];
    sum *= starts.factor;
    *to =
        starts.pairs ? static_cast<int32_t>((static_cast<uint32_t>(sum) & 0xffff) * 0x10001) : sum;
  }
}

template <class To>
void quantize_row(const QuantizeRows& q, const IntegerGrid& grid, int64_t row, To* a) {
  const BlockLayout& layout = q.layout;
  for (int64_t g = 0; g < layout.groups; ++g) {
    const int64_t first = row * layout.columns + g * layout.group_size;
    const int64_t count = layout.group_columns(g);
    q.sums[row * layout.groups + g] = q.codes != nullptr
                                          ? integers_of(grid, q.codes + first, count, a)
                                          : integers_of(grid, q.x + first, count, a);
    const int64_t padded = layout.blocks_of_group(g) * kBlockInputs;
    for (int64_t i = count; i < padded; ++i) a[i] = 0;
    if constexpr (sizeof(To) == 2) interleave(a, padded);
    a += padded;
  }
  if (q.starts != nullptr) sum_groups(q, row, a - layout.blocks * kBlockInputs);
}

// The scale of the integers, and how values become them.
float grid_of_row(const QuantizeRows& q, int64_t row, IntegerGrid& grid) {
  grid = {q.scale, 0.0f, q.zero_point, q.max_code, q.shift};
  if (q.x == nullptr) return q.scale;
  const int32_t bits = magnitude_bits(q.x + row * q.layout.columns, q.layout.columns);
  if (bits > kFiniteBits) *q.finite = false;
  if (q.scale != 0.0f) return q.scale;
  const float largest = bits > kFiniteBits ? 0.0f : __builtin_bit_cast(float, bits);
  const SymmetricScale symmetric = symmetric_scale(largest, q.limit);
  grid.factor = symmetric.factor;
  return symmetric.scale;
}

}  // namespace

void quantize_rows(const QuantizeRows& q) {
  const int64_t depth = q.layout.blocks * kBlockInputs;
  for (int64_t row = 0; row < q.rows; ++row) {
    IntegerGrid grid;
    const float scale = grid_of_row(q, row, grid);
    if (q.a_scale != nullptr) q.a_scale[row] = scale;
    q.wide != nullptr ? quantize_row(q, grid, row, q.wide + row * depth)
                      : quantize_row(q, grid, row, q.narrow + row * depth);
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
