// The CUDA kernels' own source, run on the host (cuda_on_host/cuda_runtime.h), against the CPU
// leaves: equal to the last bit.
#ifndef TORCHQUANT_CUDA  // a build with CUDA has the real ones, and tests/cuda/test_cuda.py
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <csrc/core/grid.cu>
#include <csrc/solvers/comq.cu>
#include <csrc/solvers/flips.cu>
#include <csrc/solvers/gptq.cu>
#include <csrc/solvers/magr.cu>
#include <csrc/solvers/rtn.cu>
#include <numeric>
#include <random>
#include <utility>

#include "cuda_on_host/cuda_runtime.h"

namespace torchquant {

float warp_buffers[cuda_on_host::kSharedBytes / sizeof(float)];

namespace {

using Floats = std::vector<float>;

std::mt19937& generator() {
  static std::mt19937 engine(7);
  return engine;
}

Floats normal(int64_t count, float deviation = 1.0f) {
  std::normal_distribution<float> distribution(0.0f, deviation);
  Floats values(count);
  for (float& x : values) x = distribution(generator());
  return values;
}

// X^T X for random X: a Gram with every eigenvalue of its own.
Floats gram_of(int64_t columns) {
  const int64_t tokens = 2 * columns + 1;
  const Floats x = normal(tokens * columns);
  Floats gram(columns * columns);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < columns; ++i) {
      for (int64_t j = 0; j < columns; ++j)
        gram[i * columns + j] += x[t * columns + i] * x[t * columns + j] / tokens;
    }
  }
  return gram;
}

std::vector<int32_t> random_orders(int64_t rows, int64_t columns) {
  std::vector<int32_t> orders(rows * columns);
  for (int64_t row = 0; row < rows; ++row) {
    const auto begin = orders.begin() + row * columns;
    std::iota(begin, begin + columns, 0);
    std::shuffle(begin, begin + columns, generator());
  }
  return orders;
}

// One problem with every kind of trouble: dead channels, one scale a column, a constant row.
struct Problem {
  int64_t rows, columns;
  bool per_column;
  Floats weight, gradient, gram, inverse, scale, zero_point;
  std::vector<int32_t> order;

  Problem(int64_t rows, int64_t columns, bool per_column)
      : rows(rows),
        columns(columns),
        per_column(per_column),
        weight(normal(rows * columns)),
        gradient(normal(rows * columns, 0.3f)),
        gram(gram_of(columns)),
        inverse(columns),
        scale(normal(rows * columns, 0.05f)),
        zero_point(rows * columns, 3.0f),
        order(random_orders(rows, columns)) {
    for (int64_t j = 0; j < columns; ++j)
      inverse[j] = j % 7 == 3 ? 0.0f : 1.0f / gram[j * columns + j];
    for (float& s : scale) s = 0.3f + std::fabs(s);
    std::fill_n(weight.begin(), columns, 0.5f);
  }

  RowGrids grids() const {
    return {scale.data(), zero_point.data(), per_column ? columns : 1, per_column ? 1 : 0, 7.0f};
  }
};

struct Outcome {
  std::vector<uint8_t> codes;
  Floats change;
  int64_t changed = 0;
  bool operator==(const Outcome& other) const = default;
};

// Runs solve with the lanes in both orders and expects what the CPU leaf finds.
template <class Result, class Solve>
void expect_equal_to(const Result& wanted, const Solve& solve) {
  for (const bool reversed : {false, true}) {
    cuda_on_host::reversed = reversed;
    EXPECT_EQ(solve(), wanted) << "lanes reversed: " << reversed;
  }
}

template <class Check>
void for_each_problem(int64_t largest, const Check& check) {
  const std::pair<int64_t, int64_t> shapes[] = {{1, 1},  {6, 1},   {1, 33},  {5, 33}, {5, 64},
                                                {2, 70}, {3, 127}, {5, 128}, {3, 200}};
  for (const auto& [rows, columns] : shapes) {
    if (columns > largest) continue;
    for (const bool per_column : {false, true}) {
      SCOPED_TRACE("rows " + std::to_string(rows) + " columns " + std::to_string(columns));
      check(Problem(rows, columns, per_column));
    }
  }
}

Outcome comq_block_on(const Problem& p, bool ordered, void (*leaf)(const ComqBlock&)) {
  Outcome out{std::vector<uint8_t>(p.weight.size(), 99), Floats(p.weight.size(), 99.0f)};
  const int64_t first_column = 7;
  std::vector<int32_t> order = p.order;
  for (int32_t& column : order) column += first_column;
  leaf({p.rows, p.columns, p.weight.data(), p.gradient.data(), p.columns, p.gram.data(), p.columns,
        p.inverse.data(), ordered ? order.data() : nullptr, first_column, p.grids(),
        out.codes.data(), out.change.data()});
  return out;
}

TEST(CudaKernels, ComqBlock) {
  for_each_problem(kComqMaxBlock, [](const Problem& p) {
    for (const bool ordered : {false, true}) {
      expect_equal_to(comq_block_on(p, ordered, scalar::comq_block), [&] {
        return comq_block_on(p, ordered,
                             [](const ComqBlock& block) { launch_comq_block(block, nullptr); });
      });
    }
  });
}

Outcome comq_greedy_on(const Problem& p, void (*leaf)(const ComqGreedy&)) {
  Outcome out{std::vector<uint8_t>(p.weight.size(), 99), Floats(p.weight.size(), 99.0f)};
  leaf({p.rows, p.columns, p.weight.data(), p.gradient.data(), p.gram.data(), p.inverse.data(),
        p.order.data(), p.grids(), out.codes.data(), out.change.data()});
  return out;
}

TEST(CudaKernels, ComqGreedy) {
  for_each_problem(200, [](const Problem& p) {
    expect_equal_to(comq_greedy_on(p, scalar::comq_greedy), [&] {
      return comq_greedy_on(p, [](const ComqGreedy& all) { launch_comq_greedy(all, nullptr); });
    });
  });
}

Outcome comq_sweep_on(const Problem& p, bool ordered, void (*leaf)(const ComqSweep&)) {
  Outcome out{std::vector<uint8_t>(p.weight.size()), p.gradient};
  for (size_t i = 0; i < out.codes.size(); ++i) out.codes[i] = i % 8;
  leaf({p.rows, p.columns, p.gram.data(), p.inverse.data(), ordered ? p.order.data() : nullptr,
        p.grids(), out.codes.data(), out.change.data(), &out.changed});
  return out;
}

TEST(CudaKernels, ComqSweep) {
  for_each_problem(200, [](const Problem& p) {
    for (const bool ordered : {false, true}) {
      const Outcome wanted = comq_sweep_on(p, ordered, scalar::comq_sweep);
      EXPECT_TRUE(wanted.changed > 0 || p.columns == 1);
      expect_equal_to(wanted, [&] {
        return comq_sweep_on(p, ordered,
                             [](const ComqSweep& sweep) { launch_comq_sweep(sweep, nullptr); });
      });
    }
  });
}

struct Flips {
  Floats gradient, step;
  std::vector<int64_t> flips;
  bool operator==(const Flips& other) const = default;
};

Flips flips_on(const Problem& p, bool best, int64_t steps, void (*leaf)(const FlipRows&)) {
  Flips out{p.gradient, p.scale, std::vector<int64_t>(p.rows, 5)};
  for (size_t i = 0; i < out.step.size(); ++i) out.step[i] *= static_cast<float>(i % 3) - 1.0f;
  Floats diagonal(p.columns);
  for (int64_t j = 0; j < p.columns; ++j) diagonal[j] = p.gram[j * p.columns + j];
  leaf({p.rows, p.columns, p.gram.data(), p.columns, diagonal.data(), steps, best,
        out.gradient.data(), out.step.data(), out.flips.data()});
  return out;
}

TEST(CudaKernels, FlipRows) {
  for_each_problem(200, [](const Problem& p) {
    for (const auto& [best, steps] : {std::pair{true, 100}, {true, 2}, {false, 100}}) {
      const Flips wanted = flips_on(p, best, steps, scalar::flip_rows);
      EXPECT_TRUE(wanted.flips[0] > 5 || p.columns < 33);
      expect_equal_to(wanted, [&] {
        return flips_on(p, best, steps,
                        [](const FlipRows& all) { launch_flip_rows(all, nullptr); });
      });
    }
  });
}

struct Grids {
  Floats scale, zero_point;
  std::vector<uint8_t> codes;
  bool operator==(const Grids& other) const = default;
};

template <class Fit, class Encode>
Grids grids_of(const Problem& p, int64_t group_size, GridType type, const Fit& fit,
               const Encode& encode) {
  const int64_t groups = (p.columns + group_size - 1) / group_size;
  Grids out{Floats(p.rows * groups), Floats(p.rows * groups),
            std::vector<uint8_t>(p.weight.size())};
  const GridRows rows{
      p.weight.data(),       p.rows,          p.columns, group_size, type, 7.0f, out.scale.data(),
      out.zero_point.data(), out.codes.data()};
  fit(rows);
  encode(rows);
  return out;
}

TEST(CudaKernels, FitGridAndEncode) {
  for_each_problem(200, [](const Problem& p) {
    for (const int64_t group_size : {int64_t{3}, int64_t{40}, p.columns}) {
      for (const GridType type : {GridType::asymmetric, GridType::symmetric, GridType::midrise}) {
        const Grids wanted =
            grids_of(p, group_size, type, scalar::fit_grid_rows, scalar::encode_rows);
        const Grids got = grids_of(
            p, group_size, type, [](const GridRows& rows) { launch_fit_grid_rows(rows, nullptr); },
            [](const GridRows& rows) { launch_encode_rows(rows, nullptr); });
        EXPECT_EQ(got, wanted) << "group_size " << group_size;
      }
    }
  });
}

__global__ void diverging_kernel(const int lanes) {
  if (warp_lane() < lanes) __syncwarp();
}

TEST(CudaOnHost, LanesThatMissEachOtherAreFound) {
  EXPECT_NO_THROW(launch_rows("all", diverging_kernel, kWarpSize, 1, nullptr));
  EXPECT_THROW(launch_rows("some", diverging_kernel, kWarpSize - 1, 1, nullptr), std::logic_error);
  EXPECT_THROW(launch_rows("too much", diverging_kernel, 0, 1, nullptr, kMaxSharedBytes + 4),
               std::runtime_error);
}

TEST(CudaKernels, AnyGridSizeCoversEveryGroup) {
  const Problem p(9, 50, false);
  const auto by_one_warp = [](const GridRows& rows) {
    cudaLaunchConfig_t config;
    config.blockDim = dim3(cuda_on_host::kLanes);
    ASSERT_EQ(cudaLaunchKernelEx(&config, fit_grid_kernel, rows), cudaSuccess);
    ASSERT_EQ(cudaLaunchKernelEx(&config, encode_kernel, rows), cudaSuccess);
  };
  const Grids wanted =
      grids_of(p, 16, GridType::asymmetric, scalar::fit_grid_rows, scalar::encode_rows);
  EXPECT_EQ(grids_of(p, 16, GridType::asymmetric, by_one_warp, [](const GridRows&) {}), wanted);
}

TEST(CudaKernels, RtnShrink) {
  for_each_problem(200, [](const Problem& p) {
    for (const Floats& factors :
         {Floats{0.8f}, Floats{1.0f, 0.9f, 0.8f, 0.65f, 0.5f}, Floats{0.5f, 1.0f}}) {
      for (const int64_t group_size : {int64_t{15}, int64_t{17}, p.columns}) {
        const auto search = [&](void (*leaf)(const RtnShrink&)) {
          return grids_of(p, group_size, GridType::asymmetric, scalar::fit_grid_rows,
                          [&](const GridRows& rows) {
                            leaf({rows, factors.data(), static_cast<int64_t>(factors.size())});
                          });
        };
        EXPECT_EQ(search([](const RtnShrink& s) { launch_rtn_shrink(s, nullptr); }),
                  search(scalar::rtn_shrink));
      }
    }
  });
}

struct GptqOutcome {
  std::vector<uint8_t> codes;
  Floats error, objective;
  bool operator==(const GptqOutcome& other) const = default;
};

TEST(CudaKernels, GptqBlock) {
  for_each_problem(kGptqMaxBlock, [](const Problem& p) {
    Floats upper = p.gram;  // any upper triangle with a positive diagonal will do
    for (int64_t i = 0; i < p.columns; ++i) std::fill_n(upper.begin() + i * p.columns, i, 0.0f);
    const auto solve = [&](void (*leaf)(const GptqBlock&)) {
      GptqOutcome out{std::vector<uint8_t>(p.weight.size(), 99), Floats(p.weight.size(), 99.0f),
                      Floats(p.rows, 2.0f)};
      const RowGrids grids = p.grids();
      leaf({p.rows, p.columns, p.weight.data(), p.columns, upper.data(), p.columns, grids.scale,
            grids.zero_point, grids.row_stride, grids.column_stride, grids.max_code,
            out.codes.data(), out.error.data(), out.objective.data()});
      return out;
    };
    expect_equal_to(solve(scalar::gptq_block), [&] {
      return solve([](const GptqBlock& block) { launch_gptq_block(block, nullptr); });
    });
  });
}

struct MagrOutcome {
  Floats point, offset, value, dual, clamp, inertia;
  std::vector<int32_t> changed;
  bool operator==(const MagrOutcome& other) const = default;
};

MagrOutcome magr_on(const Problem& p, MagrSolver solver, int64_t group_size, int iterations,
                    void (*leaf)(const MagrRows&)) {
  const int64_t groups = (p.columns + group_size - 1) / group_size;
  const size_t count = p.weight.size();
  Floats threshold(p.rows, 0.4f * group_size);
  threshold[0] = p.rows > 1 ? 0.0f : threshold[0];
  MagrOutcome out{p.weight,
                  Floats(count),
                  p.weight,
                  Floats(count),
                  Floats(p.rows * groups),
                  Floats(p.rows, 1.0f),
                  {}};
  out.changed.assign(p.rows, 9);
  for (int i = 0; i < iterations; ++i) {
    for (size_t k = 0; k < count && i > 0; ++k)
      out.point[k] += 0.1f * p.gradient[k] - 0.05f * out.offset[k];
    leaf({solver, p.rows, p.columns, group_size, p.weight.data(), threshold.data(),
          out.point.data(), out.offset.data(), out.value.data(), out.dual.data(), out.clamp.data(),
          out.inertia.data(), out.changed.data()});
  }
  return out;
}

TEST(CudaKernels, MagrRows) {
  for_each_problem(200, [](const Problem& p) {
    if (p.per_column) return;  // MagR has no grid
    for (const MagrSolver solver : {MagrSolver::ista, MagrSolver::fista, MagrSolver::admm}) {
      for (const int64_t group_size : {int64_t{40}, p.columns}) {
        expect_equal_to(magr_on(p, solver, group_size, 3, scalar::magr_rows), [&] {
          return magr_on(p, solver, group_size, 3,
                         [](const MagrRows& rows) { launch_magr_rows(rows, nullptr); });
        });
      }
    }
  });
}

}  // namespace
}  // namespace torchquant
#endif
