#include <csrc/quantizers/sulq.h>

#include <csrc/core/lanes.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

using Int8 = int32_t __attribute__((vector_size(32)));
using Bytes8 = uint8_t __attribute__((vector_size(8)));
using UnalignedBytes8 = uint8_t __attribute__((vector_size(8), aligned(1), may_alias));
using Long8 = int64_t __attribute__((vector_size(64)));
using UnalignedShort8 = int16_t __attribute__((vector_size(16), aligned(2), may_alias));
constexpr int64_t kVectors = 4;
constexpr int64_t kBlock = kVectors * kFloat8;

// One comparison with each threshold. NaN is above none of them: code 0.
void encode_by_counting(const SulqEncode& encode, const float* x, uint8_t* codes) {
  Float8 values[kVectors];
  Int8 counts[kVectors] = {};
#pragma GCC unroll 4
  for (int64_t j = 0; j < kVectors; ++j) values[j] = TORCHQUANT_LOAD8(x + j * kFloat8);
  for (int64_t t = 0; t < encode.threshold_count; ++t) {
    const Float8 threshold = encode.thresholds[t] + Float8{};
#pragma GCC unroll 4
    for (int64_t j = 0; j < kVectors; ++j) counts[j] -= values[j] > threshold;  // true is -1
  }
#pragma GCC unroll 4
  for (int64_t j = 0; j < kVectors; ++j) {
    *reinterpret_cast<UnalignedBytes8*>(codes + j * kFloat8) =
        __builtin_convertvector(counts[j], Bytes8);
  }
}

// The bucket of x bounds its code from below; the few thresholds inside the bucket are compared.
void encode_by_bucket(const SulqEncode& encode, const float* x, uint8_t* codes) {
  int32_t counts[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) {
    uint32_t bucket = ordered_pattern(x[i]) >> encode.bucket_shift;
    bucket = bucket > encode.first_bucket ? bucket : encode.first_bucket;
    bucket = bucket < encode.last_bucket ? bucket : encode.last_bucket;
    counts[i] = encode.start[bucket - encode.first_bucket];
  }
  for (int32_t c = 0; c < encode.compares; ++c) {
    for (int64_t i = 0; i < kBlock; ++i) counts[i] += x[i] > encode.thresholds[counts[i]] ? 1 : 0;
  }
  for (int64_t i = 0; i < kBlock; ++i)
    codes[i] = static_cast<uint8_t>(x[i] == x[i] ? counts[i] : 0);  // NaN
}

void encode_block(const SulqEncode& encode, const float* x, uint8_t* codes) {
  if (encode.start == nullptr) return encode_by_counting(encode, x, codes);
  encode_by_bucket(encode, x, codes);
}

// Columns 0 .. 8 vectors - 1 of one row, the sums in registers.
template <class Sums8, int64_t kSums>
inline __attribute__((always_inline)) void shift_block(const SulqShiftMatmul& product,
                                                       const uint8_t* codes, const int16_t* v,
                                                       int64_t* sums) {
  Sums8 totals[kSums] = {};
  for (int64_t k = 0; k < product.inner; ++k, v += product.columns) {
    const uint8_t shift = product.shifts[codes[k]];
    if (shift == kSulqNothing) continue;
    const Sums8 shifts = shift + Sums8{};
#pragma GCC unroll 8
    for (int64_t j = 0; j < kSums; ++j) {
      const auto terms = *reinterpret_cast<const UnalignedShort8*>(v + 8 * j);
      totals[j] += __builtin_convertvector(terms, Sums8) << shifts;
    }
  }
#pragma GCC unroll 8
  for (int64_t j = 0; j < kSums; ++j) {
    for (int64_t l = 0; l < 8; ++l) sums[8 * j + l] = totals[j][l];
  }
}

template <class Sums8>
void shift_row(const SulqShiftMatmul& product, const uint8_t* codes, const int16_t* v,
               int64_t* sums) {
  int64_t n = 0;
  for (; n + 64 <= product.columns; n += 64) shift_block<Sums8, 8>(product, codes, v + n, sums + n);
  for (; n + 8 <= product.columns; n += 8) shift_block<Sums8, 1>(product, codes, v + n, sums + n);
  for (; n < product.columns; ++n) {
    sums[n] = 0;
    for (int64_t k = 0; k < product.inner; ++k) {
      const uint8_t shift = product.shifts[codes[k]];
      if (shift != kSulqNothing)
        sums[n] += static_cast<int64_t>(v[k * product.columns + n]) << shift;
    }
  }
}

}  // namespace

void sulq_encode(const SulqEncode& encode) {
  int64_t i = 0;
  for (; i + kBlock <= encode.count; i += kBlock)
    encode_block(encode, encode.x + i, encode.codes + i);
  if (i == encode.count) return;
  const size_t left = static_cast<size_t>(encode.count - i);
  float x[kBlock] = {};
  uint8_t codes[kBlock];
  __builtin_memcpy(x, encode.x + i, left * sizeof(float));
  encode_block(encode, x, codes);
  __builtin_memcpy(encode.codes + i, codes, left);
}

void sulq_decode(const SulqDecode& decode) {
  for (int64_t i = 0; i < decode.count; ++i) decode.out[i] = decode.values[decode.codes[i]];
}

void sulq_shift_matmul(const SulqShiftMatmul& product) {
  for (int64_t row = 0; row < product.batches * product.rows; ++row) {
    const uint8_t* codes = product.codes + row * product.inner;
    const int16_t* v = product.v + row / product.rows * product.inner * product.columns;
    int64_t* sums = product.sums + row * product.columns;
    if (product.narrow) {
      shift_row<Int8>(product, codes, v, sums);
    } else {
      shift_row<Long8>(product, codes, v, sums);
    }
  }
}

}  // namespace torchquant::TORCHQUANT_TIER
