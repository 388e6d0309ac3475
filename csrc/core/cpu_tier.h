// Which instruction set runs. Every csrc/**/*.tier.cpp is compiled for scalar, avx2 and avx512; the
// other tiers run that code and, in the packed kernels, instructions of their own beside it. The
// choice is made once, at run time.
#pragma once
#include <string>
#include <vector>

namespace torchquant {

// vnni: sums of four products of bytes (vpdpbusd), amx: the same by tiles.
enum class CpuTier { scalar, avx2, avx2_vnni, avx512, avx512_vnni, avx512_amx };

CpuTier cpu_tier();                    // the best tier this CPU runs, or TORCHQUANT_CPU_ISA
std::vector<std::string> cpu_tiers();  // every tier this build and this CPU have, slowest first
std::string cpu_tier_name();           // of the tier in use
void set_cpu_tier(const std::string& name);  // tests and benchmarks; throws std::invalid_argument
                                             // for an unknown or absent tier

}  // namespace torchquant

// TORCHQUANT_TIER_LEAF(comq_block, ComqBlock) declares `void comq_block(const ComqBlock&)` for
// every tier, the function under its plain name that calls the tier in use, and the CUDA face
// launch_comq_block(const ComqBlock&, stream). A tier file defines it inside `namespace
// torchquant::TORCHQUANT_TIER`. Tier files include no Torch and call no std templates: an inline
// function compiled with wider instructions could be the copy that the linker keeps for everybody.
#define TORCHQUANT_DECLARE_LEAF(tier, name, Argument) \
  namespace tier {                                    \
  void name(const Argument& argument);                \
  }
#ifdef TORCHQUANT_X86
#define TORCHQUANT_TIER_LEAF(name, Argument)                  \
  TORCHQUANT_DECLARE_LEAF(scalar, name, Argument)             \
  TORCHQUANT_DECLARE_LEAF(avx2, name, Argument)               \
  TORCHQUANT_DECLARE_LEAF(avx512, name, Argument)             \
  void launch_##name(const Argument& argument, void* stream); \
  inline void name(const Argument& argument) {                \
    switch (cpu_tier()) {                                     \
      case CpuTier::avx512:                                   \
      case CpuTier::avx512_vnni:                              \
      case CpuTier::avx512_amx:                               \
        return avx512::name(argument);                        \
      case CpuTier::avx2:                                     \
      case CpuTier::avx2_vnni:                                \
        return avx2::name(argument);                          \
      case CpuTier::scalar:                                   \
        return scalar::name(argument);                        \
    }                                                         \
  }
#else
#define TORCHQUANT_TIER_LEAF(name, Argument)                  \
  TORCHQUANT_DECLARE_LEAF(scalar, name, Argument)             \
  void launch_##name(const Argument& argument, void* stream); \
  inline void name(const Argument& argument) { scalar::name(argument); }
#endif
