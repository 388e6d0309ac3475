// The leaves of packed linear layers on every tier of this CPU: the scalar one's results, and no
// byte touched behind an array's end (see guarded.h).
#include <csrc/kernels/linear_float.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "linear_problem.h"

namespace torchquant {
namespace {

struct Tier {
  std::string name;
  CpuTier tier;
  void (*quantize)(const QuantizeRows&);
  void (*multiply)(const PackedProduct&);
  void (*unpack)(const UnpackWeight&);

  // Without sums of four products these weights are multiplied with 16-bit activations only.
  bool takes(const LinearCase& c) const {
    const bool plain = tier == CpuTier::avx2 || tier == CpuTier::avx512;
    return c.wide || !plain ||
           (c.has_levels() ? c.largest_level() <= kSmallLevel : c.layout().bits < 8);
  }
};

std::vector<Tier> tiers() {
  std::vector<Tier> all;
  const auto add = [&](const char* name, CpuTier tier, auto... leaves) {
    const std::vector<std::string> have = cpu_tiers();
    if (std::find(have.begin(), have.end(), name) != have.end())
      all.push_back({name, tier, leaves...});
  };
  add("scalar", CpuTier::scalar, scalar::quantize_rows, scalar::packed_product,
      scalar::unpack_weight);
#ifdef TORCHQUANT_X86
  add("avx2", CpuTier::avx2, avx2::quantize_rows, avx2::packed_product, avx2::unpack_weight);
  add("avx2_vnni", CpuTier::avx2_vnni, avx2::quantize_rows, avx2::packed_product,
      avx2::unpack_weight);
  const auto add_avx512 = [&](const char* name, CpuTier tier) {
    add(name, tier, avx512::quantize_rows, avx512::packed_product, avx512::unpack_weight);
  };
  add_avx512("avx512", CpuTier::avx512);
  add_avx512("avx512_vnni", CpuTier::avx512_vnni);
  add_avx512("avx512_amx", CpuTier::avx512_amx);
#endif
  return all;
}

const std::vector<LinearCase> kCases =
    linear_cases(600, {1, 1, 2, 3, 4, 5, 6, 7, 13, 20, 33, 50});  // whole tiles of AMX and panels

TEST(Linear, EveryTierGivesTheSameIntegers) {
  for (const LinearCase& c : kCases) {
    LinearProblem problem(c);
    ASSERT_TRUE(problem.quantize(scalar::quantize_rows));
    const auto wanted = problem.integers();
    for (const Tier& tier : tiers()) {
      EXPECT_TRUE(problem.quantize(tier.quantize));
      EXPECT_EQ(problem.integers(), wanted) << tier.name << ": " << c;
    }
  }
}

TEST(Linear, EveryTierGivesTheSameOutputs) {
  for (const LinearCase& c : kCases) {
    LinearProblem problem(c), reference(c);
    problem.quantize(scalar::quantize_rows), reference.quantize(scalar::quantize_rows);
    for (int64_t first_tile = 0; first_tile < c.tiles(); first_tile += 3) {
      reference.multiply(scalar::packed_product, first_tile);
      for (const Tier& tier : tiers()) {
        if (!tier.takes(c)) continue;
        problem.multiply(tier.multiply, first_tile, tier.tier);
        EXPECT_TRUE(problem.same_outputs(reference)) << tier.name << ": " << c;
      }
    }
  }
}

// Sums of bytes that are as large as they can be.
TEST(Linear, SmallLevelsDoNotOverflow) {
  LinearCase c{6, 16, 100, 4, 0, Kind::levels, Input::codes, false, Epilogue::none, false};
  ASSERT_LE(c.largest_level(), kSmallLevel);
  for (const int8_t level : {-63, -33, -32, -31, 31, 32, 33, 63}) {
    for (const uint8_t code : {0, 1, 255}) {
      for (const int64_t rows : {1, 6}) {
        c.rows = rows;
        LinearProblem problem(c), reference(c);
        for (LinearProblem* p : {&problem, &reference}) {
          for (int64_t i = 0; i < p->levels().size(); ++i) p->levels()[i] = level;
          for (int64_t i = 0; i < p->codes().size(); ++i) p->codes()[i] = code;
          p->quantize(scalar::quantize_rows);
        }
        reference.multiply(scalar::packed_product);
        for (const Tier& tier : tiers()) {
          problem.multiply(tier.multiply, 0, tier.tier);
          EXPECT_TRUE(problem.same_outputs(reference))
              << tier.name << ", level " << int{level} << ", code " << int{code} << ": " << c;
        }
      }
    }
  }
}

// What the kernels take beside the integers is another for each tier, and only theirs.
TEST(Linear, EveryTierGivesTheSameOutputsOfMultipliedGroups) {
  for (const LinearCase& c : multiplied_cases(500, {1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 33, 50})) {
    LinearProblem problem(c), reference(c);
    reference.quantize(scalar::quantize_rows);
    for (int64_t first_tile = 0; first_tile < c.tiles(); first_tile += 3) {
      reference.multiply(scalar::packed_product, first_tile);
      for (const Tier& tier : tiers()) {
        problem.quantize(tier.quantize, tier.tier);
        EXPECT_EQ(problem.integers(), reference.integers()) << tier.name << ": " << c;
        problem.multiply(tier.multiply, first_tile, tier.tier);
        EXPECT_TRUE(problem.same_outputs(reference)) << tier.name << ": " << c;
      }
    }
  }
}

TEST(Linear, EveryTierUnpacksTheSameValues) {
  for (const LinearCase& c : kCases) {
    LinearProblem problem(c), reference(c);
    for (const UnpackType type :
         {UnpackType::float32, UnpackType::float16, UnpackType::bfloat16, UnpackType::bytes}) {
      reference.unpack(scalar::unpack_weight, type);
      for (const Tier& tier : tiers()) {
        problem.unpack(tier.unpack, type);
        EXPECT_TRUE(problem.values().same_bytes(reference.values())) << tier.name << ": " << c;
        EXPECT_TRUE(problem.half_values().same_bytes(reference.half_values())) << tier.name;
        EXPECT_TRUE(problem.bytes().same_bytes(reference.bytes())) << tier.name << ": " << c;
      }
    }
  }
}

// A product with the unit vectors gives the weight back.
TEST(Linear, UnpackedValuesAreTheOnesMultiplied) {
  for (const Kind kind : {Kind::uniform, Kind::levels, Kind::row_levels}) {
    for (const int64_t bits : {2, 3, 4, 8}) {
      if (bits == 8 && kind != Kind::uniform) continue;
      const LinearCase c{70, 19, 70, bits, 24, kind, Input::dynamic, true, Epilogue::none, false};
      LinearProblem problem(c);
      for (int64_t i = 0; i < 70 * 70; ++i) problem.x()[i] = i % 71 == 0 ? 32767.0f : 0.0f;
      problem.quantize(scalar::quantize_rows);
      problem.multiply(scalar::packed_product);
      problem.unpack(scalar::unpack_weight, UnpackType::float32);
      for (int64_t k = 0; k < 70; ++k) {
        for (int64_t n = 0; n < 19; ++n)
          ASSERT_FLOAT_EQ(problem.out()[k * 19 + n], 32767.0f * problem.values()[n * 70 + k]) << c;
      }
    }
  }
}

TEST(Linear, RowsThatAreNotFiniteAreSeen) {
  const LinearCase c{3, 5, 37, 4, 0, Kind::uniform, Input::dynamic, false, Epilogue::none, false};
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    LinearProblem problem(c);
    problem.x()[2 * 37 + 36] = bad;
    for (const Tier& tier : tiers()) EXPECT_FALSE(problem.quantize(tier.quantize)) << tier.name;
  }
}

float value_of_float16(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const float magnitude = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                          : exponent == 31 ? std::numeric_limits<float>::infinity()
                                           : std::ldexp(1024.0f + mantissa, exponent - 25);
  return half >> 15 ? -magnitude : magnitude;
}

// Every number of the narrow types comes back, and what lies between two goes to the nearer one,
// from the middle to the even one.
template <class Bits, class Value>
void check_conversion(uint16_t last, const Bits& bits, const Value& value) {
  for (uint32_t i = 0; i < last; ++i) {
    const float low = value(static_cast<uint16_t>(i)), high = value(static_cast<uint16_t>(i + 1));
    const float middle = low + (high - low) / 2;
    ASSERT_EQ(bits(low), i);
    ASSERT_EQ(bits(-low), i | 0x8000);
    ASSERT_EQ(bits(middle), i + (i & 1));
    ASSERT_EQ(bits(std::nextafter(middle, low)), i);
    ASSERT_EQ(bits(std::nextafter(middle, high)), i + 1);
  }
}

TEST(Linear, ConversionsRoundHalfToEven) {
  check_conversion(0x7bff, [](float x) { return float16_bits(x); }, value_of_float16);
  EXPECT_EQ(float16_bits(65519.0f), 0x7bff);
  EXPECT_EQ(float16_bits(65520.0f), 0x7c00);
  EXPECT_EQ(float16_bits(-1e30f), 0xfc00);
  check_conversion(
      0x7f7f, [](float x) { return bfloat16_bits(x); },
      [](uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); });
}

}  // namespace
}  // namespace torchquant
