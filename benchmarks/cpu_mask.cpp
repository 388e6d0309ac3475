// Loaded ahead of a process (LD_PRELOAD, see cpu_mask.py), hides parts of the processor from all of
// its libraries: `cpuid` traps (Linux's ARCH_SET_CPUID, where the processor and the hypervisor can)
// and answers without the features of the tiers above the one that BENCHMARK_CPU names. So every
// library chooses its code as on a CPU that ends with that tier.
#include <asm/prctl.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/ucontext.h>
#include <unistd.h>

namespace {

// Bits of what cpuid answers for a leaf and a part of it.
struct Features {
  uint32_t leaf, part, eax, ebx, ecx, edx;
};
constexpr Features kAvx512[] = {
    {7, 0, 0, 0xdc230000, 0x00005042, 0x0080010c},  // F, DQ, IFMA, PF, ER, CD, BW, VL; VBMI to FP16
    {7, 1, 0x00000020, 0, 0, 0x00080000},           // BF16; AVX10
};
constexpr Features kAvx512Vnni[] = {{7, 0, 0, 0, 0x00000800, 0}};
constexpr Features kAvxVnni[] = {
    {7, 1, 0x00800010, 0, 0, 0x00000430}};  // IFMA; INT8, CONVERT, INT16
constexpr Features kAmx[] = {{7, 0, 0, 0, 0, 0x03400000}, {7, 1, 0x00200000, 0, 0, 0x00000100}};

bool hides_avx512, hides_avx512_vnni, hides_avx_vnni;  // AMX is always hidden
struct sigaction others;

bool set_cpuid(bool runs) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, runs ? 1UL : 0UL) == 0; }

template <size_t count>
void hide(const Features (&features)[count], uint32_t leaf, uint32_t part, greg_t* registers) {
  for (const Features& some : features) {
    if (some.leaf != leaf || some.part != part) continue;
    registers[REG_RAX] &= ~some.eax;
    registers[REG_RBX] &= ~some.ebx;
    registers[REG_RCX] &= ~some.ecx;
    registers[REG_RDX] &= ~some.edx;
  }
}

void answer(int signal, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  if (memcmp(reinterpret_cast<const void*>(registers[REG_RIP]), "\x0f\xa2", 2) != 0) {
    sigaction(signal, &others, nullptr);  // a fault of the program's own: happens again
    return;
  }
  const auto leaf = static_cast<uint32_t>(registers[REG_RAX]);
  const auto part = static_cast<uint32_t>(registers[REG_RCX]);
  uint32_t a = leaf, b, c = part, d;
  set_cpuid(true);
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  set_cpuid(false);
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
  hide(kAmx, leaf, part, registers);
  if (hides_avx512) hide(kAvx512, leaf, part, registers);
  if (hides_avx512_vnni) hide(kAvx512Vnni, leaf, part, registers);
  if (hides_avx_vnni) hide(kAvxVnni, leaf, part, registers);
}

__attribute__((constructor)) void begin() {
  const char* tier = getenv("BENCHMARK_CPU");
  if (tier == nullptr) return;
  hides_avx512 = strncmp(tier, "avx2", 4) == 0;
  hides_avx512_vnni = strcmp(tier, "avx512_vnni") != 0;
  hides_avx_vnni = strcmp(tier, "avx2_vnni") != 0;
  struct sigaction action = {};
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &others);
  if (set_cpuid(false)) return;
  constexpr char kError[] = "BENCHMARK_CPU: this machine cannot hide parts of its processor\n";
  if (write(STDERR_FILENO, kError, sizeof kError - 1) >= 0) _exit(1);
}

}  // namespace
