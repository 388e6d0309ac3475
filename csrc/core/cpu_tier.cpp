#include <csrc/core/cpu_tier.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <utility>

#ifdef TORCHQUANT_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace torchquant {
namespace {

// Slowest first.
constexpr std::pair<CpuTier, const char*> kTiers[] = {
    {CpuTier::scalar, "scalar"},           {CpuTier::avx2, "avx2"},
    {CpuTier::avx2_vnni, "avx2_vnni"},     {CpuTier::avx512, "avx512"},
    {CpuTier::avx512_vnni, "avx512_vnni"}, {CpuTier::avx512_amx, "avx512_amx"}};

#ifdef TORCHQUANT_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}

// Tiles are large: Linux gives them to a process that asks.
bool has_amx() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool there = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 24 & 3) == 3;
  return there && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool cpu_has(CpuTier tier) {
#ifdef TORCHQUANT_X86
  switch (tier) {
    case CpuTier::avx2:
      return has_avx2();
    case CpuTier::avx2_vnni:
      return has_avx2() && has_avx_vnni();
    case CpuTier::avx512:
      return has_avx512();
    case CpuTier::avx512_vnni:
      return has_avx512() && __builtin_cpu_supports("avx512vnni");
    case CpuTier::avx512_amx:
      return has_avx512() && __builtin_cpu_supports("avx512vnni") && has_amx();
    default:
      break;
  }
#endif
  return tier == CpuTier::scalar;
}

CpuTier parse(const std::string& wanted) {
  for (const auto& [tier, name] : kTiers) {
    if (wanted == name && cpu_has(tier)) return tier;
  }
  std::string have;
  for (const std::string& tier : cpu_tiers()) have += (have.empty() ? "" : ", ") + tier;
  throw std::invalid_argument("TORCHQUANT_CPU_ISA: must be a tier that this CPU has (" + have +
                              "), got '" + wanted + "'");
}

CpuTier choose() {
  const char* wanted = std::getenv("TORCHQUANT_CPU_ISA");
  return parse(wanted != nullptr && *wanted != '\0' ? wanted : cpu_tiers().back());
}

std::atomic<CpuTier>& current() {
  static std::atomic<CpuTier> tier{choose()};
  return tier;
}

}  // namespace

CpuTier cpu_tier() { return current().load(std::memory_order_relaxed); }

std::string cpu_tier_name() {
  for (const auto& [tier, name] : kTiers) {
    if (tier == cpu_tier()) return name;
  }
  return "";
}

void set_cpu_tier(const std::string& name) { current() = parse(name); }

std::vector<std::string> cpu_tiers() {
  std::vector<std::string> names;
  for (const auto& [tier, name] : kTiers) {
    if (cpu_has(tier)) names.emplace_back(name);
  }
  return names;
}

}  // namespace torchquant
