// Queries, keys and values of one head on their grids: codes where the integer products read them,
// or values.
#include <csrc/core/code_by_products.h>
#include <csrc/core/integers.h>
#include <csrc/kernels/attention.h>
#include <csrc/kernels/attention_widen.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

constexpr int64_t kSteps = kBlockInputs / 4;

// Calls take(code_of) with the function from values to codes that serves row x.
template <class Take>
inline __attribute__((always_inline)) void with_code_of(const QuantizeOperand& q, const float* x,
                                                        const Take& take) {
  const float scale = q.grid.scale, zero_point = q.grid.zero_point, max_code = q.max_code;
  if (magnitude_bits(x, q.columns) > kFiniteBits) *q.finite = false;
  if (CodeByProducts::serves(q.grid)) {
    const CodeByProducts code(q.grid, max_code);
    take([=](float value) __attribute__((always_inline)) { return round_to_integer(code(value)); });
  } else {
    take([=](float value) __attribute__((always_inline)) {
      return to_code(value, scale, zero_point, max_code);
    });
  }
}

// Codes of row r less `shift`, zeros up to `width`; rows behind the last are all zeros. Their sum.
template <class To>
int32_t encode_row(const QuantizeOperand& q, int64_t r, int64_t width, int32_t shift,
                   To* __restrict__ codes) {
  int32_t sum = 0;
  const int64_t count = r < q.rows ? q.columns : 0;
  if (count > 0 && q.codes != nullptr) {
    const uint8_t* __restrict__ given = q.codes + r * q.row_stride;
    sum = fill_integers(codes, count,
                        [=](int64_t i) __attribute__((always_inline)) { return given[i] - shift; });
  } else if (count > 0) {
    const float* __restrict__ x = q.x + r * q.row_stride;
    with_code_of(q, x, [&](const auto& code_of) __attribute__((always_inline)) {
      sum = fill_integers(codes, count, [&](int64_t i) __attribute__((always_inline)) {
        return static_cast<int32_t>(code_of(x[i])) - shift;
      });
    });
  }
  for (int64_t i = count; i < width; ++i) codes[i] = 0;
  return sum;
}

// Sums of a row's groups, of which there is mostly one.
void sum_groups(const QuantizeOperand& q, const int8_t* a, int32_t sum, int32_t* sums) {
  sums[0] = sum;
  for (int64_t g = 1; g < q.layout.groups; ++g) {
    const int8_t* const first = a + g * q.layout.group_size;
    sums[g] = 0;
    for (int64_t i = 0; i < q.layout.group_columns(g); ++i) sums[g] += first[i];
    sums[0] -= sums[g];
  }
}

}  // namespace

void quantize_queries(const QuantizeOperand& q) {
  const int64_t width = q.layout.blocks * kBlockInputs;
  auto* const bytes = reinterpret_cast<int8_t*>(q.work);
  for (int64_t r = 0; r < q.rows; ++r) {
    int8_t* const a = q.narrow != nullptr ? q.narrow + r * width : bytes;
    const int32_t sum = encode_row(q, r, width, q.shift, a);
    sum_groups(q, a, sum, q.sums + r * q.layout.groups);
    if (q.wide == nullptr) continue;
    for (int64_t i = 0; i < width; i += kBlockInputs) widen_block(a + i, q.wide + r * width + i);
  }
}

void pack_keys(const QuantizeOperand& q) {
  const int64_t width = q.layout.blocks * kBlockInputs, steps = q.layout.blocks * kSteps;
  for (int64_t r = 0; r < padded(q.rows, kTileOutputs); ++r) {
    q.sums[r] = encode_row(q, r, width, 0, q.work);
    uint8_t* to = q.packed + r / kTileOutputs * steps * kLine + r % kTileOutputs * 4;
    for (int64_t step = 0; step < steps; ++step)
      __builtin_memcpy(to + step * kLine, q.work + step * 4, 4);
  }
}

void pack_values(const QuantizeOperand& q) {
  const int64_t width = padded(q.columns, kTileOutputs), steps = q.layout.blocks * kSteps;
  for (int64_t o = 0; o < width; ++o) q.sums[o] = 0;
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t j = 0; j < 4; ++j) encode_row(q, step * 4 + j, width, 0, q.work + j * width);
    for (int64_t tile = 0; tile * kTileOutputs < width; ++tile) {
      const uint8_t* __restrict__ from = q.work + tile * kTileOutputs;
      int32_t* __restrict__ sums = q.sums + tile * kTileOutputs;
      uint32_t words[kTileOutputs];
      for (int64_t o = 0; o < kTileOutputs; ++o) {
        const uint32_t a = from[o], b = from[width + o], c = from[2 * width + o],
                       d = from[3 * width + o];
        sums[o] += static_cast<int32_t>(a + b + c + d);
        words[o] = a | b << 8 | c << 16 | d << 24;
      }
      __builtin_memcpy(q.packed + (tile * steps + step) * kLine, words, kLine);
    }
  }
}

void dequantize_operand(const QuantizeOperand& q) {
  const float scale = q.grid.scale, zero_point = q.grid.zero_point;
  for (int64_t r = 0; r < q.rows; ++r) {
    float* __restrict__ values = q.values + r * q.columns;
    if (q.codes != nullptr) {
      const uint8_t* __restrict__ given = q.codes + r * q.row_stride;
      for (int64_t i = 0; i < q.columns; ++i) values[i] = to_value(given[i], scale, zero_point);
      continue;
    }
    const float* __restrict__ x = q.x + r * q.row_stride;
    with_code_of(q, x, [&](const auto& code_of) __attribute__((always_inline)) {
      for (int64_t i = 0; i < q.columns; ++i)
        values[i] = to_value(code_of(x[i]), scale, zero_point);
    });
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
