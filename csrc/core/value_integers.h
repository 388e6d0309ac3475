// Integers of values on a grid.
#pragma once
#include <csrc/core/bundle.h>
#include <csrc/core/code_by_products.h>
#include <csrc/core/integers.h>

#include <type_traits>

namespace torchquant {
namespace {

// Vectors of a bundle: as many as registers hold with what their steps need, and of what is left.
constexpr std::integral_constant<int, kVectorLanes == 16 ? 4 : 2> kMany;
constexpr std::integral_constant<int, 1> kOne;

// Integers of codes, of values with the sample's own grid, and of values with a given one: of
// bundles, or of one vector.
struct IntegersOfCodes {
  explicit IntegersOfCodes(const IntegerGrid& grid) : shift(grid.shift) {}
  inline __attribute__((always_inline)) Ints operator()(Ints codes) const { return codes - shift; }
  const int32_t shift;
};

template <class Grid>
struct IntegersOf : Grid {
  using Grid::Grid;
  template <int kCount>
  inline __attribute__((always_inline)) auto operator()(const Bundle<kCount>& x) const {
    return Grid::integers(x);
  }
  inline __attribute__((always_inline)) Ints operator()(Floats x) const {
    return Grid::integers(Bundle<1>{x}).of[0];
  }
};

struct SymmetricGrid {
  explicit SymmetricGrid(float factor) : factor(factor) {}
  template <class Values>
  inline __attribute__((always_inline)) auto integers(const Values& x) const {
    return rounded(x * factor, 0);
  }
  const float factor;
};
using SymmetricIntegers = IntegersOf<SymmetricGrid>;

struct GivenGrid {
  explicit GivenGrid(const IntegerGrid& grid) : grid(grid) {}
  template <class Values>
  inline __attribute__((always_inline)) auto integers(const Values& x) const {
    const auto code = larger(x / grid.scale + grid.zero_point, 0.0f);
    return rounded(smaller(code, grid.max_code), grid.shift);
  }
  const IntegerGrid grid;
};

struct GivenGridByProducts {
  explicit GivenGridByProducts(const IntegerGrid& grid)
      : code({grid.scale, grid.zero_point}, grid.max_code), shift(grid.shift) {}
  template <class Values>
  inline __attribute__((always_inline)) auto integers(const Values& x) const {
    return rounded(code(x), shift);
  }
  const CodeByProducts code;
  const int32_t shift;
};

// visit(integers) with what gives the integers of values.
template <class Visit>
inline __attribute__((always_inline)) void with_integers(const IntegerGrid& grid,
                                                         const Visit& visit) {
  if (grid.scale == 0.0f) return visit(SymmetricIntegers(grid.factor));
  if (CodeByProducts::serves({grid.scale, grid.zero_point}))
    return visit(IntegersOf<GivenGridByProducts>(grid));
  visit(IntegersOf<GivenGrid>(grid));
}

// Integers of values, the last vector's perhaps twice. Returns what note_finite does of all.
template <class Integers, class To>
inline __attribute__((always_inline)) Floats value_integers(const Integers& integers, Floats noted,
                                                            const float* x, int64_t count, To* a) {
  const auto take = [&](auto vectors, const float* from, To* to) __attribute__((always_inline)) {
    const auto values = load_bundle<decltype(vectors)::value>(from);
#pragma GCC unroll 8
    for (const Floats some : values.of) noted = note_finite(noted, some);
    store_narrow(integers(values), to);
  };
  if (count >= kVectorLanes) {
    const int64_t last = count - kVectorLanes;
    int64_t i = 0;
    for (; i + kMany * kVectorLanes <= count; i += kMany * kVectorLanes) take(kMany, x + i, a + i);
    for (; i < last; i += kVectorLanes) take(kOne, x + i, a + i);
    if (i < count) take(kOne, x + last, a + last);
  } else if (count > 0) {
    float some[kVectorLanes] = {};
    To narrow[kVectorLanes];
    for (int64_t i = 0; i < count; ++i) some[i] = x[i];
    take(kOne, some, narrow);
    for (int64_t i = 0; i < count; ++i) a[i] = narrow[i];
  }
  return noted;
}

// The same on any grid; false where a value is not finite.
template <class To>
bool value_integers(const IntegerGrid& grid, const float* x, int64_t count, To* a) {
  Floats noted{};
  with_integers(
      grid, [&](const auto& integers) { noted = value_integers(integers, noted, x, count, a); });
  return all_finite(noted);
}

}  // namespace
}  // namespace torchquant
