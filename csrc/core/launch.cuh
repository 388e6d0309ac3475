// How CUDA leaves start: one warp a row, a few warps a block, any number of rows. Warps share
// nothing, so kernels need no __syncthreads; a block's only purpose is to fill an SM. (Tensor cores
// are started by kernels/linear_mma.cuh, with blocks that share.)
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace torchquant {

constexpr int kWarpSize = 32;
constexpr int64_t kWarpsPerBlock = 4;
constexpr int64_t kMaxBlocks =
    1 << 20;  // kernels walk on by row_step(), so a larger grid gains nothing
constexpr int64_t kSharedBytesPerBlock = 48 << 10;  // what every GPU gives without asking
constexpr int64_t kMaxSharedBytes = 96 << 10;       // what every GPU from sm_80 on gives when asked

// for (int64_t row = first_row(); row < rows; row += row_step()): all lanes of a warp walk the same
// rows.
__device__ inline int64_t first_row() {
  return static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
}
__device__ inline int64_t row_step() {
  return static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarpSize);
}

extern __shared__ float warp_buffers[];

// This warp's share of the shared memory that launch_rows was asked for.
__device__ inline float* warp_buffer(int64_t floats) {
  return warp_buffers + threadIdx.x / kWarpSize * floats;
}

inline void check_cuda(const char* leaf, cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(leaf) + ": " + cudaGetErrorString(status));
}

// Starts kernel(argument) with at least one warp for every row, up to kMaxBlocks blocks, on
// `stream`.
template <class Argument>
void launch_rows(const char* leaf, void (*kernel)(Argument), const Argument& argument, int64_t rows,
                 void* stream, int64_t shared_bytes_per_warp = 0) {
  if (rows <= 0) return;
  const int64_t fitting = kSharedBytesPerBlock / std::max<int64_t>(shared_bytes_per_warp, 1);
  const int64_t warps = std::clamp<int64_t>(fitting, 1, kWarpsPerBlock);
  const int64_t shared_bytes = warps * shared_bytes_per_warp;
  if (shared_bytes > kSharedBytesPerBlock) {
    check_cuda(leaf, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared_bytes)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min((rows + warps - 1) / warps, kMaxBlocks)));
  config.blockDim = dim3(static_cast<unsigned>(warps * kWarpSize));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  check_cuda(leaf, cudaLaunchKernelEx(&config, kernel, argument));
}

}  // namespace torchquant
