// As test_cuda_kernels.cpp, for tensor cores: integers against the scalar tier, to the last bit;
// halves against float64.
#ifndef TORCHQUANT_CUDA  // a build with CUDA has the real ones, and tests/cuda
#include <gtest/gtest.h>

#include <csrc/kernels/linear_mma.cu>
#include <csrc/kernels/linear_mma_bfloat16.cu>
#include <csrc/kernels/linear_mma_float16.cu>
#include <vector>

#include "cuda_on_host/cuda_runtime.h"
#include "linear_problem.h"

namespace torchquant {

float warp_buffers[cuda_on_host::kSharedBytes / sizeof(float)];

namespace {

MatrixProduct product_of(const PackedProduct& p) {
  MatrixProduct m{};
  m.product = p;
  m.x = {p.narrow, UnpackType::bytes};
  m.row_inputs = p.weight.layout.blocks * kBlockInputs;
  m.bias = {p.bias, UnpackType::float32};
  m.residual = {p.residual, UnpackType::float32};
  m.out = {p.out, UnpackType::float32};
  return m;
}

void multiply_integers(const PackedProduct& p) { launch_matrix_product(product_of(p), nullptr); }

TEST(CudaLinearMma, Integers) {
  for (LinearCase c : linear_cases(100, {1, 5, 8, 9, 17, 40})) {
    c.wide = false;
    LinearProblem problem(c), reference(c);
    problem.quantize(scalar::quantize_rows), reference.quantize(scalar::quantize_rows);
    for (int64_t first_tile = 0; first_tile < c.tiles(); first_tile += 5) {
      cuda_on_host::reversed = first_tile > 0;
      reference.multiply(scalar::packed_product, first_tile);
      problem.multiply(multiply_integers, first_tile);
      EXPECT_TRUE(problem.same_outputs(reference)) << c;
    }
  }
}

// However a product is cut into shares.
MatrixProduct shares_wanted;
void multiply_in_shares(const PackedProduct& p) {
  MatrixProduct m = product_of(p);
  m.tokens = shares_wanted.tokens;
  m.tiles = shares_wanted.tiles;
  m.parts = shares_wanted.parts;
  m.block_tiles = shares_wanted.block_tiles;
  launch_format<Integers, MatrixFormat<4, CodeKind::plain>>(m, nullptr);
}

TEST(CudaLinearMma, Shares) {
  for (const int64_t group_size : {0, 32, 128}) {
    const LinearCase c{
        37, 70, 600, 4, group_size, Kind::offset, Input::grid, false, Epilogue::none, true};
    LinearProblem problem(c), reference(c);
    problem.quantize(scalar::quantize_rows), reference.quantize(scalar::quantize_rows);
    reference.multiply(scalar::packed_product);
    for (const auto& [tokens, tiles] : {std::pair{1, 1}, {2, 1}, {4, 1}, {1, 2}, {4, 2}}) {
      for (const int parts : {1, 4, 8}) {
        for (const int block_tiles : {1, 2}) {
          shares_wanted.tokens = tokens;
          shares_wanted.tiles = tiles;
          shares_wanted.parts = parts;
          shares_wanted.block_tiles = block_tiles;
          cuda_on_host::reversed = block_tiles == 2;
          const bool turns = group_size > 0 && parts > 1;
          if (parts * block_tiles > kMostWarps || (turns && parts < tokens * tiles)) continue;
          problem.multiply(multiply_in_shares);
          EXPECT_TRUE(problem.same_outputs(reference))
              << tokens << " tokens, " << tiles << " tiles, " << parts << " parts, " << block_tiles
              << " in a block, " << c;
        }
      }
    }
  }
}

// Sums of codes times halves that are small integers: exact, whatever their order.
template <class T>
void expect_exact_sums(const LinearCase& c, UnpackType type) {
  const LinearProblem problem(c);
  PackedWeight w = problem.weight();
  const std::vector<float> ones(w.layout.groups * w.stride, 1.0f),
      halves(w.layout.groups * w.stride, 0.5f);
  w.scale = ones.data();
  w.offset = c.kind == Kind::offset ? halves.data() : nullptr;
  const int64_t inputs = w.layout.blocks * kBlockInputs;
  Guarded<uint16_t> x(c.rows * inputs);
  std::vector<float> values(c.rows * inputs), weights(c.outputs * c.columns);
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t g = 0; g < w.layout.groups; ++g) {
      for (int64_t k = 0; k < w.layout.group_columns(g); ++k) {
        const int64_t at = row * inputs + g * w.layout.group_blocks * kBlockInputs + k;
        values[at] = static_cast<float>((row * 7 + g * 3 + k * 5) % 9 - 4);
      }
    }
  }
  for (size_t i = 0; i < values.size(); ++i) x[i] = static_cast<uint16_t>(T::pair(values[i], 0.0f));
  scalar::unpack_weight({w, 0, c.tiles(), UnpackType::float32, weights.data()});
  Guarded<float> out(c.rows * c.outputs);
  MatrixProduct m{};
  m.product.weight = w;
  m.product.last_tile = c.tiles();
  m.product.rows = c.rows;
  m.x = {x.data(), type};
  m.row_inputs = inputs;
  m.out = {out.data(), UnpackType::float32};
  launch_matrix_product(m, nullptr);
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t n = 0; n < c.outputs; ++n) {
      double sum = 0;
      for (int64_t g = 0; g < w.layout.groups; ++g) {
        for (int64_t k = 0; k < w.layout.group_columns(g); ++k)
          sum += static_cast<double>(weights[n * c.columns + g * w.layout.group_size + k]) *
                 values[row * inputs + g * w.layout.group_blocks * kBlockInputs + k];
      }
      ASSERT_EQ(out[row * c.outputs + n], static_cast<float>(sum)) << row << ", " << n << ", " << c;
    }
  }
}

TEST(CudaLinearMma, Halves) {
  for (LinearCase c : linear_cases(60, {1, 3, 8, 9, 16, 33})) {
    if (c.kind == Kind::offset && c.bits > 4) c.bits = 4;  // bfloat16 has no 8 bits and a half
    expect_exact_sums<Float16>(c, UnpackType::float16);
    expect_exact_sums<BFloat16>(c, UnpackType::bfloat16);
  }
}

}  // namespace
}  // namespace torchquant
#endif
