"""MagR: smaller weight magnitudes at nearly the same outputs (arXiv 2406.00800)."""

import torch
from torch import Tensor


def magr_preprocess(
    weight: Tensor,
    gram: Tensor,
    *,
    alpha: float = 1e-3,
    iters: int = 200,
    group_size: int = 0,
    solver: str = "ista",
) -> Tensor:
    """Shrink the largest magnitude of each row, moving the weight where the layer's inputs hardly see it.

    Per row ``w`` (and group of columns) of the weight ``w0``: ``min_w 1/2 (w - w0) H (w - w0)^T + alpha max|w|`` with
    ``H = gram / lambda_max(gram)``. After it min = -max holds in nearly every row: quantize it on the ``"midrise"``
    grid, with the original weight as the target (``linear = weight @ gram`` of ``comq_quantize``).

    Every iterate of ``"ista"`` keeps ``(w - w0) H (w - w0)^T <= 2 alpha max|w0|``. How far to go is part of the method:
    the default is far from converged; 300 to 500 steps of ``"fista"`` pay at 2 and 3 bits, at 4 bits less is more.

    Args:
        weight: ``[N, K]`` float32, float16 or bfloat16.
        gram: ``[K, K]``, or ``[B, K, K]`` for B Grams with N / B consecutive rows each; float32 or float64. Where it is
            all zero the rows stay as they are.
        alpha: weight of the maximum, relative to ``lambda_max(gram)`` and in the unit of the weight; 0 = no change. The
            paper uses 1e-3 per row, 1e-4 with groups.
        iters: steps; fewer run when nothing changes any more.
        group_size: columns that share one maximum; 0 = the whole row; the last group may be ragged.
        solver: ``"ista"`` (the paper's proximal gradient), ``"fista"`` (with momentum that restarts per row; about 40
            steps reach the objective of 200 ``"ista"`` steps) or ``"admm"`` (for full convergence; stopped early it
            stands elsewhere).

    Returns:
        float32 ``[N, K]``; the same for any number of threads.

    Raises:
        ValueError: wrong shape, device or option, or a NaN or Inf. TypeError: wrong dtype.
    """
    return torch.ops.torchquant.magr_preprocess(
        weight, gram, alpha=alpha, iters=iters, group_size=group_size, solver=solver
    )


@torch.library.register_fake("torchquant::magr_preprocess")
def _(weight, gram, *, alpha=1e-3, iters=200, group_size=0, solver="ista"):  # type: ignore[no-untyped-def]
    return weight.new_empty(weight.shape, dtype=torch.float32)
