"""LayerNorm whose outputs are codes: its floats never lie in memory."""

import torch
from torch import Tensor


def quantized_layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    output_scale: Tensor,
    output_zero_point: Tensor,
    output_bits: int = 8,
    eps: float = 1e-5,
) -> Tensor:
    """Codes of ``y = (x - mean) / sqrt(variance + eps) * weight + bias``, mean and (biased) variance over the last
    dimension: ``clamp(round(y / output_scale + output_zero_point), 0, 2**output_bits - 1)``.

    y is as near to LayerNorm in exact arithmetic as float32 is, and its codes are those that
    `torchquant.quantizers.uniform_quantize` gives. On a CPU the same bits on every tier and for any number of threads;
    no gradient. On CUDA `torch.nn.functional.layer_norm` in float32, then the codes.

    Args:
        x: float32, float16 or bfloat16 ``[..., K]``; work is in float32.
        weight, bias: float ``[K]``; None: ones, zeros.
        output_scale, output_zero_point: float32 of one number each.
        output_bits: 2..8.
        eps: added to the variance.

    Returns:
        uint8 ``[..., K]``; code 0 where y is NaN, as sums beyond float32 make it.

    Raises:
        ValueError: wrong shapes, devices or bits, or on a CPU a scale that is not positive or a NaN or Inf in x. On
            CUDA the host never waits for the device: where x has a NaN or Inf, the codes of its row are 0.
        TypeError: wrong dtype.
    """
    return torch.ops.torchquant.quantized_layer_norm(
        x,
        weight,
        bias,
        output_scale=output_scale,
        output_zero_point=output_zero_point,
        output_bits=output_bits,
        eps=eps,
    )


@torch.library.register_fake("torchquant::quantized_layer_norm")
def _(x, weight=None, bias=None, **options):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=torch.uint8)
