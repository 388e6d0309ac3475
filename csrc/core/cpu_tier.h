// Which instruction set runs. Every csrc/**/*.tier.cpp is compiled once per tier; the choice is made once, at run time.
#pragma once
#include <string>
#include <vector>

namespace torchquant {

enum class CpuTier { scalar, avx2, avx512 };

CpuTier cpu_tier();                       // the best tier this CPU runs, or TORCHQUANT_CPU_ISA
std::vector<std::string> cpu_tiers();     // every tier this build and this CPU have, slowest first
std::string cpu_tier_name();              // of the tier in use
void set_cpu_tier(const std::string& name);  // tests and benchmarks; throws std::invalid_argument for an unknown or absent tier

}  // namespace torchquant

// Declares a leaf for every tier and, under its plain name, the function that calls the tier in use:
//   TORCHQUANT_TIER_LEAF(comq_block, (const ComqBlock& block), (block))
// A tier file defines it inside `namespace torchquant::TORCHQUANT_TIER`. Tier files include no Torch and no std templates: an inline
// function compiled with wider instructions could be the copy that the linker keeps for everybody.
#ifdef TORCHQUANT_X86
#define TORCHQUANT_TIER_LEAF(name, parameters, arguments)   \
  namespace scalar {                                        \
  void name parameters;                                     \
  }                                                         \
  namespace avx2 {                                          \
  void name parameters;                                     \
  }                                                         \
  namespace avx512 {                                        \
  void name parameters;                                     \
  }                                                         \
  inline void name parameters {                             \
    switch (cpu_tier()) {                                   \
      case CpuTier::avx512:                                 \
        return avx512::name arguments;                      \
      case CpuTier::avx2:                                   \
        return avx2::name arguments;                        \
      case CpuTier::scalar:                                 \
        return scalar::name arguments;                      \
    }                                                       \
  }
#else
#define TORCHQUANT_TIER_LEAF(name, parameters, arguments) \
  namespace scalar {                                      \
  void name parameters;                                   \
  }                                                       \
  inline void name parameters { scalar::name arguments; }
#endif
