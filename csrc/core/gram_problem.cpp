#include <csrc/core/gram_problem.h>

#include <csrc/core/check.h>

#include <cmath>

namespace torchquant {
namespace {

constexpr double kDeadRatio =
    1e-30;  // of the largest diagonal element: below, 1 / H_jj would leave float32

}  // namespace

GramProblem gram_problem(const char* op, const at::Tensor& weight, const at::Tensor& gram) {
  check_matrix(op, "weight", weight);
  check_gram(op, gram, weight);
  check_finite(op, "weight", weight);
  check_finite(op, "gram", gram);

  GramProblem p;
  const int64_t problems = gram.dim() == 3 ? gram.size(0) : 1, columns = gram.size(-1);
  p.weight =
      weight.to(at::kFloat).contiguous().view({problems, weight.size(0) / problems, columns});
  const at::Tensor grams = gram.reshape({problems, columns, columns});
  const double largest = columns > 0 ? grams.diagonal(0, 1, 2).max().item<double>() : 0.0;
  p.unit = largest > 0 ? std::exp2(-std::ilogb(largest)) : 1.0;
  p.gram = grams.mul(p.unit).to(at::kFloat).contiguous();
  p.diagonal = p.gram.diagonal(0, 1, 2).contiguous();
  p.dead = p.diagonal.le(kDeadRatio);
  return p;
}

}  // namespace torchquant
