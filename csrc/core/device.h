// The one CPU/CUDA switch. A room's operator does its checks, then calls on_device(op, tensor, cpu_face, cuda_face); only the leaf
// differs, so checks cannot drift apart.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#ifdef TORCHQUANT_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace torchquant {

inline void check_device(const char* op, const at::Tensor& tensor) {
#ifdef TORCHQUANT_CUDA
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.is_cpu() || tensor.is_cuda(), op, ": needs a CPU or CUDA tensor, got ", tensor.device());
#else
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.is_cpu(), op, ": needs a CPU tensor (torchquant was built without CUDA), got ",
                              tensor.device());
#endif
}

}  // namespace torchquant
