#include <csrc/core/cholesky.h>

#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>

namespace torchquant {
namespace {

constexpr int64_t kSmall = 192;  // columns that LAPACK factors as fast as any

// By halves: A = [L1 0; S L2] [L1 0; S L2]^T, so L1 = chol(A11), S = A21 L1^-T, L2 = chol(A22 - S
// S^T). Leaves what is above the diagonal.
at::Tensor factor_lower(const at::Tensor& matrix) {
  const int64_t K = matrix.size(1), half = K / 2;
  if (K <= kSmall) {
    const auto [lower, info] = at::linalg_cholesky_ex(matrix);
    matrix.copy_(lower);
    return info.ne(0);
  }
  const at::Tensor first = matrix.narrow(1, 0, half).narrow(2, 0, half);
  const at::Tensor side = matrix.narrow(1, half, K - half).narrow(2, 0, half);
  const at::Tensor last = matrix.narrow(1, half, K - half).narrow(2, half, K - half);
  const at::Tensor failed = factor_lower(first);
  side.copy_(at::linalg_solve_triangular(first.mT(), side, /*upper=*/true, /*left=*/false));
  last.baddbmm_(side, side.mT(), 1, -1);
  return failed.logical_or(factor_lower(last));
}

}  // namespace

// On the CPU, ATen's own factorization of a large matrix spends two thirds of its time zeroing the
// upper triangle, element by element against the order of memory.
at::Tensor cholesky_(const at::Tensor& matrix) {
  if (matrix.is_cuda()) {
    const auto [lower, info] = at::linalg_cholesky_ex(matrix);
    matrix.copy_(lower);
    return info.ne(0);
  }
  const at::Tensor failed = factor_lower(matrix);
  matrix.tril_();
  return failed;
}

}  // namespace torchquant
