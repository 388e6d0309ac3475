#include <csrc/core/gram_problem.h>

#include <csrc/core/check.h>

#include <cmath>

namespace torchquant {
namespace {

// Of the largest diagonal element: an input below it never fires, its reciprocal leaves float32.
constexpr double kDeadRatio = 1e-24;
constexpr double kSafe = 1e12;  // largest diagonal elements up to here and down to 1 / kSafe stay

}  // namespace

GramProblem gram_problem(const char* op, const at::Tensor& weight, const at::Tensor& gram) {
  check_matrix(op, "weight", weight);
  check_gram(op, gram, weight);
  check_finite(op, "weight", weight);
  check_finite(op, "gram", gram);

  GramProblem p;
  const int64_t problems = gram.dim() == 3 ? gram.size(0) : 1, columns = gram.size(-1);
  p.weight = weight.to(at::kFloat)
                 .contiguous()
                 .view(-1)
                 .view({problems, weight.size(0) / problems, columns});
  const at::Tensor grams = gram.reshape({problems, columns, columns});
  const double largest = columns > 0 ? grams.diagonal(0, 1, 2).max().item<double>() : 0.0;
  const bool safe = largest > 1 / kSafe && largest < kSafe;
  p.unit = largest > 0 && !safe ? std::exp2(-std::ilogb(largest)) : 1.0;
  p.gram = (safe ? grams : grams.mul(p.unit)).to(at::kFloat).contiguous();
  p.diagonal = p.gram.diagonal(0, 1, 2).contiguous();
  p.dead = p.diagonal.le(kDeadRatio * largest * p.unit);
  return p;
}

}  // namespace torchquant
