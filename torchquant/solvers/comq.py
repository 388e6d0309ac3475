"""COMQ: coordinate-wise minimisation of the layer's output error."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .rtn import empty_codes


def comq_quantize(
    weight: Tensor,
    gram: Tensor,
    *,
    bits: int,
    group_size: int = 0,
    grid: str = "asymmetric",
    linear: Tensor | None = None,
    sweeps: int = 3,
    order: str = "shared",
    update_scale: bool = True,
    shrink: Sequence[float] | None = None,
    init: str = "weight",
    codes: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Minimise ``tr((W - Q) H (W - Q)^T)`` over codes and scales, one coordinate at a time (arXiv 2403.07134).

    Code step: ``u = Q_j + G_j / H_jj`` with ``G = P - Q H``, rounded to the grid. Scale step (eq. 10):
    ``<c, P> / (c H c)`` per row, ``scale_g += c_g G_g / (c_g H_gg c_g)`` per group. From the second sweep on no step
    raises the objective. Needs no inverse.

    Args:
        weight: ``[N, K]`` float32, float16 or bfloat16; gives the grid and the start.
        gram: ``H = X^T X`` of the layer's inputs, ``[K, K]`` float32 or float64, or ``[B, K, K]``: B problems of N / B
            consecutive rows each (grouped convolution).
        bits: 2..8.
        group_size: columns that share one scale; 0 = the whole row; the last group may be ragged.
        grid: ``"asymmetric"``, ``"symmetric"`` or ``"midrise"`` (see :func:`rtn_quantize`); after MagR use midrise.
        linear: target ``P`` ``[N, K]``, default ``weight @ gram``. After MagR: original weight @ gram. With quantized
            inputs X~: ``weight @ (X^T X~)`` and ``gram = X~^T X~``.
        sweeps: passes over all coordinates; fewer when no code changes any more.
        order: ``"shared"`` (descending diagonal of the Gram, for all rows), ``"greedy"`` (the paper's: each row by
            ``|w_ij| sqrt(H_jj)``), ``"semi"`` (shared blocks of 128, greedy inside) or ``"cyclic"``.
        update_scale: also minimise over the scales.
        shrink: factors on the first grid; the best per row by the objective is kept. None = 1, .9, .8, .65, .5.
        init: ``"weight"`` (coordinates not yet visited stay float), ``"rtn"`` or ``"gptq"``.
        codes, scale, zero_point: start from this quantization instead (all three; no search).

    Returns:
        codes uint8 ``[N, K]``, scale float32 ``[N, G]``, zero_point float32 ``[N, G]``, info int64 ``[3]`` = {status:
        0 ok, 1 damping raised, 2 rounded (both only from ``init="gptq"``); dead inputs; times damping was raised}.

    Raises:
        ValueError: wrong shape, device, option, or a NaN or Inf. TypeError: wrong dtype.
    """
    return torch.ops.torchquant.comq_quantize(
        weight,
        gram,
        bits=bits,
        group_size=group_size,
        grid=grid,
        linear=linear,
        sweeps=sweeps,
        order=order,
        update_scale=update_scale,
        shrink=None if shrink is None else list(shrink),
        init=init,
        codes=codes,
        scale=scale,
        zero_point=zero_point,
    )


@torch.library.register_fake("torchquant::comq_quantize")
def _(weight, gram, *, group_size=0, **options):  # type: ignore[no-untyped-def]
    return *empty_codes(weight, group_size), weight.new_empty(3, dtype=torch.int64)
