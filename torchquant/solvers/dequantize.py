"""The way back from codes to values, and the error it leaves."""

import torch
from torch import Tensor


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, *, group_size: int = 0) -> Tensor:
    """``(codes - zero_point) * scale``: float32 ``[N, K]``.

    Args:
        codes: uint8 ``[N, K]``.
        scale, zero_point: ``[N, G]``, ``G = ceil(K / group_size)``.
        group_size: columns that share one scale; 0 = the whole row.

    Raises:
        ValueError: shapes that do not belong together. TypeError: codes not uint8.
    """
    return torch.ops.torchquant.dequantize(codes, scale, zero_point, group_size=group_size)


def quantization_error(
    weight: Tensor, gram: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, *, group_size: int = 0
) -> Tensor:
    """Squared output error of each row, ``(w - q) H (w - q)^T``: float32 ``[N]``.

    Args:
        weight: ``[N, K]``.
        gram: ``[K, K]``, or ``[B, K, K]``: B problems of N / B consecutive rows each.
        codes, scale, zero_point, group_size: as for :func:`dequantize`.

    Raises:
        ValueError: shapes that do not belong together, or a NaN or Inf. TypeError: wrong dtype.
    """
    return torch.ops.torchquant.quantization_error(weight, gram, codes, scale, zero_point, group_size=group_size)


@torch.library.register_fake("torchquant::dequantize")
def _(codes, scale, zero_point, *, group_size=0):  # type: ignore[no-untyped-def]
    return torch.empty_like(codes, dtype=torch.float32, memory_format=torch.contiguous_format)


@torch.library.register_fake("torchquant::quantization_error")
def _(weight, gram, codes, scale, zero_point, *, group_size=0):  # type: ignore[no-untyped-def]
    return weight.new_empty(weight.shape[0], dtype=torch.float32)
