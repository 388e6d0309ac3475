// What this core can do at most, for the benchmark of the linear layer (probe.py compiles it when
// it runs): independent streams of one instruction on registers, and a read of a buffer. Built with
// the system's compiler, loaded by ctypes, timed by the harness in the same rounds as the kernels.
//
// Written as assembly, because compilers reorder and spill such loops.
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)

// Twelve accumulators hide a latency of up to six cycles at two instructions a cycle.
#define EACH_OF_12(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define EACH_OF_6(f) f(0, 6) f(1, 7) f(2, 8) f(3, 9) f(4, 10) f(5, 11)
#define CLOBBERED                                                                          \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
      "xmm11", "xmm14", "xmm15", "memory"

#define DOT_ZMM(i) "vpdpbusd %%zmm14, %%zmm15, %%zmm" #i "\n"
#define DOT_YMM(i) "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm" #i "\n"
#define FMA_ZMM(i) "vfmadd231ps %%zmm14, %%zmm15, %%zmm" #i "\n"
#define FMA_YMM(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #i "\n"
#define ADD_ZMM(i, t) \
  "vpmaddubsw %%zmm14, %%zmm15, %%zmm" #t "\nvpaddw %%zmm" #t ", %%zmm" #i ", %%zmm" #i "\n"
#define ADD_YMM(i, t) \
  "vpmaddubsw %%ymm14, %%ymm15, %%ymm" #t "\nvpaddw %%ymm" #t ", %%ymm" #i ", %%ymm" #i "\n"

// A stream of `body` on registers that hold 1 + 2^-23: as bytes small numbers, and never a denormal
// one.
#define STREAM(name, width, body)                                        \
  extern "C" void name(int64_t count) {                                  \
    const uint32_t bits = 0x3f800001;                                    \
    asm volatile("vmovd %0, %%xmm14\nvpbroadcastd %%xmm14, %%" width     \
                 "15\nvpbroadcastd %%xmm14, %%" width "14\n" ::"r"(bits) \
                 : "xmm14", "xmm15");                                    \
    for (; count > 0; --count) asm volatile(body::: CLOBBERED);          \
    asm volatile("vzeroupper");                                          \
  }

STREAM(vpdpbusd_zmm, "zmm", EACH_OF_12(DOT_ZMM))
STREAM(vpdpbusd_ymm, "ymm", EACH_OF_12(DOT_YMM))
STREAM(vpmaddubsw_zmm, "zmm", EACH_OF_6(ADD_ZMM))
STREAM(vpmaddubsw_ymm, "ymm", EACH_OF_6(ADD_YMM))
STREAM(fma_zmm, "zmm", EACH_OF_12(FMA_ZMM))
STREAM(fma_ymm, "ymm", EACH_OF_12(FMA_YMM))

extern "C" void nop(int64_t count) {
  for (; count > 0; --count) asm volatile(".rept 48\nnop\n.endr");
}

// Four tiles of sums. The process has asked for tiles when torchquant was loaded.
extern "C" void tdpbusd(int64_t count) {
  struct alignas(64) {
    uint8_t palette = 1, rest[15] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
  } shapes;
  asm volatile(
      "ldtilecfg (%0)\n"
      "tilezero %%tmm0\ntilezero %%tmm1\ntilezero %%tmm2\ntilezero %%tmm3\n"
      "tilezero %%tmm4\ntilezero %%tmm5\n" ::"r"(&shapes)
      : "memory");
  for (; count > 0; --count) {
    asm volatile(
        "tdpbusd %tmm4, %tmm5, %tmm0\ntdpbusd %tmm4, %tmm5, %tmm1\n"
        "tdpbusd %tmm4, %tmm5, %tmm2\ntdpbusd %tmm4, %tmm5, %tmm3\n");
  }
  asm volatile("tilerelease");
}
#endif

// Sums of whole cache lines; `bytes` is a multiple of 64.
extern "C" uint64_t read_bytes(const uint64_t* data, int64_t bytes) {
  uint64_t sums[8] = {};
  for (const uint64_t* end = data + bytes / 8; data != end; data += 8) {
    for (size_t i = 0; i < 8; ++i) sums[i] += data[i];
  }
  uint64_t sum = 0;
  for (const uint64_t part : sums) sum += part;
  return sum;
}
