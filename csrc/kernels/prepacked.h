// The tensor side of PackedWeight: what linear_prepack returns, checked.
#pragma once
#include <ATen/core/Tensor.h>
#include <csrc/kernels/linear.h>

#include <optional>

namespace torchquant {

struct PrepackedTensors {
  at::Tensor packed;  // uint8 [ceil(N / 16), blocks, bits, 64]
  // float32 [rows, stride]: scales of groups, offsets (or not), sums, and multiplier_rows.
  at::Tensor grid;
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
  // For products with activations of 16 bits or fewer: with multipliers in place of scales of
  // groups where the weight has them, on a CPU.
  PackedWeight view(bool wide) const;
  // Whether the kernel in use multiplies these weights with 16-bit activations only.
  bool needs_wide() const;

 private:
  PrepackedTensors tensors_;
  PackedWeight view_;
  const float* units_ = nullptr;  // [stride], and the multipliers behind
};

}  // namespace torchquant
