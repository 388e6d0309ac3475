"""GPTQ: error feedback through the inverse Gram matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .rtn import empty_codes


def gptq_quantize(
    weight: Tensor,
    gram: Tensor,
    *,
    bits: int,
    group_size: int = 0,
    grid: str = "asymmetric",
    shrink: Sequence[float] | None = None,
    damp: float = 0.01,
    block_size: int = 128,
    order: str = "natural",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round columns one after another, moving each error onto the columns behind it (arXiv 2210.17323).

    With ``(H + damp * mean(diag H) I)^-1 = U^T U``: ``e = (w_j - q_j) / U_jj``, then ``w_k -= e U_jk`` for ``k > j``.
    Group grids are fitted once, to the given weight. A Gram that is not positive definite has its damping raised
    tenfold up to three times; if that does not help, the rows are rounded. Both are declared in ``info``, never raised.

    Args:
        weight: ``[N, K]`` float32, float16 or bfloat16.
        gram: ``H = X^T X`` ``[K, K]`` float32 or float64, or ``[B, K, K]``: B problems of N / B consecutive rows each.
        bits: 2..8.
        group_size: columns that share one scale; 0 = the whole row; the last group may be ragged.
        grid: ``"asymmetric"``, ``"symmetric"`` or ``"midrise"`` (see :func:`rtn_quantize`).
        shrink: factors on the grid; the best per row by the objective is kept. None = 1, .9, .8, .65, .5.
        damp: added to the diagonal, relative to its mean.
        block_size: columns between two matrix products; changes the speed, not the result.
        order: ``"natural"`` or ``"activation"`` (descending diagonal of the Gram).

    Returns:
        codes uint8 ``[N, K]``, scale float32 ``[N, G]``, zero_point float32 ``[N, G]``, info int64 ``[3]`` = {status:
        0 ok, 1 damping raised, 2 rounded; dead inputs; times damping was raised}.

    Raises:
        ValueError: wrong shape, device, option, or a NaN or Inf. TypeError: wrong dtype.
    """
    return torch.ops.torchquant.gptq_quantize(
        weight,
        gram,
        bits=bits,
        group_size=group_size,
        grid=grid,
        shrink=None if shrink is None else list(shrink),
        damp=damp,
        block_size=block_size,
        order=order,
    )


@torch.library.register_fake("torchquant::gptq_quantize")
def _(weight, gram, *, group_size=0, **options):  # type: ignore[no-untyped-def]
    return *empty_codes(weight, group_size), weight.new_empty(3, dtype=torch.int64)
