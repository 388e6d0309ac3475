#include <csrc/kernels/linear_tile.h>

#if defined(__AVX512BW__)
#include <xmmintrin.h>
#elif defined(__AVX2__)
#include <csrc/kernels/linear_avx2.h>
#endif

namespace torchquant::avx2 {
void packed_product(const PackedProduct& p);  // what the avx512 tier runs on a CPU without VNNI
}
namespace torchquant::avx512 {             // in files of their own, as they compile for long
bool amx_product(const PackedProduct& p);  // false where it does not serve
void vnni_product_of_bytes(const PackedProduct& p);
void vnni_product_of_words(const PackedProduct& p);
}  // namespace torchquant::avx512

namespace torchquant::TORCHQUANT_TIER {
namespace {

#if !defined(__AVX2__)
// D of one row, tile and group.
void sum_group(const PackedProduct& p, int64_t tile, int64_t g, int64_t row, int32_t* d) {
  const PackedWeight& w = p.weight;
  const int64_t depth = w.layout.blocks * kBlockInputs;
  for (int64_t o = 0; o < kTileOutputs; ++o) d[o] = 0;
  for (int64_t b = 0; b < w.layout.blocks_of_group(g); ++b) {
    const int64_t block = g * w.layout.group_blocks + b;
    const uint8_t* lines = w.packed + (tile * w.layout.blocks + block) * w.layout.bits * kLine;
    Multiplier by[kTileOutputs];
    for (int64_t o = 0; o < kTileOutputs; ++o) {
      by[o] = w.multipliers.values == nullptr ? Multiplier{1, w.origin}
                                              : multiplier_of(w, block, tile * kTileOutputs + o);
    }
    for (int64_t step = 0; step < 8; ++step) {
      for (int64_t i = 0; i < kLine; ++i) {
        constexpr int64_t kWideOrder[4] = {0, 2, 1, 3};
        const int64_t at = row * depth + block * kBlockInputs + step * 4;
        const int32_t a = p.wide != nullptr ? p.wide[at + kWideOrder[i % 4]] : p.narrow[at + i % 4];
        const uint8_t code = code_in_block(lines, w.layout.bits, step, i);
        d[i / 4] += (entry_of(w, tile, i / 4, code) - by[i / 4].zero) * by[i / 4].value * a;
      }
    }
  }
}

void run_scalar(const PackedProduct& p) {
  for (int64_t tile = p.first_tile; tile < p.last_tile; ++tile) {
    for (int64_t row = 0; row < p.rows; ++row) {
      int32_t d[kTileOutputs];
      float values[kTileOutputs];
      for (int64_t g = 0; g < p.weight.layout.groups; ++g) {
        sum_group(p, tile, g, row, d);
        add_group(p, g, row, tile * kTileOutputs, d, values);
      }
      finish_tile(p, tile, row, 1, values);
    }
  }
}
#endif

}  // namespace

void packed_product(const PackedProduct& p) {
#if defined(__AVX512BW__)
  if (p.tier == CpuTier::avx512) return avx2::packed_product(p);
  if (p.tier != CpuTier::avx512_amx || !amx_product(p))
    p.wide != nullptr ? vnni_product_of_words(p) : vnni_product_of_bytes(p);
  if (p.streams) _mm_sfence();  // ahead of whatever tells other threads that the outputs are there
#elif defined(__AVX2__)
  run_avx2(p);
#else
  run_scalar(p);
#endif
}

}  // namespace torchquant::TORCHQUANT_TIER
