// As test_cuda_kernels.cpp, for the integer activations of packed linear layers.
#ifndef TORCHQUANT_CUDA  // a build with CUDA has the real ones, and tests/cuda
#include <gtest/gtest.h>

#include <cmath>
#include <csrc/kernels/quantize_rows.cu>
#include <limits>
#include <vector>

#include "cuda_on_host/cuda_runtime.h"
#include "linear_problem.h"

namespace torchquant {

float warp_buffers[cuda_on_host::kSharedBytes / sizeof(float)];

namespace {

void quantize_on_cuda(const QuantizeRows& all) {
  QuantizeRows q = all;
  if (q.scale != 0.0f) {  // scale and zero point lie on the device
    q.scale_at = &all.scale;
    q.zero_point_at = &all.zero_point;
    q.scale = 0.0f;
  }
  for (int64_t i = 0; i < q.rows; ++i) q.largest[i] = 0;
  for (int64_t i = 0; i < q.rows * q.layout.groups; ++i) q.sums[i] = 0;
  launch_quantize_rows(q, nullptr);
}

TEST(CudaQuantizeRows, SameIntegers) {
  for (const LinearCase& c : linear_cases(600)) {
    LinearProblem problem(c), reference(c);
    problem.quantize(quantize_on_cuda);
    reference.quantize(scalar::quantize_rows);
    EXPECT_EQ(problem.integers(), reference.integers()) << c;
  }
}

TEST(CudaQuantizeRows, TinyRowsCountAsZero) {
  const LinearCase c{2, 5, 37, 4, 0, Kind::uniform, Input::dynamic, true, Epilogue::none, false};
  LinearProblem problem(c), reference(c);
  for (LinearProblem* p : {&problem, &reference}) {
    for (int64_t i = 0; i < 37; ++i) p->x()[i] *= 1e-42f;
  }
  problem.quantize(quantize_on_cuda);
  reference.quantize(scalar::quantize_rows);
  EXPECT_EQ(problem.integers(), reference.integers());
}

TEST(CudaQuantizeRows, RowsThatAreNotFiniteGetNoScale) {
  const LinearCase c{3, 5, 37, 4, 24, Kind::uniform, Input::dynamic, false, Epilogue::none, false};
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    LinearProblem problem(c);
    problem.x()[37 + 36] = bad;
    problem.quantize(quantize_on_cuda);
    const std::vector<float> scales = problem.integers().a_scale;
    EXPECT_TRUE(scales[0] > 0 && std::isnan(scales[1]) && scales[2] > 0);
  }
}

}  // namespace
}  // namespace torchquant
#endif
