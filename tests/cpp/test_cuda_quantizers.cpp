// As test_cuda_kernels.cpp, for the quantizers of activations.
#ifndef TORCHQUANT_CUDA  // a build with CUDA has the real ones, and tests/cuda
#include <gtest/gtest.h>

#include <cmath>
#include <csrc/quantizers/sulq.cu>
#include <limits>
#include <random>
#include <vector>

#include "cuda_on_host/cuda_runtime.h"

namespace torchquant {

float warp_buffers[cuda_on_host::kSharedBytes / sizeof(float)];

namespace {

constexpr int64_t kCounts[] = {0, 1, 31, 1024, 2500};  // ends of a warp's share, and inside it

std::mt19937& generator() {
  static std::mt19937 engine(7);
  return engine;
}

std::vector<uint8_t> random_codes(int64_t count, int largest) {
  std::uniform_int_distribution<int> distribution(0, largest);
  std::vector<uint8_t> codes(count);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(distribution(generator()));
  return codes;
}

TEST(CudaQuantizers, SulqEncode) {
  std::vector<float> x(2500);
  for (float& value : x) value = std::ldexp(1.0f, -static_cast<int>(generator()() % 20));
  x[3] = std::numeric_limits<float>::quiet_NaN();
  x[4] = -std::numeric_limits<float>::infinity();
  for (const int64_t levels : {1, 2, 7, 20}) {
    std::vector<float> thresholds;  // some of them values of x: not below those
    for (int64_t t = 1; t < levels; ++t) thresholds.push_back(std::exp2(-20.0f + 1.5f * t));
    for (const int64_t count : kCounts) {
      const auto codes_by = [&](void (*leaf)(const SulqEncode&)) {
        std::vector<uint8_t> codes(count, 99);
        leaf({x.data(), count, thresholds.data(), levels - 1, nullptr, 0, 0, 0, 0, codes.data()});
        return codes;
      };
      EXPECT_EQ(codes_by([](const SulqEncode& encode) { launch_sulq_encode(encode, nullptr); }),
                codes_by(scalar::sulq_encode));
    }
  }
}

TEST(CudaQuantizers, SulqDecode) {
  std::vector<float> values(kSulqMaxLevels);
  for (int64_t i = 0; i < kSulqMaxLevels; ++i) values[i] = static_cast<float>(i) / 3;
  for (const int64_t count : kCounts) {
    const std::vector<uint8_t> codes = random_codes(count, 255);
    const auto decoded_by = [&](void (*leaf)(const SulqDecode&)) {
      std::vector<float> out(count, -1.0f);
      leaf({codes.data(), count, values.data(), out.data()});
      return out;
    };
    EXPECT_EQ(decoded_by([](const SulqDecode& decode) { launch_sulq_decode(decode, nullptr); }),
              decoded_by(scalar::sulq_decode));
  }
}

TEST(CudaQuantizers, SulqShiftMatmul) {
  std::vector<uint8_t> shifts(kSulqMaxLevels, kSulqNothing);
  for (uint8_t i = 1; i < 16; ++i) shifts[i] = i + 16;
  for (const int64_t columns : {1, 5, 32, 70}) {
    const int64_t batches = 3, rows = 4, inner = 9;
    const std::vector<uint8_t> codes = random_codes(batches * rows * inner, 15);
    std::vector<int16_t> v(batches * inner * columns);
    for (int16_t& value : v) value = static_cast<int16_t>(generator()());
    const auto sums_by = [&](void (*leaf)(const SulqShiftMatmul&)) {
      std::vector<int64_t> sums(batches * rows * columns, 99);
      leaf({codes.data(), shifts.data(), v.data(), batches, rows, inner, columns, false,
            sums.data()});
      return sums;
    };
    EXPECT_EQ(sums_by([](const SulqShiftMatmul& p) { launch_sulq_shift_matmul(p, nullptr); }),
              sums_by(scalar::sulq_shift_matmul));
  }
}

}  // namespace
}  // namespace torchquant
#endif
