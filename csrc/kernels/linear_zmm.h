// What the kernels of 64-byte vectors share: codes out of their lines, and the way from sums to
// outputs in registers.
#pragma once
#include <csrc/kernels/linear_tile.h>

// g++ 12 takes the "undefined" operands inside its own intrinsics for mistakes of the caller.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace torchquant {
namespace {

inline __attribute__((always_inline)) __m512i masked(__m512i codes, int mask) {
  return _mm512_and_si512(codes, _mm512_set1_epi8(static_cast<char>(mask)));
}

// Each format has V[step] of a block from its lines.
template <int kBits>
struct UniformCodes {
  UniformCodes() = default;
  UniformCodes(const PackedWeight&, int64_t) {}

  inline __attribute__((always_inline)) __m512i at(int step, const uint8_t* lines) const {
    constexpr int kLow = kBits == 3 ? 2 : kBits, kPerLine = 8 / kLow;
    const __m512i codes = _mm512_loadu_si512(lines + step / kPerLine * kLine);
    if constexpr (kBits == 8) return codes;
    const int shift = step % kPerLine * kLow;
    __m512i u = masked(shift == 0 ? codes : _mm512_srli_epi16(codes, shift), (1 << kLow) - 1);
    if constexpr (kBits == 3) {
      const __m512i high = _mm512_loadu_si512(lines + 2 * kLine);
      const __m512i moved =
          step < 2 ? _mm512_slli_epi16(high, 2 - step) : _mm512_srli_epi16(high, step - 2);
      u = _mm512_or_si512(u, masked(moved, 4));
    }
    return u;
  }
};

// Four-bit codes that index one table of levels.
struct SharedLevels {
  SharedLevels(const PackedWeight& weight, int64_t)
      : table(_mm512_xor_si512(_mm512_broadcast_i32x4(_mm_loadu_si128(
                                   reinterpret_cast<const __m128i*>(weight.levels))),
                               _mm512_set1_epi8(-128))) {}

  inline __attribute__((always_inline)) __m512i at(int step, const uint8_t* lines) const {
    return _mm512_shuffle_epi8(table, UniformCodes<4>().at(step, lines));
  }

  __m512i table;
};

// The same with a table for each output: lane l of tables[q] is that of output 4 l + q.
struct RowLevels {
  RowLevels(const PackedWeight& weight, int64_t tile) {
    for (int q = 0; q < 4; ++q) {
      alignas(64) int8_t rows[4][16];
      for (int lane = 0; lane < 4; ++lane) {
        const int8_t* row = weight.levels + (tile * kTileOutputs + 4 * lane + q) * 16;
        for (int i = 0; i < 16; ++i) rows[lane][i] = row[i];
      }
      tables[q] = _mm512_xor_si512(_mm512_load_si512(rows), _mm512_set1_epi8(-128));
    }
  }

  inline __attribute__((always_inline)) __m512i at(int step, const uint8_t* lines) const {
    const __m512i codes = UniformCodes<4>().at(step, lines);
    __m512i u = _mm512_shuffle_epi8(tables[0], codes);
    u = _mm512_mask_shuffle_epi8(u, 0x00f000f000f000f0, tables[1], codes);
    u = _mm512_mask_shuffle_epi8(u, 0x0f000f000f000f00, tables[2], codes);
    return _mm512_mask_shuffle_epi8(u, 0xf000f000f000f000, tables[3], codes);
  }

  __m512i tables[4];
};

constexpr int64_t kBlockBytes = 8 * kLine;  // of eight bits

// Blocks of a tile that are to have their u in eight bits each.
struct PanelBlocks {
  int64_t first;
  int64_t count;
  int64_t ahead;  // blocks: lines that are wanted when these have been used
};

// The form of 8-bit codes (Note [weight tiles]).
template <class Format>
void unpack_blocks(const Format& format, const PackedWeight& w, int64_t tile,
                   const PanelBlocks& blocks, uint8_t* to) {
  const uint8_t* lines = lines_of(w, tile, blocks.first);
  const int64_t bits = w.layout.bits;
  for (int64_t b = 0; b < blocks.count; ++b, lines += bits * kLine) {
    for (int64_t i = 0; i < bits; ++i)
      __builtin_prefetch(lines + (blocks.ahead * bits + i) * kLine);
#pragma GCC unroll 8
    for (int step = 0; step < 8; ++step, to += kLine)
      _mm512_store_si512(to, format.at(step, lines));
  }
}

// What D starts with: -origin * S.
inline int32_t start_of(const PackedProduct& p, int64_t g, int64_t row) {
  const uint32_t sum = static_cast<uint32_t>(p.sums[row * p.weight.layout.groups + g]);
  return static_cast<int32_t>(-static_cast<uint32_t>(p.weight.origin) * sum);
}

// What the outputs of one tile and group have in common.
struct TileOutputs {
  inline __attribute__((always_inline)) TileOutputs(const PackedProduct& p, int64_t g,
                                                    int64_t tile) {
    const PackedWeight& w = p.weight;
    const int64_t output = tile * kTileOutputs, at = g * w.stride + output;
    const int64_t left = w.outputs - output;
    there = static_cast<__mmask16>(left < kTileOutputs ? (1 << left) - 1 : 0xffff);
    scale = _mm512_loadu_ps(w.scale_of(g) + output);
    if (w.offset != nullptr) offset = _mm512_loadu_ps(w.offset + at);
    if (p.bias != nullptr) bias = _mm512_maskz_loadu_ps(there, p.bias + output);
    if (p.a_zero != nullptr) sum = _mm512_loadu_ps(w.sum + output);
    if (p.a_zero != nullptr && p.one_grid && p.rows > 0) zero = zero_of(p, 0);
    if (p.codes != nullptr) {
      code_scale = _mm512_loadu_ps(p.code_scale + output);
      code_zero_point = _mm512_loadu_ps(p.code_zero_point + output);
      if (p.code_reciprocal != nullptr) {
        reciprocal = _mm512_loadu_ps(p.code_reciprocal + output);
        reciprocal_rest = _mm512_loadu_ps(p.code_reciprocal_rest + output);
        lowest = _mm512_loadu_ps(p.code_lowest + output);
        highest = _mm512_loadu_ps(p.code_highest + output);
      }
    }
  }

  // scale * (D + offset * S), added to those of the groups before.
  inline __attribute__((always_inline)) __m512 value(const PackedProduct& p, int64_t g, int64_t row,
                                                     __m512i d, const float* before) const {
    __m512 value = _mm512_cvtepi32_ps(d);
    if (p.weight.offset != nullptr) {
      const float s = static_cast<float>(p.sums[row * p.weight.layout.groups + g]);
      value = _mm512_fmadd_ps(offset, _mm512_set1_ps(s), value);
    }
    value = value * scale;
    return g > 0 ? _mm512_loadu_ps(before) + value : value;
  }

  // scale_row.
  inline __attribute__((always_inline)) __m512 scaled(const PackedProduct& p, int64_t row,
                                                      __m512 y) const {
    if (p.a_zero != nullptr) y = y - (p.one_grid ? zero : zero_of(p, row));
    const __m512 a_scale = _mm512_set1_ps(p.a_scale[row]);
    return p.bias != nullptr ? _mm512_fmadd_ps(y, a_scale, bias) : y * a_scale;
  }

  inline __attribute__((always_inline)) __m512 zero_of(const PackedProduct& p, int64_t row) const {
    return _mm512_set1_ps(p.a_zero[row]) * sum;
  }

  // store_row, for the outputs that are there.
  inline __attribute__((always_inline)) void store(const PackedProduct& p, int64_t row,
                                                   int64_t tile, __m512 y) const {
    const int64_t at = row * p.out_stride + tile * kTileOutputs;
    if (p.residual != nullptr) y = y + _mm512_maskz_loadu_ps(there, p.residual + at);
    if (p.codes == nullptr) {
      if (p.streams) return _mm512_stream_ps(p.out + at, y);
      _mm512_mask_storeu_ps(p.out + at, there, y);
      return;
    }
    // The conversion rounds half to even.
    const __m512i codes =
        _mm512_cvtps_epi32(p.code_reciprocal != nullptr ? code(y) : divided(p, y));
    _mm512_mask_cvtepi32_storeu_epi8(p.codes + at, there, codes);
  }

  // to_code ahead of rounding; NaN becomes 0.
  inline __attribute__((always_inline)) __m512 divided(const PackedProduct& p, __m512 y) const {
    const __m512 code = _mm512_max_ps(y / code_scale + code_zero_point, _mm512_setzero_ps());
    return _mm512_min_ps(code, _mm512_set1_ps(p.max_code));
  }

  // The same as CodeByProducts has it.
  inline __attribute__((always_inline)) __m512 code(__m512 y) const {
    y = _mm512_min_ps(_mm512_max_ps(y, lowest), highest);
    const __m512 quotient = _mm512_fmadd_ps(y, reciprocal, y * reciprocal_rest);
    const __m512 remainder = _mm512_fnmadd_ps(quotient, code_scale, y);
    return _mm512_fmadd_ps(remainder, reciprocal, quotient) + code_zero_point;
  }

  __m512 scale, offset = _mm512_setzero_ps(), sum = offset, zero = offset, bias = offset;
  __m512 code_scale = offset, code_zero_point = offset;
  __m512 reciprocal = offset, reciprocal_rest = offset, lowest = offset, highest = offset;
  __mmask16 there;
};

}  // namespace
}  // namespace torchquant
