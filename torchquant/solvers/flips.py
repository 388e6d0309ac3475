"""Halving with rounding refinement (Wqer of ERQ): columns are rounded by halves, the rest answers for their error."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .rtn import empty_codes


def flips_quantize(
    weight: Tensor,
    gram: Tensor,
    *,
    bits: int,
    group_size: int = 0,
    grid: str = "asymmetric",
    shrink: Sequence[float] | None = None,
    ridge: float = 0.01,
    order: str = "natural",
    refine: str = "best",
    steps: int = 100,
    solver: str = "halving",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round half of the remaining columns, refine which way, move their error onto the others (arXiv 2407.06794).

    With S the half and R the rest: ``d = round(w_S) - w_S``; single codes flip to the other side of their weight while
    that lowers ``d H_SS d^T``; then ``w_R -= d H_SR (H_RR + l I)^-1``. One Cholesky factorization serves every half.
    Grids are fitted once, to the given weight. A Gram that is not positive definite has its ridge raised tenfold up to
    three times; if that does not help, the rows are rounded. Both are declared in ``info``, never raised.

    Args:
        weight: ``[N, K]`` float32, float16 or bfloat16.
        gram: ``H`` of the (quantized) inputs ``[K, K]`` float32 or float64, or ``[B, K, K]``: B problems of N / B
            consecutive rows each.
        bits: 2..8.
        group_size: columns that share one scale; 0 = the whole row; the last group may be ragged.
        grid: ``"asymmetric"``, ``"symmetric"`` or ``"midrise"`` (see :func:`rtn_quantize`).
        shrink: factors on the grid; the best per row by the objective is kept. None = 1, .9, .8, .65, .5; the
            publication has [1].
        ridge: ``l`` relative to the mean of the Gram's diagonal.
        order: of the columns: ``"natural"`` (the released code's), ``"activation"`` (descending diagonal of the Gram)
            or ``"error"`` (those with the smallest rounding errors first).
        refine: ``"best"`` takes the flip that lowers the objective most until none lowers it, ``"gradient"`` the
            published rule: the one with the largest gradient until it does not help; ``"none"``.
        steps: flips per row and half at most.
        solver: ``"halving"``, or ``"columnwise"``: one column at a time, which needs no refinement and is
            :func:`gptq_quantize` with this damping.

    Returns:
        codes uint8 ``[N, K]``, scale float32 ``[N, G]``, zero_point float32 ``[N, G]``, info int64 ``[4]`` = {status:
        0 ok, 1 ridge raised, 2 rounded; dead inputs; times the ridge was raised; flips}. The same for any number of
        threads.

    Raises:
        ValueError: wrong shape, device, option, or a NaN or Inf. TypeError: wrong dtype.
    """
    return torch.ops.torchquant.flips_quantize(
        weight,
        gram,
        bits=bits,
        group_size=group_size,
        grid=grid,
        shrink=None if shrink is None else list(shrink),
        ridge=ridge,
        order=order,
        refine=refine,
        steps=steps,
        solver=solver,
    )[:4]


def flips_quantize_with_bias(
    weight: Tensor, gram: Tensor, *, bits: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`flips_quantize` for a layer whose bias answers for the weights' errors too. It is never quantized.

    Args:
        weight: ``[N, K + 1]``, the bias as the last column.
        gram: ``[K + 1, K + 1]`` or ``[B, K + 1, K + 1]`` of the inputs with an input of ones as the last; the ridge is
            relative to the mean of their variances and spares the bias.
        options: as for :func:`flips_quantize`.

    Returns:
        codes uint8 ``[N, K]``, scale, zero_point, info, and the new bias float32 ``[N, 1]``.
    """
    return torch.ops.torchquant.flips_quantize(weight, gram, bits=bits, bias_column=True, **options)


@torch.library.register_fake("torchquant::flips_quantize")
def _(weight, gram, *, group_size=0, bias_column=False, **options):  # type: ignore[no-untyped-def]
    columns = weight.shape[1] - int(bias_column)
    grids = empty_codes(weight[:, :columns], group_size)
    bias = weight.new_empty((weight.shape[0], int(bias_column)), dtype=torch.float32)
    return *grids, weight.new_empty(4, dtype=torch.int64), bias
