// Aqer of ERQ (arXiv 2407.06794): the float weight that answers best for quantized inputs. With
// H = X~^T X~ and C = X~^T X of the quantized inputs X~ and the float ones X,
//   min_D |X W^T - X~ (W + D)^T|^2 + l |D|^2   has   D (H + l I) = W (C - H)^T.
// With a ridge that bounds the condition of H + l I, float32 Grams are solved in float32: their own
// rounding moves D as much. All else is in float64.
#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <csrc/core/check.h>
#include <csrc/core/cholesky.h>
#include <csrc/core/device.h>
#include <csrc/core/gram_problem.h>
#include <torch/library.h>

#include <cmath>

// Shapes: B Grams (1, or one per group of a grouped convolution), n rows each, K inputs, of which
// the last may be the bias: an input that is always one.

namespace torchquant {
namespace {

constexpr int64_t kRowsPerChunk = 192;
constexpr int kRaises = 3;             // how often a ridge that is too small is raised tenfold
constexpr double kFirstRaised = 1e-6;  // at least
constexpr double kFloatRidge = 0.01;   // from here on float32 is enough for float32 Grams

struct BiasRule {
  bool column;     // the last column is the bias
  bool penalized;  // by the ridge, as the weights are
  bool free() const { return column && !penalized; }
};

struct RidgeProblem {
  at::Tensor weight;  // float32 [B, n, K], contiguous
  at::Tensor gram;    // [B, K, K]
  at::Tensor change;  // [B, K, K] C - H, of the Grams' dtype: no better known than that
  at::Tensor unit;    // [B, 1] mean squared input, the bias left out: a ridge is relative to it
};

at::Tensor checked_gram(const char* op, const char* argument, const at::Tensor& matrix,
                        const at::Tensor& gram) {
  check_shape(op, argument, matrix, gram.sizes());
  TORCH_CHECK_TYPE(matrix.scalar_type() == at::kFloat || matrix.scalar_type() == at::kDouble, op,
                   ": ", argument, " must be float32 or float64, got ", matrix.scalar_type());
  check_same_device(op, argument, matrix, gram);
  check_finite(op, argument, matrix);
  const int64_t problems = gram.dim() == 3 ? gram.size(0) : 1, columns = gram.size(-1);
  return matrix.reshape({problems, columns, columns}).contiguous();
}

RidgeProblem ridge_problem(const char* op, const at::Tensor& weight, const at::Tensor& gram,
                           const at::Tensor& cross, const BiasRule& bias) {
  check_device(op, weight);
  check_matrix(op, "weight", weight);
  check_gram(op, gram, weight);
  check_finite(op, "weight", weight);
  const int64_t K = weight.size(1);
  TORCH_CHECK_VALUE(!bias.column || K > 0, op,
                    ": bias_column needs the bias as the last column of weight, got no columns");
  const int64_t B = gram.dim() == 3 ? gram.size(0) : 1, n = weight.size(0) / B;
  RidgeProblem p;
  p.weight = weight.to(at::kFloat).contiguous().view({B, n, K});
  p.gram = checked_gram(op, "gram", gram, gram);
  p.change = checked_gram(op, "cross", cross, gram).sub(p.gram);
  const at::Tensor inputs =
      p.gram.diagonal(0, 1, 2).narrow(1, 0, bias.column ? K - 1 : K).to(at::kDouble);
  const at::Tensor mean = inputs.size(1) > 0 ? inputs.mean(-1, true) : inputs.sum(-1, true);
  p.unit = at::where(mean.gt(0), mean, at::ones_like(mean));
  return p;
}

at::Tensor with_ridge(const RidgeProblem& p, const at::Tensor& ridge, const BiasRule& bias,
                      at::ScalarType type) {
  const at::Tensor damped = p.gram.to(type, /*non_blocking=*/false, /*copy=*/true);
  const int64_t K = damped.size(1);
  damped.diagonal(0, 1, 2).narrow(1, 0, bias.free() ? K - 1 : K).add_(ridge);
  return damped;
}

// R with H + l I = R R^T, with l raised where H is not positive definite.
at::Tensor ridge_factor(const char* op, const RidgeProblem& p, double ridge, BiasRule bias) {
  at::Tensor amount = p.unit * ridge;
  if (ridge >= kFloatRidge && p.change.scalar_type() == at::kFloat) {
    const at::Tensor upper = with_ridge(p, amount, bias, at::kFloat);
    if (!cholesky_(upper).any().item<bool>()) return upper;
  }
  at::Tensor upper = with_ridge(p, amount, bias, at::kDouble);
  at::Tensor failed = cholesky_(upper).view({-1, 1});
  bias.penalized = true;  // an empty bias column needs the raised ridge as well
  for (int raise = 0; raise < kRaises && failed.any().item<bool>(); ++raise) {
    amount = at::maximum(amount * 10, p.unit * kFirstRaised);
    const at::Tensor raised = with_ridge(p, amount, bias, at::kDouble);
    const at::Tensor still = cholesky_(raised).view({-1, 1});
    upper = at::where(failed.unsqueeze(2), raised, upper);
    failed = failed.logical_and(still);
  }
  TORCH_CHECK_VALUE(!failed.any().item<bool>(), op, ": gram + ridge is not positive definite at ",
                    ridge, " nor at thousandfold: is gram a Gram matrix?");
  return upper;
}

at::Tensor ridge_update(const at::Tensor& weight, const at::Tensor& gram, const at::Tensor& cross,
                        double ridge, bool bias_column, bool penalize_bias) {
  const char* op = "ridge_update";
  TORCH_CHECK_VALUE(ridge >= 0 && std::isfinite(ridge), op,
                    ": ridge must be finite and not negative, got ", ridge);
  const BiasRule bias{bias_column, penalize_bias};
  const c10::DeviceGuard guard(weight.device());
  const at::NoTF32Guard no_tf32;
  const RidgeProblem p = ridge_problem(op, weight, gram, cross, bias);
  if (weight.numel() == 0) return at::empty(weight.sizes(), weight.options().dtype(at::kFloat));

  at::Tensor upper;
  const auto factor = [&] { upper = ridge_factor(op, p, ridge, bias); };
  p.weight.is_cuda() ? factor() : run_on_one_thread(factor);
  at::Tensor result = at::empty_like(p.weight);
  for_each_part(p.weight, kRowsPerChunk, [&](const Part& part) {
    const at::Tensor rows = part.rows(p.weight), r = part.problems(upper);
    const at::Tensor known = part.problems(p.change);
    at::Tensor change = at::bmm(rows.to(known.scalar_type()), known.mT()).to(r.scalar_type());
    change = at::linalg_solve_triangular(r.mT(), change, /*upper=*/false, /*left=*/false);
    change = at::linalg_solve_triangular(r, change, /*upper=*/true, /*left=*/false);
    part.rows(result).copy_(change.add_(rows));
  });
  return result.view(weight.sizes());
}

// D(l)^T = basis diag(1 / (values + l)) answer + constant for every l.
struct RidgePath {
  at::Tensor basis;     // [K, k]
  at::Tensor values;    // [k]
  at::Tensor answer;    // [k, n]
  at::Tensor constant;  // [K, n]
};

// A free bias is eliminated first: it takes the mean out of the inputs.
RidgePath ridge_path(const at::Tensor& gram, const at::Tensor& right, const BiasRule& bias) {
  if (!bias.free()) {
    const auto [values, vectors] = at::linalg_eigh(gram);
    return {vectors, values, at::mm(vectors.t(), right), at::zeros_like(right)};
  }
  const int64_t k = gram.size(0) - 1;
  const at::Tensor pivot = gram.select(0, k).select(0, k);
  const at::Tensor inverse = at::where(pivot.gt(0), pivot.reciprocal(), at::zeros_like(pivot));
  const at::Tensor mean = gram.narrow(0, 0, k).narrow(1, k, 1) * inverse;  // [k, 1]
  const at::Tensor rest = gram.narrow(0, 0, k).narrow(1, 0, k) - at::mm(mean, mean.t()) * pivot;
  const at::Tensor right_bias = right.narrow(0, k, 1);
  at::Tensor eliminate = at::zeros({k + 1, k}, gram.options());
  eliminate.narrow(0, 0, k).copy_(at::eye(k, gram.options()));
  eliminate.narrow(0, k, 1).copy_(mean.t().neg());
  at::Tensor constant = at::zeros_like(right);
  constant.narrow(0, k, 1).copy_(right_bias * inverse);
  const auto [values, vectors] = at::linalg_eigh(rest);
  const at::Tensor answer = at::mm(vectors.t(), right.narrow(0, 0, k) - at::mm(mean, right_bias));
  return {at::mm(eliminate, vectors), values, answer, constant};
}

// What the update with each ridge adds to the squared error on the held-out inputs: with
// E = D^T, tr(E^T H2 E) + 2 tr(E^T (H2 - C2) W^T).
at::Tensor path_errors(const RidgeProblem& fit, const RidgeProblem& heldout, int64_t problem,
                       const at::Tensor& ridges, const BiasRule& bias) {
  const at::Tensor w = fit.weight.select(0, problem).t().to(at::kDouble);  // [K, n]
  const RidgePath path = ridge_path(fit.gram.select(0, problem).to(at::kDouble),
                                    at::mm(fit.change.select(0, problem).to(at::kDouble), w), bias);
  const at::Tensor gram = heldout.gram.select(0, problem).to(at::kDouble);
  const at::Tensor linear = at::mm(heldout.change.select(0, problem).to(at::kDouble), w).neg_();
  const at::Tensor moved = at::mm(gram, path.constant);
  const at::Tensor square =
      at::mm(at::mm(path.basis.t(), gram), path.basis).mul_(at::mm(path.answer, path.answer.t()));
  const at::Tensor slope =
      at::mm(path.basis.t(), moved + linear).mul_(path.answer).sum(-1).unsqueeze(1);
  const at::Tensor constant = path.constant.mul(linear * 2 + moved).sum();
  const at::Tensor shifted = path.values.clamp_min(0).unsqueeze(0) +
                             ridges.unsqueeze(1) * fit.unit.select(0, problem);  // [L, k]
  const at::Tensor factors = shifted.reciprocal();
  return at::mm(factors, square).mul_(factors).sum(-1) + at::mm(factors, slope).squeeze(1) * 2 +
         constant;
}

at::Tensor ridge_errors(const at::Tensor& weight, const at::Tensor& gram, const at::Tensor& cross,
                        const at::Tensor& heldout_gram, const at::Tensor& heldout_cross,
                        at::ArrayRef<double> ridges, bool bias_column, bool penalize_bias) {
  const char* op = "ridge_errors";
  TORCH_CHECK_VALUE(!ridges.empty(), op, ": ridges must hold at least one value, got none");
  for (const double ridge : ridges) {
    TORCH_CHECK_VALUE(ridge > 0 && std::isfinite(ridge), op,
                      ": ridges must be finite and positive, got ", ridge);
  }
  const BiasRule bias{bias_column, penalize_bias};
  const c10::DeviceGuard guard(weight.device());
  const RidgeProblem fit = ridge_problem(op, weight, gram, cross, bias);
  check_shape(op, "heldout_gram", heldout_gram, gram.sizes());
  const RidgeProblem heldout = ridge_problem(op, weight, heldout_gram, heldout_cross, bias);
  const at::Tensor amounts = at::tensor(ridges, fit.unit.options());
  at::Tensor errors = at::zeros_like(amounts);
  if (weight.numel() == 0) return errors;
  const auto add_errors = [&] {
    for (int64_t b = 0; b < fit.weight.size(0); ++b) {
      errors.add_(path_errors(fit, heldout, b, amounts, bias));
    }
  };
  fit.weight.is_cuda() ? add_errors() : run_on_one_thread(add_errors);
  return errors;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "ridge_update(Tensor weight, Tensor gram, Tensor cross, *, float ridge, bool "
      "bias_column=False, bool penalize_bias=True) -> Tensor");
  m.def(
      "ridge_errors(Tensor weight, Tensor gram, Tensor cross, Tensor heldout_gram, Tensor "
      "heldout_cross, *, float[] ridges, bool bias_column=False, bool penalize_bias=True) -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) {
  m.impl("ridge_update", ridge_update);
  m.impl("ridge_errors", ridge_errors);
}
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) {
  m.impl("ridge_update", ridge_update);
  m.impl("ridge_errors", ridge_errors);
}
#endif

}  // namespace torchquant
