// The tensor side of PackedWeight: what linear_prepack returns, checked.
#pragma once
#include <ATen/core/Tensor.h>
#include <csrc/kernels/linear.h>

#include <optional>

namespace torchquant {

struct PrepackedTensors {
  at::Tensor packed;                 // uint8 [ceil(N / 16), blocks, bits, 64]
  at::Tensor grid;                   // float32 [groups + 1 or 2 * groups + 1, stride]
  std::optional<at::Tensor> levels;  // int8 [16] or [N padded to 16, 16]
  int64_t bits;
  int64_t in_features;
  int64_t out_features;
  int64_t group_size;
};

// Whether the kernels in use multiply 8-bit codes and levels with 16-bit activations only.
bool bytes_need_wide();

class Prepacked {
 public:
  Prepacked(const char* op, PrepackedTensors tensors);

  const PackedWeight& view() const { return view_; }
  // Whether the kernel in use multiplies these weights with 16-bit activations only.
  bool needs_wide() const;

 private:
  PrepackedTensors tensors_;
  PackedWeight view_;
};

}  // namespace torchquant
