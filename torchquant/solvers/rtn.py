"""Round to nearest, and the way back from codes to values."""

from collections.abc import Sequence

import torch
from torch import Tensor


def rtn_quantize(
    weight: Tensor, *, bits: int, group_size: int = 0, grid: str = "asymmetric", shrink: Sequence[float] = (1.0,)
) -> tuple[Tensor, Tensor, Tensor]:
    """Round each weight to the nearest level of its row's (or group's) grid.

    ``code = clamp(round(w / scale + zero_point), 0, 2**bits - 1)``, ``value = (code - zero_point) * scale``.

    Args:
        weight: ``[N, K]`` float32, float16 or bfloat16; N outputs, K inputs.
        bits: 2..8.
        group_size: columns that share one scale; 0 = the whole row; the last group may be ragged.
        grid: ``"asymmetric"`` (integral zero point from min and max), ``"symmetric"`` (zero point ``2**(bits-1)``) or
            ``"midrise"`` (zero point ``(2**bits - 1) / 2``: the levels are odd multiples of scale / 2).
        shrink: factors on the scale; per group the one with the smallest squared weight error is kept.

    Returns:
        codes uint8 ``[N, K]``, scale float32 ``[N, G]``, zero_point float32 ``[N, G]``; ``G = ceil(K / group_size)``.

    Raises:
        ValueError: wrong shape, bits, group size, grid or shrink, or a NaN or Inf. TypeError: wrong dtype.
    """
    return torch.ops.torchquant.rtn_quantize(weight, bits=bits, group_size=group_size, grid=grid, shrink=list(shrink))


@torch.library.register_fake("torchquant::rtn_quantize")
def _(weight, *, bits, group_size=0, grid="asymmetric", shrink=(1.0,)):  # type: ignore[no-untyped-def]
    return empty_codes(weight, group_size)


def empty_codes(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fake outputs (codes, scale, zero_point) of every weight solver."""
    rows, columns = weight.shape
    groups = 1 if group_size == 0 else (columns + group_size - 1) // group_size
    codes = weight.new_empty((rows, columns), dtype=torch.uint8)
    scale = weight.new_empty((rows, groups), dtype=torch.float32)
    return codes, scale, torch.empty_like(scale)
