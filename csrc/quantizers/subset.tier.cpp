#include <csrc/quantizers/subset.h>

#include <csrc/core/lanes.h>

namespace torchquant::TORCHQUANT_TIER {
namespace {

using Int8 = int32_t __attribute__((vector_size(32)));
using Bytes8 = uint8_t __attribute__((vector_size(8)));
using UnalignedBytes8 = uint8_t __attribute__((vector_size(8), aligned(1), may_alias));
constexpr int64_t kBlock = 256;
constexpr int64_t kShortRun = 16;  // shorter runs gain nothing from vectors

float clamp(float x, float low, float high) {
  x = x > low ? x : low;
  return x < high ? x : high;
}

// Calls visit(start, length, channel) for the runs of elements with one channel.
template <class Visit>
void for_each_run(int64_t first, int64_t count, const SubsetChannels& layout, const Visit& visit) {
  if (layout.channels == 1) return visit(int64_t{0}, count, int64_t{0});
  int64_t channel = first / layout.inner % layout.channels,
          left = layout.inner - first % layout.inner;
  for (int64_t start = 0; start < count;) {
    const int64_t length = left < count - start ? left : count - start;
    visit(start, length, channel);
    start += length;
    left = layout.inner;
    channel = channel + 1 == layout.channels ? 0 : channel + 1;
  }
}

// How many thresholds are below x.
uint8_t search(float x, const float* thresholds, int64_t count) {
  int64_t below = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    const bool above = x > thresholds[below + half];
    below += above ? half + 1 : 0;
    count = above ? count - half - 1 : half;
  }
  return static_cast<uint8_t>(below);
}

// One comparison with each threshold.
int64_t encode_by_counting(const float* x, int64_t count, const float* thresholds, int64_t number,
                           uint8_t* codes) {
  int64_t i = 0;
  for (; i + kFloat8 <= count; i += kFloat8) {
    const Float8 values = TORCHQUANT_LOAD8(x + i);
    Int8 counts = {};
    for (int64_t t = 0; t < number; ++t)
      counts -= values > (thresholds[t] + Float8{});  // true is -1
    *reinterpret_cast<UnalignedBytes8*>(codes + i) = __builtin_convertvector(counts, Bytes8);
  }
  return i;
}

void encode_by_table(const float* x, int64_t count, const uint8_t* table, uint8_t* codes) {
  constexpr float kFactor = 2 * kSubsetUnit;
  int32_t index[kBlock];
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t here = count - first < kBlock ? count - first : kBlock;
    for (int64_t i = 0; i < here; ++i)
      index[i] = ceiling(clamp(x[first + i] * kFactor, 1.0f - kFactor, kFactor));
    for (int64_t i = 0; i < here; ++i) codes[first + i] = table[index[i] + kSubsetTable / 2 - 1];
  }
}

}  // namespace

void subset_encode(const SubsetEncode& encode) {
  const int64_t number = encode.level_count - 1;
  for_each_run(encode.first, encode.count, encode.layout,
               [&](int64_t start, int64_t length, int64_t channel) {
                 const float* x = encode.x + start;
                 const float* thresholds = encode.thresholds + channel * number;
                 uint8_t* codes = encode.codes + start;
                 if (encode.tables != nullptr)
                   return encode_by_table(x, length, encode.tables + channel * kSubsetTable, codes);
                 int64_t i = 0;
                 if (number <= kSubsetMaxCounted && length >= kShortRun)
                   i = encode_by_counting(x, length, thresholds, number, codes);
                 for (; i < length; ++i) codes[i] = search(x[i], thresholds, number);
               });
}

void subset_decode(const SubsetDecode& decode) {
  for_each_run(decode.first, decode.count, decode.layout,
               [&](int64_t start, int64_t length, int64_t channel) {
                 const float* values = decode.values + channel * kSubsetMaxLevels;
                 for (int64_t i = start; i < start + length; ++i)
                   decode.out[i] = values[decode.codes[i]];
               });
}

void subset_count(const SubsetCount& work) {
  const int32_t low = static_cast<int32_t>(work.low);
  int32_t index[kBlock];
  double square_sum = *work.square_sum;
  for (int64_t first = 0; first < work.count; first += kBlock) {
    const int64_t here = work.count - first < kBlock ? work.count - first : kBlock;
    const float* x = work.x + first;
    for (int64_t i = 0; i < here; ++i)
      index[i] = ceiling(clamp(x[i] * work.factor, work.low, work.high)) - low;
    for (int64_t i = 0; i < here; ++i) {
      const double value = static_cast<double>(x[i]);
      SubsetCell& cell = work.cells[index[i]];
      cell.count += 1;
      cell.sum += value;
      square_sum += value * value;
    }
  }
  *work.square_sum = square_sum;
}

}  // namespace torchquant::TORCHQUANT_TIER
