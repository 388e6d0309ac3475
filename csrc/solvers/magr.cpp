#include <csrc/solvers/magr.h>

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_inv_ex.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <csrc/core/check.h>
#include <csrc/core/device.h>
#include <csrc/core/gram_problem.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

// Shapes: B Grams (1, or one per group of a grouped convolution), n rows each, K inputs, G groups
// of columns with one maximum each.

namespace torchquant {
namespace {

// Power iterations between two looks at the eigenvalue, how many at most, and the growth per look
// that ends them.
constexpr int64_t kPowerBatch = 8;
constexpr int64_t kPowerBatches = 16;
constexpr double kPowerGrowth = 1e-5;
constexpr double kTiny = 1e-30;  // instead of the norm of a zero vector
constexpr double kFistaStep =
    1 / 1.02;  // FISTA needs a step <= 1 / lambda_max, which power iteration underestimates
constexpr double kRho =
    0.003;  // of ADMM, relative to lambda_max: (H + rho I) has a condition number below 334
constexpr int64_t kIterationsPerLook = 8;  // between two looks at whether anything still changes

// Rows whose iterations run together on one thread: the product reads all of H once for them.
// Measured: 96 rows reach the BLAS rate at K = 384 and 768, at K = 4096 it takes 384.
int64_t rows_per_part(int64_t columns) {
  return columns <= 1024 ? 96 : columns <= 2048 ? 192 : 384;
}

MagrSolver parse_solver(const char* op, std::string_view solver) {
  if (solver == "ista") return MagrSolver::ista;
  if (solver == "fista") return MagrSolver::fista;
  TORCH_CHECK_VALUE(solver == "admm", op, ": solver must be ista, fista or admm, got '", solver,
                    "'");
  return MagrSolver::admm;
}

// The largest eigenvalue of every Gram, [B, 1, 1], by power iteration from a fixed start that no
// Gram of practice is orthogonal to.
at::Tensor largest_eigenvalue(const at::Tensor& gram) {  // [B, K, K]
  const at::Tensor index = at::arange(1, gram.size(2) + 1, gram.options().dtype(at::kDouble));
  at::Tensor v = index.mul(0.6180339887)
                     .frac_()
                     .add_(0.5)
                     .to(gram.scalar_type())
                     .expand({gram.size(0), -1})
                     .unsqueeze(2);
  at::Tensor eigenvalue = at::zeros({gram.size(0), 1, 1}, gram.options()),
             growing = eigenvalue.eq(0);
  for (int64_t batch = 0; batch < kPowerBatches && growing.any().item<bool>(); ++batch) {
    for (int64_t i = 0; i < kPowerBatch; ++i)
      v = at::matmul(gram, v / v.norm(2, {1}, true).clamp_min(kTiny));
    const at::Tensor last = eigenvalue, norm = v.norm(2, {1}, true);
    eigenvalue =
        at::where(growing, norm,
                  eigenvalue);  // whoever has converged keeps it: no Gram depends on its neighbours
    growing = growing.logical_and((eigenvalue - last).gt(eigenvalue * kPowerGrowth));
  }
  return eigenvalue;
}

struct Rows {
  at::Tensor weight;  // [B, n, K]
  at::Tensor step;  // [B, K, K] symmetric: minus H / lambda_max times the step size (ista, fista),
                    // rho (H + rho I)^-1 (admm)
  at::Tensor threshold;  // [B, n, 1]
  int64_t group_size;
  MagrSolver solver;
};

// point (ista, fista) or weight (admm) + offset step -> point
void add_product(const Rows& rows, const at::Tensor& offset, at::Tensor& point) {
  if (rows.solver == MagrSolver::admm) point.copy_(rows.weight);
  if (point.size(0) == 1) {
    point.select(0, 0).addmm_(offset.select(0, 0), rows.step.select(0, 0));
  } else {
    point.baddbmm_(offset, rows.step);
  }
}

at::Tensor solve(const Rows& rows, int64_t iters) {
  const int64_t B = rows.weight.size(0), n = rows.weight.size(1), K = rows.weight.size(2);
  const at::Tensor weight = rows.weight.contiguous(), threshold = rows.threshold.contiguous();
  at::Tensor point = weight.clone();
  const at::Tensor offset = at::zeros_like(weight),
                   changed = at::empty({B * n}, weight.options().dtype(at::kInt));
  const bool ista = rows.solver == MagrSolver::ista, admm = rows.solver == MagrSolver::admm;
  const at::Tensor value = ista ? point : weight.clone(),
                   dual = admm ? at::zeros_like(weight) : offset;
  const at::Tensor clamp = at::zeros({B * n, group_count(K, rows.group_size)}, weight.options());
  const at::Tensor inertia = at::ones({B * n}, weight.options());
  const MagrRows leaf{rows.solver,
                      B * n,
                      K,
                      rows.group_size,
                      weight.const_data_ptr<float>(),
                      threshold.const_data_ptr<float>(),
                      point.mutable_data_ptr<float>(),
                      offset.mutable_data_ptr<float>(),
                      value.mutable_data_ptr<float>(),
                      dual.mutable_data_ptr<float>(),
                      clamp.mutable_data_ptr<float>(),
                      inertia.mutable_data_ptr<float>(),
                      changed.mutable_data_ptr<int32_t>()};
  for (int64_t k = 0; k < iters; ++k) {
    if (k > 0) add_product(rows, offset, point);  // the first product is zero
    TORCHQUANT_RUN(magr_rows, weight, leaf);
    if (k % kIterationsPerLook == 0 && !changed.any().item<bool>()) break;
  }
  return value;
}

// The factor of the product and the threshold of the prox, [B, 1, 1]. An all-zero Gram gets no
// threshold: its rows stay.
std::tuple<at::Tensor, at::Tensor> step_and_threshold(const at::Tensor& gram, double alpha,
                                                      MagrSolver solver) {
  const at::Tensor eigenvalue = largest_eigenvalue(gram), alive = eigenvalue.gt(0);
  const at::Tensor normalized =
      gram / at::where(alive, eigenvalue, at::ones({}, eigenvalue.options()));
  const at::Tensor relative = alive.to(at::kFloat) * alpha;
  if (solver == MagrSolver::ista) return {normalized.neg(), relative};
  if (solver == MagrSolver::fista) return {normalized * -kFistaStep, relative * kFistaStep};
  const at::Tensor identity = at::eye(gram.size(2), gram.options());
  return {std::get<0>(at::linalg_inv_ex(normalized + identity * kRho)) * kRho, relative / kRho};
}

at::Tensor magr_preprocess(const at::Tensor& weight,  // [N, K]
                           const at::Tensor& gram,    // [K, K] or [B, K, K]
                           double alpha, int64_t iters, int64_t group_size,
                           std::string_view solver_name) {
  const char* op = "magr_preprocess";
  check_device(op, weight);
  check_group_size(op, group_size);
  TORCH_CHECK_VALUE(alpha >= 0 && std::isfinite(alpha), op,
                    ": alpha must be finite and not negative, got ", alpha);
  TORCH_CHECK_VALUE(iters >= 0, op, ": iters must not be negative, got ", iters);
  const MagrSolver solver = parse_solver(op, solver_name);

  const c10::DeviceGuard guard(weight.device());
  const at::NoTF32Guard no_tf32;
  const GramProblem p = gram_problem(op, weight, gram);
  at::Tensor result = p.weight.clone();
  if (result.numel() == 0 || iters == 0 || alpha == 0) return result.view(weight.sizes());
  at::Tensor step, threshold;
  const auto prepare = [&] {
    std::tie(step, threshold) = step_and_threshold(p.gram, alpha, solver);
  };
  p.weight.is_cuda() ? prepare() : run_on_one_thread(prepare);
  threshold = threshold.expand({p.weight.size(0), p.weight.size(1), 1});

  const int64_t columns = weight.size(1);
  for_each_part(p.weight, rows_per_part(columns), [&](const Part& part) {
    const Rows rows{part.rows(p.weight), part.problems(step), part.rows(threshold),
                    group_size == 0 ? columns : group_size, solver};
    part.rows(result).copy_(solve(rows, iters));
  });
  return result.view(weight.sizes());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(torchquant, m) {
  m.def(
      "magr_preprocess(Tensor weight, Tensor gram, *, float alpha=1e-3, int iters=200, int "
      "group_size=0, str solver=\"ista\") -> "
      "Tensor");
}

TORCH_LIBRARY_IMPL(torchquant, CPU, m) { m.impl("magr_preprocess", magr_preprocess); }
#ifdef TORCHQUANT_CUDA
TORCH_LIBRARY_IMPL(torchquant, CUDA, m) { m.impl("magr_preprocess", magr_preprocess); }
#endif

}  // namespace torchquant
