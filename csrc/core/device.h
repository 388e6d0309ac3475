// The one CPU/CUDA switch. An operator does its checks once; only its leaves differ between
// devices.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#ifdef TORCHQUANT_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace torchquant {

inline void check_device(const char* op, const at::Tensor& tensor) {
#ifdef TORCHQUANT_CUDA
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.is_cpu() || tensor.is_cuda(), op,
                              ": needs a CPU or CUDA tensor, got ", tensor.device());
#else
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.is_cpu(), op,
                              ": needs a CPU tensor (torchquant was built without CUDA), got ",
                              tensor.device());
#endif
}

}  // namespace torchquant

// TORCHQUANT_LAUNCH(leaf, rows) runs the CUDA leaf launch_<leaf>(rows, stream) of <method>.cu on
// the current stream.
#ifdef TORCHQUANT_CUDA
#define TORCHQUANT_LAUNCH(leaf, argument) \
  launch_##leaf(argument, c10::cuda::getCurrentCUDAStream().stream())
#else
#define TORCHQUANT_LAUNCH(leaf, argument) \
  TORCH_CHECK_NOT_IMPLEMENTED(false, #leaf ": torchquant was built without CUDA")
#endif
// TORCHQUANT_RUN(leaf, tensor, rows) runs the leaf of the tensor's device.
#define TORCHQUANT_RUN(leaf, tensor, argument) \
  do {                                         \
    if ((tensor).is_cuda()) {                  \
      TORCHQUANT_LAUNCH(leaf, argument);       \
    } else {                                   \
      leaf(argument);                          \
    }                                          \
  } while (false)
