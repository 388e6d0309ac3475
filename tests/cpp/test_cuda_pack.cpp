// As test_cuda_kernels.cpp, for the packing of codes.
#ifndef TORCHQUANT_CUDA  // a build with CUDA has the real ones, and tests/cuda
#include <gtest/gtest.h>

#include <csrc/kernels/pack.cu>
#include <random>
#include <vector>

#include "cuda_on_host/cuda_runtime.h"

namespace torchquant {

float warp_buffers[cuda_on_host::kSharedBytes / sizeof(float)];

namespace {

struct Shape {
  int64_t rows;
  int64_t columns;
};
constexpr Shape kShapes[] = {{1, 1}, {3, 7}, {2, 32}, {5, 33}, {3, 300}, {2, 2500}};  // slices too

std::vector<uint8_t> random_codes(int64_t count, int64_t bits) {
  std::mt19937 engine(static_cast<uint32_t>(7 + bits));
  std::vector<uint8_t> codes(count);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(engine() & ((1u << bits) - 1));
  return codes;
}

struct Packed {
  std::vector<uint32_t> words;
  bool misfits;
};

Packed packed_by(void (*leaf)(const PackRows&), const Shape& shape, int64_t bits,
                 const std::vector<uint8_t>& codes) {
  std::vector<uint32_t> words(shape.rows * packed_words(shape.columns, bits), 0x5a5a5a5a);
  unsigned long long misfits = 0;
  leaf({shape.rows, shape.columns, bits, codes.data(), words.data(), &misfits});
  return {words, misfits != 0};
}

std::vector<uint8_t> unpacked_by(void (*leaf)(const UnpackRows&), const Shape& shape, int64_t bits,
                                 const std::vector<uint32_t>& words) {
  std::vector<uint8_t> codes(shape.rows * shape.columns, 99);
  leaf({shape.rows, shape.columns, bits, words.data(), codes.data()});
  return codes;
}

void pack_on_cuda(const PackRows& work) { launch_pack_rows(work, nullptr); }
void unpack_on_cuda(const UnpackRows& work) { launch_unpack_rows(work, nullptr); }

TEST(CudaPack, RoundTrip) {
  for (const Shape& shape : kShapes) {
    for (int64_t bits = 1; bits <= 8; ++bits) {
      const std::vector<uint8_t> codes = random_codes(shape.rows * shape.columns, bits);
      const Packed wanted = packed_by(scalar::pack_rows, shape, bits, codes);
      const Packed got = packed_by(pack_on_cuda, shape, bits, codes);
      EXPECT_EQ(got.words, wanted.words) << bits << " bits, " << shape.columns << " columns";
      EXPECT_FALSE(got.misfits);
      EXPECT_EQ(unpacked_by(unpack_on_cuda, shape, bits, wanted.words), codes);
      EXPECT_EQ(unpacked_by(scalar::unpack_rows, shape, bits, wanted.words), codes);
    }
  }
}

TEST(CudaPack, MisfitsAreSeen) {
  const Shape shape{2, 2500};
  for (int64_t bits = 1; bits < 8; ++bits) {
    for (const int64_t place : {0, 31, 2499, 2500, 4999}) {
      std::vector<uint8_t> codes = random_codes(shape.rows * shape.columns, bits);
      codes[place] = static_cast<uint8_t>(1u << bits);
      EXPECT_TRUE(packed_by(pack_on_cuda, shape, bits, codes).misfits);
      EXPECT_TRUE(packed_by(scalar::pack_rows, shape, bits, codes).misfits);
    }
  }
}

}  // namespace
}  // namespace torchquant
#endif
