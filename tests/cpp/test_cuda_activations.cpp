// As test_cuda_kernels.cpp, for the histograms and the uniform quantizers of activations.
#ifndef TORCHQUANT_CUDA  // a build with CUDA has the real ones, and tests/cuda
#include <gtest/gtest.h>

#include <cmath>
#include <csrc/quantizers/uniform.cu>
#include <csrc/statistics/histogram.cu>
#include <random>
#include <vector>

#include "cuda_on_host/cuda_runtime.h"

namespace torchquant {

float warp_buffers[cuda_on_host::kSharedBytes / sizeof(float)];

bool operator==(const HistogramWords& a, const HistogramWords& b) {
  return a.count_and_low == b.count_and_low && a.low_squares == b.low_squares;
}

namespace {

using Floats = std::vector<float>;

Floats activations(int64_t count) {
  std::mt19937 engine(7);
  std::normal_distribution<float> normal;
  Floats values(count);
  for (float& x : values) x = normal(engine) * std::exp(2 * normal(engine));
  return values;
}

std::vector<HistogramWords> table_of(const Floats& values, int32_t mantissa,
                                     void (*leaf)(const HistogramCount&)) {
  std::vector<HistogramWords> table(kFloatBinsBase << mantissa);
  leaf({values.data(), static_cast<int64_t>(values.size()), mantissa, table.data()});
  return table;
}

TEST(CudaActivations, HistogramCount) {
  for (const int64_t count : {0, 1, 31, 1024, 1025, 5000}) {
    Floats values = activations(count);
    if (count > 2) values[0] = 0.0f, values[1] = -0.0f, values[2] = -1e-42f;
    for (const int32_t mantissa : {0, 5, 7}) {
      const auto got = table_of(values, mantissa, [](const HistogramCount& work) {
        launch_histogram_count(work, nullptr);
      });
      EXPECT_EQ(got, table_of(values, mantissa, scalar::histogram_count)) << count;
    }
  }
}

TEST(CudaActivations, HistogramMerge) {
  const int32_t mantissa = 3;
  const int64_t bins = kFloatBinsBase << mantissa, tables = 3;
  std::vector<HistogramWords> words;
  for (const int64_t count : {100, 5000, 3000}) {
    const auto table = table_of(activations(count), mantissa, scalar::histogram_count);
    words.insert(words.end(), table.begin(), table.end());
  }
  const auto merged = [&](void (*leaf)(const HistogramMerge&)) {
    std::vector<double> histogram(3 * bins, 0.5);
    leaf({words.data(), tables, mantissa, 0, 70, histogram.data()});
    leaf({words.data(), tables, mantissa, 70, bins - 70, histogram.data()});
    return histogram;
  };
  const auto wanted = merged(scalar::histogram_merge);
  EXPECT_EQ(merged([](const HistogramMerge& merge) { launch_histogram_merge(merge, nullptr); }),
            wanted);
  double count = -0.5 * bins;
  for (int64_t bin = 0; bin < bins; ++bin) count += wanted[bin];
  EXPECT_EQ(count, 8100);
}

TEST(CudaActivations, Uniform) {
  const int64_t shapes[][2] = {{1, 1}, {3, 31}, {5, 64}, {2, 1024}, {3, 2500}};
  for (const auto& [rows, columns] : shapes) {
    const Floats x = activations(rows * columns);
    for (const int64_t group_size : {int64_t{1}, int64_t{7}, columns}) {
      const int64_t groups = (columns + group_size - 1) / group_size;
      for (const int64_t row_stride : {int64_t{0}, groups}) {
        Floats scale = activations(rows * groups), zero_point(rows * groups);
        for (size_t g = 0; g < scale.size(); ++g) {
          scale[g] = std::fabs(scale[g]) + 0.1f;
          zero_point[g] = static_cast<float>(g % 16) / 2;
        }
        const UniformGrids grids{rows,       columns,      group_size,
                                 row_stride, scale.data(), zero_point.data()};
        std::vector<uint8_t> codes(x.size(), 99), wanted(x.size(), 77);
        launch_uniform_encode({grids, 15.0f, x.data(), codes.data()}, nullptr);
        scalar::uniform_encode({grids, 15.0f, x.data(), wanted.data()});
        EXPECT_EQ(codes, wanted) << rows << " x " << columns << ", groups of " << group_size;
        Floats values(x.size(), 1.0f), wanted_values(x.size(), 2.0f);
        launch_uniform_decode({grids, codes.data(), values.data()}, nullptr);
        scalar::uniform_decode({grids, codes.data(), wanted_values.data()});
        EXPECT_EQ(values, wanted_values) << rows << " x " << columns;
      }
    }
  }
}

}  // namespace
}  // namespace torchquant
#endif
