#include <csrc/core/cholesky.h>

#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>

namespace torchquant {
namespace {

constexpr int64_t kSmall = 192;  // columns that LAPACK factors, and one product updates, as fast

struct Blocks {  // [first side; - last] of symmetric or upper triangular matrices
  explicit Blocks(const at::Tensor& matrix)
      : half(matrix.size(1) / 2),
        rest(matrix.size(1) - half),
        first(matrix.narrow(1, 0, half).narrow(2, 0, half)),
        side(matrix.narrow(1, 0, half).narrow(2, half, rest)),
        last(matrix.narrow(1, half, rest).narrow(2, half, rest)) {}
  int64_t half, rest;
  at::Tensor first, side, last;
};

at::Tensor factor_small(const at::Tensor& matrix) {
  const auto [lower, info] = at::linalg_cholesky_ex(matrix.flip({1, 2}));
  matrix.copy_(lower.flip({1, 2}));
  return info.ne(0);
}

// matrix -= side side^T on and above the diagonal.
void subtract_square(const at::Tensor& matrix, const at::Tensor& side) {
  if (matrix.size(1) <= kSmall) {
    matrix.baddbmm_(side, side.mT(), 1, -1);
    return;
  }
  const Blocks m(matrix);
  const at::Tensor above = side.narrow(1, 0, m.half), below = side.narrow(1, m.half, m.rest);
  subtract_square(m.first, above);
  m.side.baddbmm_(above, below.mT(), 1, -1);
  subtract_square(m.last, below);
}

// By halves: with A22 = R2 R2^T and S = A12 R2^-T, A11 - S S^T = R1 R1^T.
at::Tensor factor(const at::Tensor& matrix) {
  if (matrix.size(1) <= kSmall) return factor_small(matrix);
  const Blocks m(matrix);
  const at::Tensor failed = factor(m.last);
  m.side.copy_(at::linalg_solve_triangular(m.last.mT(), m.side, /*upper=*/false, /*left=*/false));
  subtract_square(m.first, m.side);
  return failed.logical_or(factor(m.first));
}

}  // namespace

// On the CPU, ATen's own factorization of a large matrix spends two thirds of its time zeroing a
// triangle, element by element against the order of memory.
at::Tensor cholesky_(const at::Tensor& matrix) {
  return matrix.is_cuda() ? factor_small(matrix) : factor(matrix);
}

}  // namespace torchquant
