"""Uniform quantizers of activations, static (grids from a histogram) and dynamic (grids of the tensor at hand)."""

import torch
from torch import Tensor


def uniform_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, axis: int = -1, group_size: int = 0
) -> Tensor:
    """``code = clamp(round(x / scale + zero_point), 0, 2**bits - 1)``, half to even.

    Args:
        x: float32, float16 or bfloat16; work is in float32.
        scale: float32, positive. ``[]``: one grid for the tensor. ``[C]``: for each channel along ``axis``. Of x's rank
            and broadcastable to x: ``[..., 1]`` for each token. With ``group_size``: ``[..., G]`` for every group of
            every token, or ``[G]`` shared by all tokens, ``G = ceil(K / group_size)``.
        zero_point: float32 of scale's shape; any finite number, integral where integer arithmetic is wanted.
        bits: 2..8.
        axis: of ``[C]``.
        group_size: elements of the last dimension that share a grid; the last group may be ragged. 0 = no groups.

    Returns:
        codes uint8 of x's shape.

    Raises:
        ValueError: wrong shapes, bits, axis or device, a scale that is not positive, or a NaN or Inf.
        TypeError: wrong dtype.
    """
    return torch.ops.torchquant.uniform_quantize(x, scale, zero_point, bits=bits, axis=axis, group_size=group_size)


def uniform_dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor, *, axis: int = -1, group_size: int = 0
) -> Tensor:
    """``value = (code - zero_point) * scale``, float32; scale and zero_point as in `uniform_quantize`.

    Raises:
        ValueError: wrong shapes, axis or device, a scale that is not positive, or a NaN or Inf.
        TypeError: codes not uint8, or scale or zero_point not float32.
    """
    return torch.ops.torchquant.uniform_dequantize(codes, scale, zero_point, axis=axis, group_size=group_size)


def uniform_fit(
    x: Tensor,
    *,
    bits: int,
    granularity: str = "tensor",
    axis: int = -1,
    group_size: int = 0,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """The grids that span minimum and maximum of each part of x.

    Static grids that leave outliers out come from `torchquant.statistics.histogram_range`.

    Args:
        x: float32, float16 or bfloat16.
        bits: 2..8.
        granularity: ``"tensor"``, ``"token"`` (each vector along the last dimension), ``"channel"`` (along ``axis``) or
            ``"group"`` (each ``group_size`` elements of the last dimension, the last group ragged).
        axis: of the channels.
        group_size: positive for groups, else 0.
        symmetric: zero point ``2**(bits-1)`` instead of an integral one from the two ends.

    Returns:
        scale and zero_point, float32, in the shape that `uniform_quantize` takes: ``[]``, ``[..., 1]``, ``[C]`` or
        ``[..., G]``. Parts without values have scale 1 and zero point 0.

    Raises:
        ValueError: wrong bits, granularity, axis or group size, or a NaN or Inf in x. TypeError: wrong dtype.
    """
    return torch.ops.torchquant.uniform_fit(
        x, bits=bits, granularity=granularity, axis=axis, group_size=group_size, symmetric=symmetric
    )


def dynamic_quantize(
    x: Tensor,
    bits: int,
    granularity: str = "token",
    axis: int = -1,
    group_size: int = 0,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`uniform_fit` and `uniform_quantize` at once: codes, scale, zero_point. `torch.jit.script` compiles it, therefore
    no keyword-only arguments."""
    return torch.ops.torchquant.dynamic_quantize(
        x, bits=bits, granularity=granularity, axis=axis, group_size=group_size, symmetric=symmetric
    )


def dynamic_fake_quantize(
    x: Tensor,
    bits: int,
    granularity: str = "token",
    axis: int = -1,
    group_size: int = 0,
    symmetric: bool = False,
) -> Tensor:
    """`dynamic_quantize` and `uniform_dequantize` at once: the nearest value of its grid to each x, float32."""
    return torch.ops.torchquant.dynamic_fake_quantize(
        x, bits=bits, granularity=granularity, axis=axis, group_size=group_size, symmetric=symmetric
    )


@torch.library.register_fake("torchquant::uniform_quantize")
def _(x, scale, zero_point, *, bits, axis=-1, group_size=0):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=torch.uint8)


@torch.library.register_fake("torchquant::uniform_dequantize")
def _(codes, scale, zero_point, *, axis=-1, group_size=0):  # type: ignore[no-untyped-def]
    return codes.new_empty(codes.shape, dtype=torch.float32)


@torch.library.register_fake("torchquant::uniform_fit")
def fitted(x, *, bits, granularity="tensor", axis=-1, group_size=0, symmetric=False):  # type: ignore[no-untyped-def]
    groups = (x.shape[-1] + group_size - 1) // group_size if granularity == "group" else 1
    if granularity == "tensor":
        shape: tuple[int, ...] = ()
    elif granularity == "channel":
        shape = (x.shape[axis],)
    else:
        shape = (*x.shape[:-1], groups)
    scale = x.new_empty(shape, dtype=torch.float32)
    return scale, torch.empty_like(scale)


@torch.library.register_fake("torchquant::dynamic_quantize")
def _(x, *, granularity="token", **options):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=torch.uint8), *fitted(x, granularity=granularity, **options)


@torch.library.register_fake("torchquant::dynamic_fake_quantize")
def _(x, **options):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=torch.float32)
