// core/quant_math.h: ties, clamps, and the grid of every kind of range.
#include <csrc/core/quant_math.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

namespace torchquant {
namespace {

constexpr float kTiny = 1e-44f;  // subnormal
constexpr GridType kGrids[] = {GridType::asymmetric, GridType::symmetric, GridType::midrise};

float nearest_value(const Grid& grid, float value, float max_code) {
  return to_value(to_code(value, grid.scale, grid.zero_point, max_code), grid.scale,
                  grid.zero_point);
}

// Calls check(grid type, bits, max_code) for every grid and every width.
template <class Check>
void for_every_grid(const Check& check) {
  for (const GridType type : kGrids) {
    for (int64_t bits = 2; bits <= 8; ++bits) {
      SCOPED_TRACE(testing::Message() << "grid " << static_cast<int>(type) << ", bits " << bits);
      check(type, bits, max_code_of(bits));
    }
  }
}

TEST(RoundToInteger, TiesGoToEven) {
  EXPECT_EQ(round_to_integer(0.5f), 0.0f);
  EXPECT_EQ(round_to_integer(1.5f), 2.0f);
  EXPECT_EQ(round_to_integer(2.5f), 2.0f);
  EXPECT_EQ(round_to_integer(-0.5f), 0.0f);
  EXPECT_EQ(round_to_integer(-1.5f), -2.0f);
  EXPECT_EQ(round_to_integer(-2.5f), -2.0f);
}

TEST(RoundToInteger, EqualsTheStandardRoundingUpTo2To22) {
  for (int64_t quarter = -4 * 70000; quarter <= 4 * 70000; ++quarter) {
    const float x = static_cast<float>(quarter) / 4.0f;
    ASSERT_EQ(round_to_integer(x), std::nearbyint(x)) << x;
  }
  std::mt19937 engine(0);
  std::uniform_real_distribution<float> uniform(-4194304.0f, 4194304.0f);
  for (int i = 0; i < 200000; ++i) {
    const float x = uniform(engine);
    ASSERT_EQ(round_to_integer(x), std::nearbyint(x)) << x;
  }
}

TEST(RoundToInteger, JustUnderAndOverATie) {
  EXPECT_EQ(round_to_integer(std::nextafter(2.5f, 0.0f)), 2.0f);
  EXPECT_EQ(round_to_integer(std::nextafter(2.5f, 3.0f)), 3.0f);
  EXPECT_EQ(round_to_integer(std::nextafter(0.5f, 1.0f)), 1.0f);
}

TEST(ToCode, ClampsToTheCodesThatExist) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (int64_t bits = 2; bits <= 8; ++bits) {
    const float top = max_code_of(bits);
    EXPECT_EQ(to_code(1e30f, 0.1f, 3.0f, top), top);
    EXPECT_EQ(to_code(-1e30f, 0.1f, 3.0f, top), 0.0f);
    EXPECT_EQ(to_code(infinity, 0.1f, 3.0f, top), top);
    EXPECT_EQ(to_code(-infinity, 0.1f, 3.0f, top), 0.0f);
    EXPECT_EQ(to_code(top + 0.49f, 1.0f, 0.0f, top), top);
    EXPECT_EQ(to_code(-0.49f, 1.0f, 0.0f, top), 0.0f);
  }
}

TEST(ToCode, TiesGoToTheEvenCode) {
  EXPECT_EQ(to_code(0.5f, 1.0f, 4.0f, 15.0f), 4.0f);
  EXPECT_EQ(to_code(1.5f, 1.0f, 4.0f, 15.0f), 6.0f);
  EXPECT_EQ(to_code(-0.5f, 1.0f, 4.0f, 15.0f), 4.0f);
  EXPECT_EQ(to_code(0.0f, 1.0f, 7.5f, 15.0f), 8.0f);  // a midrise grid has no zero level
  EXPECT_EQ(to_code(0.0f, 1.0f, 1.5f, 3.0f), 2.0f);
}

TEST(MaxCode, IsTwoToTheBitsMinusOne) {
  EXPECT_EQ(max_code_of(2), 3.0f);
  EXPECT_EQ(max_code_of(3), 7.0f);
  EXPECT_EQ(max_code_of(8), 255.0f);
}

// code -> value -> code is the identity, whatever the scale and however far away the zero point is.
TEST(Codes, ComeBackFromTheirValues) {
  std::mt19937 engine(1);
  std::uniform_real_distribution<float> exponent(-120.0f, 100.0f);
  std::uniform_real_distribution<float> mantissa(1.0f, 2.0f);
  for (int64_t bits = 2; bits <= 8; ++bits) {
    const float top = max_code_of(bits);
    const std::vector<float> zero_points = {0.0f,   1.0f,    top,     (top + 1) / 2, top / 2,
                                            -37.0f, 1000.0f, -1.0e5f, 1048575.0f,    -1048575.0f};
    for (int trial = 0; trial < 100; ++trial) {
      const float scale = std::ldexp(mantissa(engine), static_cast<int>(exponent(engine)));
      for (const float zero_point : zero_points) {
        for (float code = 0; code <= top; ++code) {
          const float value = to_value(code, scale, zero_point);
          ASSERT_EQ(to_code(value, scale, zero_point, top), code) << scale << " " << zero_point;
        }
      }
    }
  }
}

TEST(FitGrid, KeepsTheInvariantsOfItsType) {
  for_every_grid([](GridType type, int64_t, float top) {
    const Grid grid = fit_grid(type, -0.7f, 1.1f, top);
    EXPECT_GT(grid.scale, 0.0f);
    if (type == GridType::symmetric) {
      EXPECT_EQ(grid.zero_point, (top + 1) / 2);
    } else if (type == GridType::midrise) {
      EXPECT_EQ(grid.zero_point, top / 2);
    } else {
      EXPECT_EQ(grid.zero_point, std::nearbyint(grid.zero_point));
    }
  });
}

TEST(FitGrid, SpansTheRange) {
  std::mt19937 engine(2);
  std::uniform_real_distribution<float> uniform(-3.0f, 3.0f);
  for_every_grid([&](GridType type, int64_t, float top) {
    for (int trial = 0; trial < 500; ++trial) {
      const float a = uniform(engine), b = uniform(engine);
      const float lo = std::fmin(a, b), hi = std::fmax(a, b);
      const Grid grid = fit_grid(type, lo, hi, top);
      // The symmetric grid has one level less above zero: max|w| may lie a whole half step beyond
      // its last level, and no more.
      const float allowed = grid.scale * (type == GridType::asymmetric ? 1.001f : 0.501f);
      ASSERT_LE(std::fabs(nearest_value(grid, lo, top) - lo), allowed) << lo << " " << hi;
      ASSERT_LE(std::fabs(nearest_value(grid, hi, top) - hi), allowed) << lo << " " << hi;
    }
  });
}

TEST(FitGrid, MidriseEndsAreLevels) {
  for (int64_t bits = 2; bits <= 8; ++bits) {
    const float top = max_code_of(bits);
    const Grid grid = fit_grid(GridType::midrise, -0.3f, 0.3f, top);
    EXPECT_EQ(to_code(0.3f, grid.scale, grid.zero_point, top), top);
    EXPECT_EQ(to_code(-0.3f, grid.scale, grid.zero_point, top), 0.0f);
    EXPECT_NEAR(to_value(top, grid.scale, grid.zero_point), 0.3f, 1e-7f);
    EXPECT_NEAR(to_value((top + 1) / 2, grid.scale, grid.zero_point), grid.scale / 2, 1e-7f);
  }
}

TEST(FitGrid, AConstantIsExact) {
  for_every_grid([](GridType type, int64_t, float top) {
    for (const float v :
         {1.0f, -1.0f, 0.3f, -0.3f, 1e-30f, -1e-30f, 1e30f, -1e30f, 7.0f / 3.0f, -1e5f}) {
      const Grid grid = fit_grid(type, v, v, top);
      EXPECT_EQ(nearest_value(grid, v, top), v);
      EXPECT_EQ(grid.scale, std::fabs(v) * (type == GridType::midrise ? 2.0f : 1.0f));
    }
  });
}

TEST(FitGrid, ZeroHasScaleOneAndIsExact) {
  for_every_grid([](GridType type, int64_t, float top) {
    for (const float v : {0.0f, -0.0f}) {
      const Grid grid = fit_grid(type, v, v, top);
      EXPECT_EQ(grid.scale, 1.0f);
      EXPECT_EQ(nearest_value(grid, v, top), 0.0f);
    }
  });
}

TEST(FitGrid, RangesOfSubnormalsCountAsZero) {
  for_every_grid([](GridType type, int64_t, float top) {
    for (const Grid& grid :
         {fit_grid(type, -kTiny, kTiny, top), fit_grid(type, kTiny, 3 * kTiny, top),
          fit_grid(type, 0.0f, kTiny, top)}) {
      EXPECT_EQ(grid.scale, 1.0f);
      EXPECT_EQ(nearest_value(grid, kTiny, top), 0.0f);
    }
  });
}

TEST(FitGrid, HugeRangesStayFinite) {
  const float largest = std::numeric_limits<float>::max();
  for_every_grid([&](GridType type, int64_t, float top) {
    const Grid extreme = fit_grid(type, -largest, largest, top);
    EXPECT_TRUE(std::isfinite(extreme.scale) && std::isfinite(extreme.zero_point));
    const Grid grid = fit_grid(type, -1e38f, 1e38f, top);
    for (float code = 0; code <= top; ++code) {
      EXPECT_TRUE(std::isfinite(to_value(code, grid.scale, grid.zero_point)));
    }
  });
}

TEST(FitGrid, OneSidedRangesKeepTheirResolution) {
  for (int64_t bits = 2; bits <= 8; ++bits) {
    const float top = max_code_of(bits);
    for (const float side : {1.0f, -1.0f}) {
      const float lo = side > 0 ? 2.0f : -3.0f;
      const Grid grid = fit_grid(GridType::asymmetric, lo, lo + 1.0f, top);
      EXPECT_NEAR(grid.scale, 1.0f / top, 1e-6f);  // not widened to contain zero
      EXPECT_TRUE(side > 0 ? grid.zero_point < 0.0f : grid.zero_point > top);
    }
  }
}

TEST(FitGrid, ARangeTooFarFromZeroIsWidenedToContainIt) {
  const Grid above = fit_grid(GridType::asymmetric, 1e6f, 1e6f + 1.0f, 255.0f);
  EXPECT_EQ(above.zero_point, 0.0f);
  EXPECT_NEAR(nearest_value(above, 1e6f, 255.0f), 1e6f, above.scale);
  const Grid below = fit_grid(GridType::asymmetric, -1e6f - 1.0f, -1e6f, 255.0f);
  EXPECT_EQ(below.zero_point, 255.0f);
  EXPECT_NEAR(nearest_value(below, -1e6f, 255.0f), -1e6f, below.scale);
}

TEST(FitGrid, ARangeNextToTheLimitStillDecodesToItself) {
  for (int64_t bits = 2; bits <= 8; ++bits) {
    const float top = max_code_of(bits);
    for (const float lo : {1.0f, 1e-30f, 1e30f}) {
      for (const float width : {1e-2f, 1e-3f, 1e-4f, 1e-5f, 1e-6f}) {
        const float hi = lo + lo * width;
        const Grid grid = fit_grid(GridType::asymmetric, lo, hi, top);
        const float allowed = grid.scale * 1.01f + lo * 1e-6f;
        EXPECT_LE(std::fabs(nearest_value(grid, lo, top) - lo), allowed) << lo << " " << width;
        EXPECT_LE(std::fabs(nearest_value(grid, hi, top) - hi), allowed) << lo << " " << width;
      }
    }
  }
}

}  // namespace
}  // namespace torchquant
