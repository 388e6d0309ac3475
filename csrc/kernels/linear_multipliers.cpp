#include <csrc/kernels/linear_multipliers.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace torchquant {
namespace {

constexpr int64_t kUnits = 2;  // floats tried on either side of a quotient

bool fits(const GroupScales& row, float unit, uint8_t* multipliers) {
  for (int64_t g = 0; g < row.groups; ++g) {
    const float zero =
        row.zero_point == nullptr ? static_cast<float>(1 << (row.bits - 1)) : row.zero_point[g];
    const double m = round_to_integer(static_cast<double>(row.scale[g]) / unit);
    if (m < 0 || m > static_cast<double>(multiplier_limit(row.bits, zero))) return false;
    if (unit * static_cast<float>(m) != row.scale[g]) return false;
    multipliers[g] = static_cast<uint8_t>(m);
  }
  return true;
}

// Above these rows a multiplied panel is as fast.
bool multiplies_weight(CpuTier tier, int64_t rows) {
  constexpr int64_t kMostYmm = 4, kMostAmx = 7, kMostZmm = 7;
  if (tier == CpuTier::avx512_amx) return rows > kMostAmx;
  return rows > (tier == CpuTier::avx512_vnni ? kMostZmm : kMostYmm);
}

}  // namespace

int64_t multiplier_limit(int64_t bits, float zero_point) {
  const float last = max_code_of(bits);
  if (!(zero_point >= 0 && zero_point <= last) || zero_point != round_to_integer(zero_point))
    return -1;
  const auto below = static_cast<int64_t>(zero_point), above = static_cast<int64_t>(last) - below;
  return std::min(below == 0 ? 127 : 128 / below, above == 0 ? 127 : 127 / above);
}

bool find_multipliers(const GroupScales& row, float& unit, uint8_t* multipliers) {
  const float largest = *std::max_element(row.scale, row.scale + row.groups);
  const int64_t most = int64_t{256} >> row.bits;
  for (int64_t m = 1; m <= most; ++m) {
    const float quotient = largest / static_cast<float>(m);
    unit = quotient;
    for (int64_t i = 0; i < kUnits; ++i) unit = std::nextafter(unit, 0.0f);
    for (int64_t i = -kUnits; i <= kUnits; ++i) {
      if (unit > 0 && fits(row, unit, multipliers)) return true;
      unit = std::nextafter(unit, std::numeric_limits<float>::infinity());
    }
  }
  return false;
}

GroupStarts group_starts(const PackedWeight& weight, CpuTier tier, bool wide, int64_t rows) {
  const GroupMultipliers& m = weight.multipliers;
  if (m.values == nullptr || tier == CpuTier::scalar) return {};
  if (!wide && (tier == CpuTier::avx2 || tier == CpuTier::avx512)) return {m.blocks, 1, true, rows};
  if (multiplies_weight(tier, rows)) return {};
  const int32_t factor = m.offset == nullptr ? -weight.origin : -1;
  return {m.blocks, factor, false, rows};
}

}  // namespace torchquant
