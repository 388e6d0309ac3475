#include <csrc/core/damped_factor.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <csrc/core/parallel.h>

#include <tuple>

namespace torchquant {
namespace {

constexpr int kDampingSteps =
    3;  // how often damping is raised tenfold before rounding is all that is left
constexpr double kFirstDamping = 1e-3;  // where the ladder starts when none was asked for
constexpr int64_t kSmallInverse = 96;   // columns up to which a triangular solve is as fast

// The inverse of upper triangular matrices [B, K, K] by halves: two products where a triangular
// solve against the identity takes twice the operations at half the rate.
at::Tensor inverse_of_upper(const at::Tensor& upper) {
  const int64_t K = upper.size(1), half = K / 2;
  if (K <= kSmallInverse) {
    const at::Tensor identity = at::eye(K, upper.options()).expand_as(upper);
    return at::linalg_solve_triangular(upper, identity, /*upper=*/true);
  }
  const auto part = [&](const at::Tensor& x, int64_t row, int64_t column) {
    return x.narrow(1, row, row == 0 ? half : K - half)
        .narrow(2, column, column == 0 ? half : K - half);
  };
  const at::Tensor first = inverse_of_upper(part(upper, 0, 0));
  const at::Tensor last = inverse_of_upper(part(upper, half, half));
  at::Tensor inverse = at::zeros(upper.sizes(), upper.options());
  part(inverse, 0, 0).copy_(first);
  part(inverse, half, half).copy_(last);
  part(inverse, 0, half).copy_(at::bmm(first, at::bmm(part(upper, 0, half), last)).neg_());
  return inverse;
}

// With the order of the columns reversed, H + damping I = R R^T for an upper triangular R, so
// U = R^-1: one factorization and one inverse, where the textbook inverts H and factors the
// inverse, which fails sooner. Returns U and where it failed [B, 1, 1].
std::tuple<at::Tensor, at::Tensor> inverse_factor(const at::Tensor& gram,
                                                  const at::Tensor& damping) {
  at::Tensor reversed = gram.flip({1, 2});
  reversed.diagonal(0, 1, 2).add_(damping.squeeze(2));
  const auto [lower, info] = at::linalg_cholesky_ex(reversed);
  const at::Tensor upper = inverse_of_upper(lower.flip({1, 2}));
  const at::Tensor finite = upper.sum({1, 2}, true).isfinite();
  return {upper, info.ne(0).view({-1, 1, 1}).logical_or(finite.logical_not())};
}

DampedFactor factorize(const at::Tensor& gram, double damp) {
  const at::Tensor mean = gram.diagonal(0, 1, 2).mean(-1).view({-1, 1, 1});
  const at::Tensor unit =
      at::where(mean.gt(0), mean, at::ones_like(mean));  // an all-zero Gram: plain rounding
  DampedFactor f{{}, at::where(mean.gt(0), unit * damp, unit), {}};
  std::tie(f.upper, f.failed) = inverse_factor(gram, f.damping);
  for (; f.raised < kDampingSteps && f.failed.any().item<bool>(); ++f.raised) {
    const at::Tensor more = at::maximum(f.damping * 10, unit * kFirstDamping);
    f.damping = at::where(f.failed, more, f.damping);
    const auto [upper, still] = inverse_factor(gram, f.damping);
    f.upper = at::where(f.failed, upper, f.upper);
    f.failed = f.failed.logical_and(still);
  }
  if (f.failed.any().item<bool>()) {
    f.upper = at::where(f.failed, at::eye(gram.size(1), gram.options()), f.upper);
  }
  return f;
}

}  // namespace

int64_t DampedFactor::status() const {
  if (failed.any().item<bool>()) return 2;
  return raised > 0 ? 1 : 0;
}

DampedFactor damped_factor(const at::Tensor& gram, double damp) {
  if (gram.is_cuda()) return factorize(gram, damp);
  DampedFactor factor;
  run_on_one_thread([&] { factor = factorize(gram, damp); });
  return factor;
}

}  // namespace torchquant
