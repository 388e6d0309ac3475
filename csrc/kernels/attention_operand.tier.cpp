// Keys and values of one head on their grids: codes where the integer products read them, or
// values.
#include <csrc/kernels/attention.h>
#include <csrc/kernels/integers.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

constexpr int64_t kSteps = kBlockInputs / 4;

void check_row(const QuantizeOperand& q, const float* x) {
  if (magnitude_bits(x, q.columns) > kFiniteBits) *q.finite = false;
}

// Codes of row r, and zeros up to `width`; rows behind the last are all zeros.
void encode_row(const QuantizeOperand& q, int64_t r, int64_t width, int32_t* __restrict__ codes) {
  const int64_t count = r < q.rows ? q.columns : 0;
  const float scale = q.grid.scale, zero_point = q.grid.zero_point, max_code = q.max_code;
  const float* __restrict__ x = count == 0 ? q.x : q.x + r * q.row_stride;
  for (int64_t i = 0; i < count; ++i)
    codes[i] = static_cast<int32_t>(to_code(x[i], scale, zero_point, max_code));
  for (int64_t i = count; i < width; ++i) codes[i] = 0;
  if (count > 0) check_row(q, x);
}

}  // namespace

void pack_keys(const QuantizeOperand& q) {
  const int64_t width = q.layout.blocks * kBlockInputs, steps = q.layout.blocks * kSteps;
  int32_t* __restrict__ codes = q.work;
  auto* const bytes = reinterpret_cast<uint8_t*>(q.work + width);
  for (int64_t r = 0; r < padded(q.rows, kTileOutputs); ++r) {
    encode_row(q, r, width, codes);
    int32_t sum = 0;
    for (int64_t i = 0; i < width; ++i) {
      bytes[i] = static_cast<uint8_t>(codes[i]);
      sum += codes[i];
    }
    q.sums[r] = sum;
    uint8_t* to = q.packed + r / kTileOutputs * steps * kLine + r % kTileOutputs * 4;
    for (int64_t step = 0; step < steps; ++step)
      __builtin_memcpy(to + step * kLine, bytes + step * 4, 4);
  }
}

void pack_values(const QuantizeOperand& q) {
  const int64_t width = padded(q.columns, kTileOutputs), steps = q.layout.blocks * kSteps;
  int32_t* const codes = q.work;
  for (int64_t o = 0; o < width; ++o) q.sums[o] = 0;
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t j = 0; j < 4; ++j) encode_row(q, step * 4 + j, width, codes + j * width);
    for (int64_t tile = 0; tile * kTileOutputs < width; ++tile) {
      const int32_t* __restrict__ from = codes + tile * kTileOutputs;
      int32_t* __restrict__ sums = q.sums + tile * kTileOutputs;
      uint32_t words[kTileOutputs];
      for (int64_t o = 0; o < kTileOutputs; ++o) {
        const int32_t a = from[o], b = from[width + o], c = from[2 * width + o],
                      d = from[3 * width + o];
        sums[o] += a + b + c + d;
        words[o] = static_cast<uint32_t>(a | b << 8 | c << 16 | d << 24);
      }
      __builtin_memcpy(q.packed + (tile * steps + step) * kLine, words, kLine);
    }
  }
}

void dequantize_operand(const QuantizeOperand& q) {
  const float scale = q.grid.scale, zero_point = q.grid.zero_point, max_code = q.max_code;
  for (int64_t r = 0; r < q.rows; ++r) {
    const float* __restrict__ x = q.x + r * q.row_stride;
    float* __restrict__ values = q.values + r * q.columns;
    for (int64_t i = 0; i < q.columns; ++i)
      values[i] = to_value(to_code(x[i], scale, zero_point, max_code), scale, zero_point);
    check_row(q, x);
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
