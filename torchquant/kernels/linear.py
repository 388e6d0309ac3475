"""Linear layers with packed low-bit weights and integer activations."""

import torch
from torch import Tensor


def linear_prepack(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    bits: int,
    group_size: int = 0,
    levels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in the order in which `quantized_linear` reads it; the same for every CPU tier and for CUDA, where the
    packing itself is done on the CPU.

    ``W = (codes - zero_point) * scale``, or with a table ``W = levels[codes] * scale``.

    Scales of groups that are integer multiples of one unit for each row, ``scale[n, g] == unit[n] * m[n, g]`` in
    float32, are recognized where ``(code - zero_point) * m`` fits in a byte with sign for every code (4 bits with zero
    point 8: m up to 16): then CPUs multiply at the speed of one scale for each row. `integer_group_scales` gives such.

    Args:
        codes: uint8 ``[N, K]``.
        scale: float32 ``[N, G]``, ``G = ceil(K / group_size)``, 1 for ``group_size`` 0.
        zero_point: float32 ``[N, G]``; None: ``2**(bits-1)``, which costs nothing at run time.
        bits: 2..8. Stored are 2, 3, 4 or 8 bits a code (tables: 4).
        group_size: columns that share a scale. Groups are padded to multiples of 32 columns.
        levels: int8 ``[2**bits]`` for all rows or ``[N, 2**bits]`` for each; ``bits`` at most 4, without zero point.
            Levels that are multiples of 1/32 (SubsetQ's) are exact as ``32 * level`` with ``scale / 32``.

    Returns:
        packed: uint8 ``[ceil(N / 16), blocks, stored bits, 64]``.
        grid: float32 ``[G' + 1, N']`` (``[2 * G' + 1, N']`` with zero points): scales, offsets and the sum of each
            row's values; N' is N padded to 64, and groups so long that int32 sums could overflow are several of the G'.
            For 2 to 4 bits and groups of a multiple of 32 up to 512 columns, more rows hold integer multipliers.
        levels: int8 ``[16]`` or ``[N padded to 16, 16]``; ``[0]`` without a table.

    Raises:
        ValueError: wrong shapes or bits, codes beyond ``2**bits``, a zero point beside levels, or a NaN or Inf.
        TypeError: wrong dtype. NotImplementedError: neither on a CPU nor on CUDA.
    """
    return torch.ops.torchquant.linear_prepack(
        codes, scale, zero_point, bits=bits, group_size=group_size, levels=levels
    )


def quantized_linear(
    x: Tensor,
    packed: Tensor,
    grid: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int,
    in_features: int,
    out_features: int,
    group_size: int = 0,
    levels: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    input_bits: int = 8,
    activation: str = "none",
    residual: Tensor | None = None,
    output_scale: Tensor | None = None,
    output_zero_point: Tensor | None = None,
    output_bits: int = 8,
    input_symmetric: bool | None = None,
) -> Tensor:
    """``y = f(x W^T + b) + residual`` with x as integers: exact integer sums, the same bits on every tier and for any
    number of threads.

    ``x = (a - input_zero_point) * input_scale``. Four kinds of input:

    - float x without ``input_scale``: symmetric integers of each row (token), ``a = round(x * limit / max|x|)`` with
      limit 127 (``input_bits`` 8) or 32767 (16: as good as float activations);
    - float x with ``input_symmetric``: the codes of each row on its own grid, those of
      ``dynamic_quantize(x, bits=input_bits, symmetric=input_symmetric)``, made inside (CPU only);
    - float x with ``input_scale`` ``[]``: the codes that `torchquant.quantizers.uniform_quantize` gives, made inside;
    - uint8 x: such codes, with ``input_scale`` of one number or one for each row.

    On CUDA the same packed tensors serve, and results are equal to the CPU's bit for bit but in two cases. Scales of
    groups that `linear_prepack` took as integers are floats there. And where 16-bit integers would only stand for
    floats: without ``input_scale`` and with ``input_bits`` 16, float16 and bfloat16 x, and more than 16 rows of float32
    x, are multiplied as they are. Up to 128 rows of halves meet the weight in registers, ``codes - zero_point`` in x's
    dtype (exact but for zero points that it cannot hold) with sums, scales and all that follows in float32; else
    `torch.nn.functional.linear` takes the weight unpacked to x's dtype for the call. The host never waits for the
    device there: where x has a NaN or Inf, the outputs of its row are NaN (of x multiplied as floats, what floats
    give), and ``input_scale`` is taken as it is.

    Args:
        x: float32, float16, bfloat16 or uint8 ``[..., K]``.
        packed, grid, levels: from `linear_prepack`, with its ``bits`` and ``group_size``.
        bias: float ``[N]``.
        input_scale, input_zero_point: float32.
        input_bits: 8 or 16 with neither ``input_scale`` nor ``input_symmetric``, else 2..8.
        activation: ``"none"``, ``"gelu"`` (exact, erf) or ``"silu"``.
        residual: float ``[..., N]``, added last.
        output_scale, output_zero_point: float32 ``[]`` or ``[P]``, one for each of P equal parts of the outputs: y as
            codes, those that `torchquant.quantizers.uniform_quantize` gives of float32 y, which is never in memory.
        output_bits: 2..8.

    Returns:
        ``[..., N]`` in x's dtype (float32 for codes); with ``output_scale`` uint8.

    Raises:
        ValueError: wrong shapes, devices, bits or activation, or on a CPU a scale that is not positive or a NaN or Inf
            in x.
        TypeError: wrong dtype.
    """
    return torch.ops.torchquant.quantized_linear(
        x,
        packed,
        grid,
        bias,
        bits=bits,
        in_features=in_features,
        out_features=out_features,
        group_size=group_size,
        levels=levels,
        input_scale=input_scale,
        input_zero_point=input_zero_point,
        input_bits=input_bits,
        activation=activation,
        residual=residual,
        output_scale=output_scale,
        output_zero_point=output_zero_point,
        output_bits=output_bits,
        input_symmetric=input_symmetric,
    )


def kernel_groups(columns: int, group_size: int, stored: int, levels: bool) -> tuple[int, int]:
    """Groups and blocks of a row, as `linear_prepack` lays it out."""
    longest = 1 << (17 - (8 if levels else stored))
    whole = columns if group_size == 0 else min(group_size, columns)
    size = max(whole, 1)
    if size > longest:
        size = longest
        while group_size != 0 and whole % size != 0:
            size -= 1
    groups = max((columns + size - 1) // size, 1)
    last = columns - (groups - 1) * size
    return groups, (groups - 1) * ((size + 31) // 32) + (last + 31) // 32


def grid_rows(groups: int, group_size: int, stored: int, levels: bool, offsets: bool) -> int:
    """Rows of a grid: scales, offsets, sums, and where groups may have multipliers their unit and bytes."""
    room = not levels and stored <= 4 and groups > 1 and group_size % 32 == 0 and 0 < group_size <= 512
    return groups * (2 if offsets else 1) + 1 + (1 + (groups + 3) // 4 if room else 0)


@torch.library.register_fake("torchquant::linear_prepack")
def _(codes, scale, zero_point=None, *, bits, group_size=0, levels=None):  # type: ignore[no-untyped-def]
    rows, columns = codes.shape
    stored = 4 if levels is not None else bits if bits <= 4 else 8
    groups, blocks = kernel_groups(columns, group_size, stored, levels is not None)
    height = grid_rows(groups, group_size, stored, levels is not None, zero_point is not None)
    table = [0] if levels is None else [16] if levels.dim() == 1 else [(rows + 15) // 16 * 16, 16]
    return (
        codes.new_empty([(rows + 15) // 16, blocks, stored, 64]),
        scale.new_empty([height, (rows + 63) // 64 * 64]),
        codes.new_empty(table, dtype=torch.int8),
    )


@torch.library.register_fake("torchquant::quantized_linear")
def _(x, packed, grid, bias=None, *, bits, in_features, out_features, **options):  # type: ignore[no-untyped-def]
    dtype = torch.float32 if x.dtype == torch.uint8 else x.dtype
    if options.get("output_scale") is not None:
        dtype = torch.uint8
    return x.new_empty((*x.shape[:-1], out_features), dtype=dtype)
