#include <csrc/core/cpu_tier.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace torchquant {
namespace {

const char* name_of(CpuTier tier) {
  switch (tier) {
    case CpuTier::avx512:
      return "avx512";
    case CpuTier::avx2:
      return "avx2";
    default:
      return "scalar";
  }
}

bool cpu_has(CpuTier tier) {
#ifdef TORCHQUANT_X86
  if (tier == CpuTier::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  if (tier == CpuTier::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return tier == CpuTier::scalar;
}

CpuTier parse(const std::string& name) {
  for (const CpuTier tier : {CpuTier::scalar, CpuTier::avx2, CpuTier::avx512}) {
    if (name == name_of(tier) && cpu_has(tier)) return tier;
  }
  std::string have;
  for (const std::string& tier : cpu_tiers()) have += (have.empty() ? "" : ", ") + tier;
  throw std::invalid_argument("TORCHQUANT_CPU_ISA: must be a tier that this CPU has (" + have +
                              "), got '" + name + "'");
}

CpuTier choose() {
  const char* wanted = std::getenv("TORCHQUANT_CPU_ISA");
  if (wanted != nullptr && *wanted != '\0') return parse(wanted);
  if (cpu_has(CpuTier::avx512)) return CpuTier::avx512;
  return cpu_has(CpuTier::avx2) ? CpuTier::avx2 : CpuTier::scalar;
}

std::atomic<CpuTier>& current() {
  static std::atomic<CpuTier> tier{choose()};
  return tier;
}

}  // namespace

CpuTier cpu_tier() { return current().load(std::memory_order_relaxed); }

bool cpu_has_vnni() {
#ifdef TORCHQUANT_X86
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

std::string cpu_tier_name() { return name_of(cpu_tier()); }

void set_cpu_tier(const std::string& name) { current() = parse(name); }

std::vector<std::string> cpu_tiers() {
  std::vector<std::string> names;
  for (const CpuTier tier : {CpuTier::scalar, CpuTier::avx2, CpuTier::avx512}) {
    if (cpu_has(tier)) names.emplace_back(name_of(tier));
  }
  return names;
}

}  // namespace torchquant
