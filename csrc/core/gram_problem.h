// What a solver gets: a weight and the Gram matrix of its inputs, checked and brought to float32.
#pragma once
#include <ATen/core/Tensor.h>
#include <csrc/core/parallel.h>

namespace torchquant {

// B Grams (1, or one per group of a grouped convolution), n = N / B rows each, K inputs.
struct GramProblem {
  at::Tensor weight;    // float32 [B, n, K], contiguous
  at::Tensor gram;      // float32 [B, K, K], contiguous, times `unit`
  at::Tensor diagonal;  // [B, K] of gram
  at::Tensor dead;      // bool [B, K]: inputs that never fire
  double unit;          // a power of two, 1 unless the largest diagonal element might overflow sums
};

// Checks weight and gram.
GramProblem gram_problem(const char* op, const at::Tensor& weight, const at::Tensor& gram);

// One task's share of a problem: some rows of its only Gram, or all rows of some of its Grams.
struct Part {
  bool by_rows;
  int64_t first;
  int64_t count;
  at::Tensor rows(const at::Tensor& x) const {  // of [B, n, ...]
    return x.defined() ? x.narrow(by_rows ? 1 : 0, first, count) : x;
  }
  at::Tensor problems(const at::Tensor& x) const {  // of [B, ...]
    return x.defined() && !by_rows ? x.narrow(0, first, count) : x;
  }
};

// Calls task(part) for parts of about rows_per_part rows of `weight` [B, n, K]; see Note
// [thread-independent codes]. On CUDA one part holds everything.
template <class Task>
void for_each_part(const at::Tensor& weight, int64_t rows_per_part, const Task& task) {
  const int64_t problems = weight.size(0), rows = weight.size(1);
  const bool by_rows = problems == 1;
  const int64_t total = by_rows ? rows : problems;
  if (weight.is_cuda()) return task(Part{by_rows, 0, total});
  const int64_t step =
      by_rows ? rows_per_part : std::max<int64_t>(1, rows_per_part / std::max<int64_t>(rows, 1));
  for_each_chunk((total + step - 1) / step, [&](int64_t chunk) {
    task(Part{by_rows, chunk * step, std::min(step, total - chunk * step)});
  });
}

}  // namespace torchquant
