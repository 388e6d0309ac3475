"""Convolutions with packed low-bit weights and integer activations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .linear import grid_rows, kernel_groups


def conv_prepack(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    bits: int,
    kernel_size: Sequence[int],
    groups: int = 1,
    group_size: int = 0,
    levels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A convolution's weight in the order in which `quantized_conv2d` reads it; the same for every CPU tier.

    Args:
        codes: uint8 ``[N, C / groups * kh * kw]``, the columns of ``weight.reshape(N, -1)``.
        scale, zero_point: float32 ``[N, G]``, as in `linear_prepack`.
        bits: 2..8.
        kernel_size: kh, kw.
        groups: of the convolution.
        group_size: columns that share a scale.
        levels: int8 ``[2**bits]`` or ``[N, 2**bits]``, as in `linear_prepack`.

    Returns:
        What `linear_prepack` gives for the columns in the order (kh, kw, C) inside each scale's group; for ``groups``
        > 1 the groups' tensors one after the other. Depthwise (one input channel a group, one scale a row): int16
        ``[N, ceil(kh / 2) * kw, 2]``, the integers of pairs of kernel rows; float32 ``[3, N]``; int8 ``[0]``.

    Raises:
        ValueError: wrong shapes or bits, codes beyond ``2**bits``, a zero point beside levels, or a NaN or Inf.
        TypeError: wrong dtype. NotImplementedError: not on a CPU.
    """
    return torch.ops.torchquant.conv_prepack(
        codes,
        scale,
        zero_point,
        bits=bits,
        kernel_size=kernel_size,
        groups=groups,
        group_size=group_size,
        levels=levels,
    )


def quantized_conv2d(
    x: Tensor,
    packed: Tensor,
    grid: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int,
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    group_size: int = 0,
    levels: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    input_bits: int = 8,
    activation: str = "none",
    output_scale: Tensor | None = None,
    output_zero_point: Tensor | None = None,
    output_bits: int = 8,
) -> Tensor:
    """``y = f(conv2d(x, W) + b)`` with x as integers: exact integer sums, the same bits on every tier and for any
    number of threads.

    ``x = (a - input_zero_point) * input_scale``; padding is exactly 0, whatever the zero point. Three kinds of input:

    - float x without ``input_scale``: symmetric integers, ``a = round(x * limit / max|x|)`` with the largest magnitude
      of each sample and limit 127 (``input_bits`` 8) or 32767 (16: as good as float activations);
    - float x with ``input_scale`` ``[]``: the codes that `torchquant.quantizers.uniform_quantize` gives, made inside;
    - uint8 x: such codes, with ``input_scale`` of one number or one for each sample.

    Args:
        x: float32, float16, bfloat16 or uint8 ``[B, C, H, W]``, contiguous or channels_last.
        packed, grid, levels: from `conv_prepack`, with its ``bits``, ``kernel_size``, ``groups`` and ``group_size``.
        bias: float ``[N]``.
        padding: ``[h, w]``, or each side's own: ``[top, bottom, left, right]``.
        input_scale, input_zero_point: float32.
        input_bits: 8 or 16 without ``input_scale``, else 2..8.
        activation: ``"none"``, ``"gelu"`` (exact, erf) or ``"silu"``.
        output_scale, output_zero_point: float32 ``[]``: the outputs become their codes on this grid, those that
            `torchquant.quantizers.uniform_quantize` gives of the float32 outputs (NaN becomes 0).
        output_bits: 2..8, of these codes.

    Returns:
        ``[B, N, H', W']`` in x's dtype (float32 for codes), channels_last where x is; with ``output_scale`` uint8
        codes, channels_last.

    Raises:
        ValueError: wrong shapes, bits or activation, a scale that is not positive, or a NaN or Inf in x.
        TypeError: wrong dtype.
    """
    return torch.ops.torchquant.quantized_conv2d(
        x,
        packed,
        grid,
        bias,
        bits=bits,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        group_size=group_size,
        levels=levels,
        input_scale=input_scale,
        input_zero_point=input_zero_point,
        input_bits=input_bits,
        activation=activation,
        output_scale=output_scale,
        output_zero_point=output_zero_point,
        output_bits=output_bits,
    )


@torch.library.register_fake("torchquant::conv_prepack")
def _(codes, scale, zero_point=None, *, bits, kernel_size, groups=1, group_size=0, levels=None):  # type: ignore[no-untyped-def]
    rows, columns = codes.shape
    taps = kernel_size[0] * kernel_size[1]
    if groups > 1 and columns == taps and taps <= 256 and (group_size == 0 or group_size >= taps):
        pairs = codes.new_empty([rows, (kernel_size[0] + 1) // 2 * kernel_size[1], 2], dtype=torch.int16)
        return pairs, scale.new_empty([3, rows]), codes.new_empty([0], dtype=torch.int8)
    stored = 4 if levels is not None else bits if bits <= 4 else 8
    kernel, blocks = kernel_groups(columns, group_size, stored, levels is not None)
    height = grid_rows(kernel, group_size, stored, levels is not None, zero_point is not None)
    outputs = rows // groups
    tiles = (outputs + 15) // 16
    table = [0] if levels is None else [16] if levels.dim() == 1 else [groups * tiles * 16, 16]
    return (
        codes.new_empty([groups * tiles, blocks, stored, 64]),
        scale.new_empty([groups * height, (outputs + 63) // 64 * 64]),
        codes.new_empty(table, dtype=torch.int8),
    )


@torch.library.register_fake("torchquant::quantized_conv2d")
def _(  # type: ignore[no-untyped-def]
    x,
    packed,
    grid,
    bias=None,
    *,
    bits,
    in_channels,
    out_channels,
    kernel_size,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    output_scale=None,
    **options,
):
    both = (2 * padding[0], 2 * padding[1]) if len(padding) == 2 else (padding[0] + padding[1], padding[2] + padding[3])
    sizes = [(x.shape[2 + i] + both[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    dtype = torch.float32 if x.dtype == torch.uint8 else x.dtype
    y = x.new_empty((x.shape[0], out_channels, *sizes), dtype=dtype if output_scale is None else torch.uint8)
    last = output_scale is not None or (x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
    return y.contiguous(memory_format=torch.channels_last) if last else y
