#include <csrc/core/damped_factor.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <csrc/core/cholesky.h>
#include <csrc/core/parallel.h>

#include <tuple>

namespace torchquant {
namespace {

constexpr int kDampingSteps =
    3;  // how often damping is raised tenfold before rounding is all that is left
constexpr double kFirstDamping = 1e-3;  // where the ladder starts when none was asked for
constexpr int64_t kSmallInverse = 96;   // columns up to which a triangular solve is as fast

// The inverse of upper triangular matrices [B, K, K] by halves, into zeros: two products where a
// triangular solve against the identity takes twice the operations at half the rate.
void invert_upper(const at::Tensor& upper, const at::Tensor& inverse) {
  const int64_t K = upper.size(1), half = K / 2;
  if (K <= kSmallInverse) {
    const at::Tensor identity = at::eye(K, upper.options()).expand_as(upper);
    inverse.copy_(at::linalg_solve_triangular(upper, identity, /*upper=*/true));
    return;
  }
  const auto part = [&](const at::Tensor& x, int64_t row, int64_t column) {
    return x.narrow(1, row, row == 0 ? half : K - half)
        .narrow(2, column, column == 0 ? half : K - half);
  };
  const at::Tensor first = part(inverse, 0, 0), last = part(inverse, half, half);
  invert_upper(part(upper, 0, 0), first);
  invert_upper(part(upper, half, half), last);
  part(inverse, 0, half).baddbmm_(first, at::bmm(part(upper, 0, half), last), 0, -1);
}

// R with H + damping I = R R^T, and where it failed or has no inverse [B, 1, 1].
std::tuple<at::Tensor, at::Tensor> factor(const at::Tensor& gram, const at::Tensor& damping) {
  const at::Tensor upper = gram.clone();
  const at::Tensor diagonal = upper.diagonal(0, 1, 2);
  diagonal.add_(damping.squeeze(2));
  const at::Tensor failed = cholesky_(upper);
  const at::Tensor finite = diagonal.reciprocal().sum(1).isfinite();
  return {upper, failed.logical_or(finite.logical_not()).view({-1, 1, 1})};
}

// U = R^-1: one factorization and one inverse, where the textbook inverts H and factors the
// inverse, which fails sooner.
std::tuple<at::Tensor, at::Tensor> inverse_factor(const at::Tensor& gram,
                                                  const at::Tensor& damping) {
  const auto [upper, failed] = factor(gram, damping);
  const at::Tensor inverse = at::zeros(upper.sizes(), upper.options());
  invert_upper(upper, inverse);
  const at::Tensor finite = inverse.sum({1, 2}, true).isfinite();
  return {inverse, failed.logical_or(finite.logical_not())};
}

template <class Factor>
DampedFactor factorize(const at::Tensor& gram, double damp, const Factor& factor_of) {
  const at::Tensor mean = gram.diagonal(0, 1, 2).mean(-1).view({-1, 1, 1});
  const at::Tensor unit =
      at::where(mean.gt(0), mean, at::ones_like(mean));  // an all-zero Gram: plain rounding
  DampedFactor f{{}, at::where(mean.gt(0), unit * damp, unit), {}};
  std::tie(f.upper, f.failed) = factor_of(gram, f.damping);
  for (; f.raised < kDampingSteps && f.failed.any().item<bool>(); ++f.raised) {
    const at::Tensor more = at::maximum(f.damping * 10, unit * kFirstDamping);
    f.damping = at::where(f.failed, more, f.damping);
    const auto [upper, still] = factor_of(gram, f.damping);
    f.upper = at::where(f.failed, upper, f.upper);
    f.failed = f.failed.logical_and(still);
  }
  if (f.failed.any().item<bool>()) {
    f.upper = at::where(f.failed, at::eye(gram.size(1), gram.options()), f.upper);
  }
  return f;
}

template <class Factor>
DampedFactor on_one_thread(const at::Tensor& gram, double damp, const Factor& factor_of) {
  if (gram.is_cuda()) return factorize(gram, damp, factor_of);
  DampedFactor f;
  run_on_one_thread([&] { f = factorize(gram, damp, factor_of); });
  return f;
}

}  // namespace

int64_t DampedFactor::status() const {
  if (failed.any().item<bool>()) return 2;
  return raised > 0 ? 1 : 0;
}

DampedFactor damped_factor(const at::Tensor& gram, double damp) {
  return on_one_thread(gram, damp, inverse_factor);
}

DampedFactor damped_cholesky(const at::Tensor& gram, double damp) {
  return on_one_thread(gram, damp, factor);
}

}  // namespace torchquant
