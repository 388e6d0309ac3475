"""Attention with the projections around it as one operator."""

import torch
from torch import Tensor


def quantized_self_attention(
    x: Tensor,
    qkv: list[Tensor],
    qkv_numbers: list[int],
    proj: list[Tensor],
    proj_numbers: list[int],
    scales: list[Tensor],
    zero_points: list[Tensor],
    bits: int,
    softmax: list[Tensor],
    softmax_bits: int = 8,
    *,
    num_heads: int,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    symmetric: bool = False,
) -> Tensor:
    """``proj(attention(qkv(x)))`` of ``num_heads`` heads: `quantized_linear`, `quantized_attention`,
    `quantized_linear`, with codes of q, k and v in between, and of the input of ``proj`` where it has a grid.

    Layers are as in `quantized_mlp`; the outputs of ``qkv`` are those of q, then k, then v, each head by head.

    Args:
        x: float or uint8 ``[B, T, K]``: what `quantized_linear` takes for ``qkv``.
        scales, zero_points: those of q, k and v, float32 of one number each; or none: each token of a head has its own
            grid, as `torchquant.quantizers.dynamic_quantize` finds it.
        bits: of their codes, 2..8.
        softmax: of `quantized_attention` a table ``[thresholds, exponents, eta]``, a grid ``[scale, zero_point]`` of
            ``softmax_bits``, or nothing.
        mask, scale, is_causal: as in `quantized_attention`.
        symmetric: of grids of tokens.

    Returns:
        ``[B, T, N]`` float32.

    Raises:
        ValueError: lists of other lengths, heads that do not divide the outputs of ``qkv``; and what the operators
            inside raise. NotImplementedError: not on the CPU.
    """
    return torch.ops.torchquant.quantized_self_attention(
        x,
        qkv,
        qkv_numbers,
        proj,
        proj_numbers,
        scales,
        zero_points,
        bits,
        softmax,
        softmax_bits,
        num_heads=num_heads,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        symmetric=symmetric,
    )


@torch.library.register_fake("torchquant::quantized_self_attention")
def _(x, qkv, qkv_numbers, proj, proj_numbers, *rest, **options):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], proj_numbers[2]), dtype=torch.float32)
