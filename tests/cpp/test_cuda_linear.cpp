// As test_cuda_kernels.cpp, for packed linear layers: every kernel against the scalar tier.
#ifndef TORCHQUANT_CUDA  // a build with CUDA has the real ones, and tests/cuda
#include <gtest/gtest.h>

#include <algorithm>
#include <csrc/kernels/linear.cu>
#include <vector>

#include "cuda_on_host/cuda_runtime.h"
#include "linear_problem.h"

namespace torchquant {

float warp_buffers[cuda_on_host::kSharedBytes / sizeof(float)];

namespace {

const std::vector<LinearCase> kCases = linear_cases(150);

int64_t segments_wanted = 0;  // 0: as the operator does

void multiply_on_cuda(const PackedProduct& all) {
  PackedProduct p = all;
  const int64_t most = std::max<int64_t>(p.weight.layout.group_blocks, 1);
  p.segments = segments_wanted == 0 ? product_segments(p) : std::min(segments_wanted, most);
  const int64_t outputs = (p.last_tile - p.first_tile) * kTileOutputs;
  const Guarded<int32_t> dots(p.segments * p.weight.layout.groups * p.rows * outputs);
  p.dots = dots.data();
  launch_packed_product(p, nullptr);
}

TEST(CudaLinear, Products) {
  for (LinearCase c : kCases) {
    c.wide = true;
    LinearProblem problem(c), reference(c);
    problem.quantize(scalar::quantize_rows), reference.quantize(scalar::quantize_rows);
    for (int64_t first_tile = 0; first_tile < c.tiles(); first_tile += 5) {
      reference.multiply(scalar::packed_product, first_tile);
      for (const int64_t segments : {0, 1, 2, 5}) {
        segments_wanted = segments;
        cuda_on_host::reversed = segments == 2;
        problem.multiply(multiply_on_cuda, first_tile);
        EXPECT_TRUE(problem.same_outputs(reference)) << segments << " segments, " << c;
      }
    }
  }
}

TEST(CudaLinear, UnpackedValues) {
  for (const LinearCase& c : kCases) {
    LinearProblem problem(c), reference(c);
    for (const UnpackType type :
         {UnpackType::float32, UnpackType::float16, UnpackType::bfloat16, UnpackType::bytes}) {
      reference.unpack(scalar::unpack_weight, type);
      problem.unpack([](const UnpackWeight& work) { launch_unpack_weight(work, nullptr); }, type);
      EXPECT_TRUE(problem.values().same_bytes(reference.values())) << c;
      EXPECT_TRUE(problem.half_values().same_bytes(reference.half_values())) << c;
      EXPECT_TRUE(problem.bytes().same_bytes(reference.bytes())) << c;
    }
  }
}

// Segments fill a GPU and never come out empty or without a block.
TEST(CudaLinear, Segments) {
  for (const int64_t rows : {1, 3, 16, 1000}) {
    for (const int64_t columns : {1, 100, 4096, 20000}) {
      PackedProduct p{};
      p.rows = rows;
      p.last_tile = 4;
      p.weight.layout = block_layout(columns, 0, 4, false);
      const int64_t segments = product_segments(p);
      EXPECT_GE(segments, 1);
      EXPECT_LE(segments, p.weight.layout.group_blocks);
    }
  }
}

}  // namespace
}  // namespace torchquant
#endif
