"""A transformer block as one operator."""

import torch
from torch import Tensor


def quantized_block(
    x: Tensor,
    norms: list[Tensor],
    eps: list[float],
    qkv: list[Tensor],
    qkv_numbers: list[int],
    proj: list[Tensor],
    proj_numbers: list[int],
    scales: list[Tensor],
    zero_points: list[Tensor],
    bits: int,
    softmax: list[Tensor],
    softmax_bits: int,
    fc1: list[Tensor],
    fc1_numbers: list[int],
    fc2: list[Tensor],
    fc2_numbers: list[int],
    *,
    num_heads: int,
    scale: float | None = None,
    symmetric: bool = False,
    activation: str = "gelu",
) -> Tensor:
    """``y = x + attention(norm1(x))``, then ``y + mlp(norm2(y))``: `quantized_layer_norm`, `quantized_self_attention`,
    `quantized_layer_norm`, `quantized_mlp`, with the additions in the last products' epilogues.

    A few sequences at a time pass from the beginning to the end, so that what lies between stays in the caches. A norm
    gives codes where the layer behind it takes them, and floats elsewhere.

    Args:
        x: float32 ``[B, T, K]``.
        norms: weight and bias ``[K]`` of the first norm, then of the second; an empty tensor where there is none.
        eps: of both norms.
        qkv, ..., softmax_bits, num_heads, scale, symmetric: as in `quantized_self_attention`.
        fc1, ..., fc2_numbers, activation: as in `quantized_mlp`.

    Returns:
        ``[B, T, K]`` float32.

    Raises:
        TypeError: x is not float32. ValueError: not four norm tensors and two eps, other than K outputs of ``proj`` or
            ``fc2``; and what the operators inside raise. NotImplementedError: not on the CPU.
    """
    return torch.ops.torchquant.quantized_block(
        x,
        norms,
        eps,
        qkv,
        qkv_numbers,
        proj,
        proj_numbers,
        scales,
        zero_points,
        bits,
        softmax,
        softmax_bits,
        fc1,
        fc1_numbers,
        fc2,
        fc2_numbers,
        num_heads=num_heads,
        scale=scale,
        symmetric=symmetric,
        activation=activation,
    )


@torch.library.register_fake("torchquant::quantized_block")
def _(x, *rest, **options):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)
