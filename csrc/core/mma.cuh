// Instructions on fragments of matrices: D += A B for whole warps, by tensor cores. Lane 4 * g + c
// holds rows g and g + 8 of A (16 outputs), column g of B, and of D columns 2 * c and 2 * c + 1 of
// rows g (d[0], d[1]) and g + 8 (d[2], d[3]). Of A and B it holds whatever share of the inputs, as
// long as it is the same: a[0] (row g), a[1] (row g + 8) and b0 are one share, a[2], a[3] and b1
// the next.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace torchquant {

#ifdef __CUDACC__  // on the host: tests/cpp/cuda_on_host

#define TORCHQUANT_MMA(shape_and_types, result, d, a, b0, b1)                           \
  asm volatile("mma.sync.aligned." shape_and_types                                      \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "                        \
               "{%0, %1, %2, %3};"                                                      \
               : "+" result(d[0]), "+" result(d[1]), "+" result(d[2]), "+" result(d[3]) \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// Words of two float16 or bfloat16.
__device__ inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  TORCHQUANT_MMA("m16n8k16.row.col.f32.f16.f16.f32", "f", d, a, b0, b1);
}
__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  TORCHQUANT_MMA("m16n8k16.row.col.f32.bf16.bf16.f32", "f", d, a, b0, b1);
}

// Words of four int8.
__device__ inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  TORCHQUANT_MMA("m16n8k32.row.col.s32.s8.s8.s32", "r", d, a, b0, b1);
}

#undef TORCHQUANT_MMA

// a * b + c for the two numbers of a word.
__device__ inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// (a & mask) | base in one instruction, which two constants would make two of.
__device__ inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t base) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(base));
  return d;
}

// A word of two floats, rounded.
__device__ inline uint32_t pair_f16(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ inline uint32_t pair_bf16(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

__device__ inline float float_of_f16(uint16_t half) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
  return x;
}

#endif

}  // namespace torchquant
