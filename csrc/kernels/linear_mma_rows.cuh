// What a lane of linear_mma.cuh makes of a weight's codes and of its rows, by their types.
#pragma once
#include <csrc/kernels/linear_float.h>
#include <csrc/kernels/linear_mma_shares.h>

#include <csrc/core/mma.cuh>
#include <csrc/kernels/linear_words.cuh>

namespace torchquant {
namespace {

// The codes of a lane as bytes u, four inputs in a word: of outputs 2 * g and 2 * g + 1, two words.
enum class CodeKind { plain, offset, levels };

template <int kBits, CodeKind kKind>
struct MatrixFormat {
  static constexpr bool kLevels = kKind == CodeKind::levels;
  static constexpr bool kOffset = kKind == CodeKind::offset;
  static constexpr int kWords = kBits == 8 ? 4 : kBits == 3 ? 4 : 2;
  static constexpr int kBlockBytes = kBits * static_cast<int>(kLine);
  static constexpr bool kWhole = kLevels || kBits == 8;  // whether u needs all bits of a byte
  using Lines = LineWords<2>[kWords / 2];

  int output;  // 2 * g
  int c;
  LineWords<4> tables[kLevels ? 2 : 1];

  MatrixFormat() = default;
  __device__ MatrixFormat(const PackedWeight& w, int64_t tile, int lane)
      : output(lane / 4 * 2), c(lane % 4) {
    if constexpr (kLevels) {
      for (int o = 0; o < 2; ++o)
        tables[o] = load_words<4>(w.levels + (tile * kTileOutputs + output + o) * w.level_stride);
    }
  }

  // Where the lane's codes lie in a block: `load` reads from there.
  __device__ int64_t place() const {
    return output * 4 + (kBits == 8 ? 2 * c : kBits == 4 ? c : c / 2) * kLine;
  }
  __device__ void load(const uint8_t* own, Lines& lines) const {
    lines[0] = load_words<2>(own);
    if constexpr (kBits == 8) lines[1] = load_words<2>(own + kLine);
    if constexpr (kBits == 3) lines[1] = load_words<2>(own + (2 - c / 2) * kLine);
  }

  // The same in pairs of 16 bits, each on top of a base: inputs 0 2, 1 3, 4 6, 5 7, the last two
  // pairs times kFactor. Sixteen fits behind float16's base alone.
  template <bool kSixteen>
  static constexpr int kFactor = kBits == 4 && !kLevels && kSixteen ? 16
                                 : kBits < 4                        ? 4
                                                                    : 1;

  template <bool kSixteen>
  __device__ void pairs(const Lines& lines, int o, uint32_t base, uint32_t (&u)[4]) const {
    if constexpr (kWhole) {
      uint32_t words[2];
      bytes(lines, o, words);
      for (int s = 0; s < 2; ++s) {
        u[2 * s] = __byte_perm(words[s], base, 0x7250);
        u[2 * s + 1] = __byte_perm(words[s], base, 0x7351);
      }
    } else if constexpr (kBits == 4) {
      constexpr uint32_t kLow = 0x000f000fu, kHigh = kSixteen ? kLow << 4 : kLow;
      const uint32_t line = lines[0].at[o];
      u[0] = and_or(line, kLow, base);
      u[1] = and_or(line >> 8, kLow, base);
      u[2] = and_or(kSixteen ? line : line >> 4, kHigh, base);
      u[3] = and_or(kSixteen ? line >> 8 : line >> 12, kHigh, base);
    } else {
      const uint32_t line = lines[0].at[o] >> (c % 2 * 4);
      for (int i = 0; i < 4; ++i)
        u[i] = and_or(line >> (i % 2 * 8), i < 2 ? 0x00030003u : 0x000c000cu, base);
      if constexpr (kBits == 3) {  // bits 2 * c and 2 * c + 1 of each byte, to where 4 and 16 are
        const uint32_t third = lines[1].at[o];
        for (int i = 0; i < 2; ++i) {
          const int shift = 2 * c - 2 + 8 * i;
          u[i] = and_or(__funnelshift_r(third, third, shift), 0x00040004u, u[i]);
          u[2 + i] = and_or(__funnelshift_r(third, third, shift - 1), 0x00100010u, u[2 + i]);
        }
      }
    }
  }

  __device__ void bytes(const Lines& lines, int o, uint32_t (&u)[2]) const {
    const uint32_t line = lines[0].at[o];
    if constexpr (kLevels) {
      look_up(tables[o], line, u);
      for (int s = 0; s < 2; ++s) u[s] ^= 0x80808080u;
    } else if constexpr (kBits == 8) {
      for (int s = 0; s < 2; ++s) u[s] = lines[s].at[o];
    } else if constexpr (kBits == 4) {
      for (int s = 0; s < 2; ++s) u[s] = line >> (4 * s) & 0x0f0f0f0fu;
    } else {
      for (int s = 0; s < 2; ++s) {
        u[s] = line >> (c % 2 * 4 + 2 * s) & 0x03030303u;
        if constexpr (kBits == 3) u[s] |= (lines[1].at[o] >> (2 * c + s) & 0x01010101u) << 2;
      }
    }
  }
};

// Rows of integers: exact sums, and floats in the order of linear_tile.h.
struct Integers {
  static constexpr bool kInOrder = true;
  using Sum = int32_t;
  using Row = LineWords<2>;  // a lane's eight inputs of a block
  struct Weights {
    uint32_t words[4];
  };

  // What enters a lane's outputs and rows from one group.
  template <class F, int kTokens>
  struct Group {
    float scale[2], offset[2];
    int32_t row_sums[kTokens][2];

    __device__ void load(const PackedProduct& p, int64_t group, int64_t output, int64_t row) {
      const PackedWeight& w = p.weight;
      for (int o = 0; o < 2; ++o) {
        scale[o] = w.scale[group * w.stride + output + o];
        offset[o] = w.offset != nullptr ? w.offset[group * w.stride + output + o] : 0.0f;
      }
      for (int t = 0; t < kTokens; ++t) {
        for (int i = 0; i < 2; ++i) {
          const int64_t at = row + t * kRowsAtOnce + i;
          row_sums[t][i] = p.sums[(at < p.rows ? at : p.rows - 1) * w.layout.groups + group];
        }
      }
    }

    __device__ float added(const PackedProduct& p, int t, int i, Sum sum, bool first,
                           float value) const {
      const PackedWeight& w = p.weight;
      const int o = i / 2;
      const auto origin = static_cast<uint32_t>(w.needs_signs() ? w.origin - 128 : w.origin);
      const int32_t row_sum = row_sums[t][i % 2];
      const uint32_t dot = static_cast<uint32_t>(sum) - origin * static_cast<uint32_t>(row_sum);
      float added = static_cast<float>(static_cast<int32_t>(dot));
      if (w.offset != nullptr) added = fused(offset[o], static_cast<float>(row_sum), added);
      added *= scale[o];
      return first ? added : value + added;
    }
  };

  template <class F, class G>
  __device__ static Weights weights(const F& format, const typename F::Lines& lines, float,
                                    const G&) {
    Weights weights;
    for (int o = 0; o < 2; ++o) {
      uint32_t u[2];
      format.bytes(lines, o, u);
      for (int s = 0; s < 2; ++s) weights.words[2 * s + o] = F::kWhole ? u[s] ^ 0x80808080u : u[s];
    }
    return weights;
  }

  __device__ static Row arranged(const Row& row) { return row; }

  __device__ static void multiply(Sum (&sums)[4], const Weights& weights, const Row& row) {
    mma_s8(sums, weights.words, row.at[0], row.at[1]);
  }
};

struct Float16 {
  static constexpr uint32_t kOnes = 0x3c003c00u;
  static constexpr uint32_t kBase = 0x64006400u;  // with u in the low bits: 1024 + u
  static constexpr float kBaseValue = 1024.0f;
  static constexpr bool kTakesBytes = true;  // whether that holds for all bytes u
  __device__ static uint32_t pair(float low, float high) { return pair_f16(low, high); }
  __device__ static uint32_t fma(uint32_t a, uint32_t b, uint32_t c) { return fma_f16x2(a, b, c); }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_f16(d, a, b0, b1);
  }
};

struct BFloat16 {
  static constexpr uint32_t kOnes = 0x3f803f80u;
  static constexpr uint32_t kBase = 0x43004300u;  // 128 + u
  static constexpr float kBaseValue = 128.0f;
  static constexpr bool kTakesBytes = false;
  __device__ static uint32_t pair(float low, float high) { return pair_bf16(low, high); }
  __device__ static uint32_t fma(uint32_t a, uint32_t b, uint32_t c) { return fma_bf16x2(a, b, c); }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bf16(d, a, b0, b1);
  }
};

// Rows of float16 or bfloat16.
template <class T>
struct Floats {
  static constexpr bool kInOrder = false;
  using Sum = float;
  using Row = LineWords<4>;
  struct Weights {
    uint32_t words[2][4];  // of four inputs each
  };

  // What enters a lane's outputs from one group.
  template <class F, int kTokens>
  struct Group {
    float scale[2], offset[2];

    __device__ void load(const PackedProduct& p, int64_t group, int64_t output, int64_t) {
      const PackedWeight& w = p.weight;
      for (int o = 0; o < 2; ++o) {
        scale[o] = w.scale[group * w.stride + output + o];
        if constexpr (F::kOffset) offset[o] = w.offset[group * w.stride + output + o];
      }
    }

    __device__ float added(const PackedProduct&, int, int i, Sum sum, bool, float value) const {
      return fused(sum, scale[i / 2], value);
    }
  };

  // u - origin + offset of an output, as `pairs` of a format has them. The difference is exact.
  template <class F>
  __device__ static void to_floats(const F& format, const typename F::Lines& lines, int o,
                                   float origin, float offset, uint32_t (&pairs)[4]) {
    if constexpr (F::kWhole && !T::kTakesBytes) {
      uint32_t words[2];
      format.bytes(lines, o, words);
      for (int s = 0; s < 2; ++s) {
        float values[4];
        for (int i = 0; i < 4; ++i) {  // 2^23 + u
          values[i] =
              float_of(__byte_perm(words[s], 0x4b000000u, 0x7540 + i)) - (8388608.0f + origin);
          if constexpr (F::kOffset) values[i] += offset;
        }
        pairs[2 * s] = T::pair(values[0], values[2]);
        pairs[2 * s + 1] = T::pair(values[1], values[3]);
      }
    } else {
      constexpr int kFactor = F::template kFactor<T::kTakesBytes>;
      format.template pairs<T::kTakesBytes>(lines, o, T::kBase, pairs);
      for (int i = 0; i < 4; ++i) {
        const float factor = i < 2 ? 1.0f : 1.0f / static_cast<float>(kFactor);
        const float base = -(T::kBaseValue * factor + origin);
        pairs[i] =
            T::fma(pairs[i], i < 2 ? T::kOnes : T::pair(factor, factor), T::pair(base, base));
        if constexpr (F::kOffset) pairs[i] = T::fma(pairs[i], T::kOnes, T::pair(offset, offset));
      }
    }
  }

  template <class F, class G>
  __device__ static Weights weights(const F& format, const typename F::Lines& lines, float origin,
                                    const G& group) {
    Weights weights;
    for (int o = 0; o < 2; ++o) {
      uint32_t pairs[4];
      to_floats(format, lines, o, origin, group.offset[o], pairs);
      for (int i = 0; i < 4; ++i) weights.words[i / 2][i % 2 * 2 + o] = pairs[i];
    }
    return weights;
  }

  // Pairs of inputs as those of weights.
  __device__ static Row arranged(const Row& row) {
    Row pairs;
    for (int s = 0; s < 2; ++s) {
      pairs.at[2 * s] = __byte_perm(row.at[2 * s], row.at[2 * s + 1], 0x5410);
      pairs.at[2 * s + 1] = __byte_perm(row.at[2 * s], row.at[2 * s + 1], 0x7632);
    }
    return pairs;
  }

  __device__ static void multiply(Sum (&sums)[4], const Weights& weights, const Row& row) {
    T::multiply(sums, weights.words[0], row.at[0], row.at[1]);
    T::multiply(sums, weights.words[1], row.at[2], row.at[3]);
  }
};

}  // namespace
}  // namespace torchquant
