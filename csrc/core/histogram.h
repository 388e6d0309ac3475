// Histogram tensors over the bins of float_bins.h: float64 [3, B] (count, sum, sum of squares), or
// [C, 3, B] with one for each of C channels.
#pragma once
#include <ATen/core/Tensor.h>
#include <csrc/core/float_bins.h>

namespace torchquant {

void check_histogram(const char* op, const at::Tensor& histogram);

// [C, 3, B] contiguous on the CPU, C = 1 for one of a whole tensor; every one must hold values.
at::Tensor histogram_rows(const char* op, const at::Tensor& histogram);

}  // namespace torchquant
