// As test_cuda_kernels.cpp, for subset quantization.
#ifndef TORCHQUANT_CUDA  // a build with CUDA has the real ones, and tests/cuda
#include <gtest/gtest.h>

#include <algorithm>
#include <csrc/quantizers/subset.cu>
#include <random>
#include <vector>

#include "cuda_on_host/cuda_runtime.h"

namespace torchquant {

float warp_buffers[cuda_on_host::kSharedBytes / sizeof(float)];

namespace {

constexpr int64_t kCounts[] = {0, 1, 31, 1024, 2500};  // ends of a warp's share, and inside it
constexpr SubsetChannels kLayouts[] = {{1, 1}, {1, 3}, {7, 3}, {40, 2}};

std::mt19937& generator() {
  static std::mt19937 engine(7);
  return engine;
}

// Multiples of 1/64, so that some x lie on a midpoint.
std::vector<float> random_values(int64_t count) {
  std::uniform_int_distribution<int> distribution(-80, 80);
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(distribution(generator())) / 64;
  return values;
}

TEST(CudaSubset, Encode) {
  const std::vector<float> x = random_values(2500);
  for (const SubsetChannels& layout : kLayouts) {
    for (const int64_t count : {1, 2, 16, 33}) {
      std::vector<float> levels = random_values(layout.channels * count), thresholds;
      for (int64_t c = 0; c < layout.channels; ++c) {
        std::sort(levels.begin() + c * count, levels.begin() + (c + 1) * count);
        for (int64_t i = c * count; i + 1 < (c + 1) * count; ++i)
          thresholds.push_back(threshold_between(levels[i], levels[i + 1]));
      }
      for (const int64_t elements : kCounts) {
        const auto codes_by = [&](void (*leaf)(const SubsetEncode&)) {
          std::vector<uint8_t> codes(elements, 99);
          leaf({x.data(), 0, elements, layout, levels.data(), count, thresholds.data(), nullptr,
                codes.data()});
          return codes;
        };
        EXPECT_EQ(codes_by([](const SubsetEncode& e) { launch_subset_encode(e, nullptr); }),
                  codes_by(scalar::subset_encode));
      }
    }
  }
}

TEST(CudaSubset, Decode) {
  std::vector<uint8_t> codes(2500);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(generator()());
  for (const SubsetChannels& layout : kLayouts) {
    const std::vector<float> values = random_values(layout.channels * kSubsetMaxLevels);
    for (const int64_t elements : kCounts) {
      const auto decoded_by = [&](void (*leaf)(const SubsetDecode&)) {
        std::vector<float> out(elements, -9.0f);
        leaf({codes.data(), 0, elements, layout, values.data(), out.data()});
        return out;
      };
      EXPECT_EQ(decoded_by([](const SubsetDecode& d) { launch_subset_decode(d, nullptr); }),
                decoded_by(scalar::subset_decode));
    }
  }
}

}  // namespace
}  // namespace torchquant
#endif
