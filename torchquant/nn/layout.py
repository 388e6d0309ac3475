"""Layers as matrices: what a layer multiplies its input (or its im2col columns) by, ``[N outputs, K inputs]``.

Convolution: ``weight.reshape(N, -1)``. Transposed convolution: the equivalent convolution's weight, that is per group
``weight.transpose(0, 1)`` with flipped taps. Hugging Face's ``Conv1D``: the transpose. With ``groups`` = B, rows
``b * N / B`` to ``(b + 1) * N / B`` see group b's inputs, so the Gram is ``[B, K, K]``.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..statistics import conv_gram_accumulate_, gram_accumulate_

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
SAME_PADDED = ("Conv2dSame", "Conv2dDynamicSamePadding")  # pad as TensorFlow does, from the size of the input


def is_hf_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, by its shape: importing transformers just to ask would take seconds."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")


def is_known(module: nn.Module) -> bool:
    """False for a subclass whose forward() may compute something else than ``geometry`` says."""
    plain = next((base.forward for base in (nn.Linear, *CONVS) if isinstance(module, base)), None)
    padded = isinstance(getattr(module, "static_padding", None), nn.Module)
    return is_hf_conv1d(module) or type(module).forward is plain or padded or type(module).__name__ in SAME_PADDED


def is_quantizable(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, *CONVS)) or is_hf_conv1d(module)


@dataclass(frozen=True)
class ConvGeometry:
    """The arguments of a convolution, with every padding that the operator does not know moved to ``prepad``."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    output_padding: tuple[int, ...] = ()
    transposed: bool = False
    prepad: tuple[int, ...] = ()  # F.pad before the convolution, last dimension first
    prepad_mode: str = "constant"  # or "reflect", "replicate", "circular", "same" (TensorFlow's, from the input's size)

    def pad(self, x: Tensor, kernel: tuple[int, ...]) -> Tensor:
        if self.prepad_mode == "same":
            return F.pad(x, same_padding(list(x.shape[-len(kernel) :]), kernel, self.stride, self.dilation))
        return F.pad(x, list(self.prepad), mode=self.prepad_mode) if self.prepad else x


def same_padding(
    size: list[int], kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> list[int]:
    """TensorFlow's SAME: ceil(size / stride) outputs, the odd pixel of padding at the end."""
    pad: list[int] = []
    for s, k, step, d in zip(reversed(size), reversed(kernel), reversed(stride), reversed(dilation), strict=True):
        total = max((math.ceil(s / step) - 1) * step + (k - 1) * d + 1 - s, 0)
        pad += [total // 2, total - total // 2]
    return pad


def geometry(module: nn.Module) -> ConvGeometry | None:
    """The convolution that ``module`` computes, None for a matrix product.

    Of subclasses with a forward of their own, the two usual ones are known: padding by a ``static_padding`` module, and
    TensorFlow's SAME padding from the size of the input (timm's Conv2dSame and the like).
    """
    if not isinstance(module, CONVS):
        return None
    stride, dilation = tuple(module.stride), tuple(module.dilation)
    if isinstance(module, nn.ConvTranspose2d):
        added, padding = tuple(module.output_padding), module.padding
        return ConvGeometry(stride, padding, dilation, module.groups, added, transposed=True)  # type: ignore[arg-type]
    none = (0,) * len(stride)
    static = getattr(module, "static_padding", None)
    if isinstance(static, (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)):
        sides = tuple(static.padding)
        return ConvGeometry(stride, module.padding, dilation, module.groups, prepad=sides)  # type: ignore[arg-type]
    if type(module).__name__ in SAME_PADDED:
        return ConvGeometry(stride, none, dilation, module.groups, prepad_mode="same")
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if mode != "constant" or isinstance(module.padding, str):
        both = tuple(module._reversed_padding_repeated_twice)
        return ConvGeometry(stride, none, dilation, module.groups, prepad=both if any(both) else (), prepad_mode=mode)
    return ConvGeometry(stride, tuple(module.padding), dilation, module.groups)


def channel_axis(module: nn.Module) -> int:
    """Where the channels of the layer's input lie, counted from the end."""
    return -len(module.kernel_size) - 1 if isinstance(module, CONVS) else -1


def groups_of(module: nn.Module) -> int:
    return int(module.groups) if isinstance(module, CONVS) else 1  # type: ignore[arg-type]


def rows_of(module: nn.Module) -> int:
    return to_matrix(module).shape[0]


def signature(module: nn.Module) -> tuple[object, ...]:
    """Equal for layers whose Grams of one input are equal."""
    kernel = tuple(module.kernel_size) if isinstance(module, CONVS) else ()
    return to_matrix(module).shape[1], geometry(module), kernel


def apply(module: nn.Module, x: Tensor) -> Tensor:
    """The output that ``module``'s class and attributes promise, whatever its own forward() does."""
    conv, bias = geometry(module), cast("Tensor | None", module.bias)
    if conv is None:
        return F.linear(x, to_matrix(module), bias)
    kernel, weight = tuple(module.kernel_size), cast(Tensor, module.weight)  # type: ignore[arg-type]
    if conv.transposed:
        sizes = (conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
        return F.conv_transpose2d(x, weight, bias, *sizes)  # type: ignore[arg-type]
    product = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
    return product(conv.pad(x, kernel), weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def to_matrix(module: nn.Module) -> Tensor:
    """The weight as ``[N, K]``, in its own dtype."""
    weight: Tensor = module.weight.detach()  # type: ignore[union-attr,assignment,operator]
    if is_hf_conv1d(module):
        return weight.t().contiguous()
    if isinstance(module, nn.ConvTranspose2d):
        return transposed_to_matrix(weight, module.groups)
    return weight.reshape(weight.shape[0], -1)


def from_matrix(module: nn.Module, matrix: Tensor) -> Tensor:
    """The inverse of to_matrix: a weight of ``module``'s shape and dtype."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if is_hf_conv1d(module):
        return matrix.t().contiguous().to(weight.dtype)
    if isinstance(module, nn.ConvTranspose2d):
        return transposed_from_matrix(matrix, list(weight.shape), module.groups).to(weight.dtype)
    return matrix.view(weight.shape).to(weight.dtype)


def transposed_to_matrix(weight: Tensor, groups: int) -> Tensor:
    """``[C_in, N / groups, kh, kw]`` -> ``[N, C_in / groups * kh * kw]``."""
    inputs, outputs, height, width = weight.shape
    split = weight.reshape(groups, inputs // groups, outputs, height, width).transpose(1, 2).flip(-2, -1)
    return split.reshape(groups * outputs, -1)


def transposed_from_matrix(matrix: Tensor, shape: list[int], groups: int) -> Tensor:
    """The inverse of transposed_to_matrix; ``shape`` is the weight's."""
    split = matrix.reshape(groups, shape[1], shape[0] // groups, shape[2], shape[3])
    return split.transpose(1, 2).flip(-2, -1).reshape(shape)


def new_gram(module: nn.Module, device: torch.device) -> Tensor:
    """A zero Gram of the right shape: ``[K, K]``, with groups ``[groups, K, K]``."""
    columns, groups = to_matrix(module).shape[1], groups_of(module)
    shape = (columns, columns) if groups == 1 else (groups, columns, columns)
    return torch.zeros(shape, device=device)


def accumulate_gram(gram: Tensor, module: nn.Module, x: Tensor) -> int:
    """Add the Gram of input ``x`` to ``gram``; returns how many tokens (rows, or output positions) ``x`` held."""
    conv = geometry(module)
    x = x.float() if x.dtype == torch.float64 else x
    if conv is None:
        gram_accumulate_(gram, x)
        return x.numel() // max(x.shape[-1], 1)
    kernel = tuple(module.kernel_size)  # type: ignore[arg-type]
    x = conv.pad(batched(x, kernel), kernel)
    conv_gram_accumulate_(
        gram,
        x,
        kernel_size=kernel,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        transposed=conv.transposed,
        output_padding=conv.output_padding,
    )
    return x.shape[0] * positions(conv, tuple(x.shape[2:]), kernel)


def tokens_of(module: nn.Module, x: Tensor) -> int:
    """Rows of the matrix that ``unfold(module, x)`` would give."""
    conv = geometry(module)
    if conv is None:
        return x.numel() // max(x.shape[-1], 1)
    kernel = tuple(module.kernel_size)  # type: ignore[arg-type]
    x = conv.pad(batched(x, kernel), kernel)
    return x.shape[0] * positions(conv, tuple(x.shape[2:]), kernel)


def batched(x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Convolutions also take one picture without a batch dimension."""
    return x.unsqueeze(0) if x.dim() == len(kernel) + 1 else x


def positions(conv: ConvGeometry, size: tuple[int, ...], kernel: tuple[int, ...]) -> int:
    """Output positions of one (padded) picture."""
    spans = zip(size, kernel, conv.stride, conv.padding, conv.dilation, strict=True)
    if conv.transposed:
        added = conv.output_padding or (0,) * len(size)
        lengths = [(s - 1) * t - 2 * p + d * (k - 1) + 1 for s, k, t, p, d in spans]
        return math.prod(length + a for length, a in zip(lengths, added, strict=True))
    return math.prod((s + 2 * p - d * (k - 1) - 1) // t + 1 for s, k, t, p, d in spans)


def unfold(module: nn.Module, x: Tensor) -> Tensor:
    """The rows that the layer's matrix multiplies: ``[T, K]``, with groups ``[groups, T, K]``; float32.

    A plain im2col for products of two different inputs (quantized and float), which no Gram can give.
    """
    conv = geometry(module)
    if conv is None:
        return x.reshape(-1, x.shape[-1]).float()
    kernel = tuple(module.kernel_size)  # type: ignore[arg-type]
    x = conv.pad(batched(x, kernel), kernel).float()
    stride, padding = conv.stride, conv.padding
    if conv.transposed:
        x, stride, padding = stretch(x, conv, kernel), (1,) * len(kernel), (0,) * len(kernel)
    both = [side for p in reversed(padding) for side in (p, p)]
    x = F.pad(x, both)
    for axis, (k, step, d) in enumerate(zip(kernel, stride, conv.dilation, strict=True)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, step)[..., ::d]
    # [B, C, *positions, *kernel] -> [groups, B * positions, C / groups * kernel]
    x = x.unflatten(1, (conv.groups, -1))
    spatial = range(3, 3 + len(kernel))
    taps = range(3 + len(kernel), 3 + 2 * len(kernel))
    x = x.permute(1, 0, *spatial, 2, *taps).flatten(1, 1 + len(kernel)).flatten(2)
    return x[0] if conv.groups == 1 else x


def stretch(x: Tensor, conv: ConvGeometry, kernel: tuple[int, ...]) -> Tensor:
    """The input of the plain convolution that equals a transposed one: zeros between pixels, then the full padding."""
    wide = [(s - 1) * t + 1 for s, t in zip(x.shape[2:], conv.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *wide)
    every = (slice(None), slice(None), *(slice(None, None, t) for t in conv.stride))
    spread[every] = x
    added = conv.output_padding or (0,) * len(kernel)
    sides = [
        (d * (k - 1) - p, d * (k - 1) - p + a)
        for k, p, d, a in zip(kernel, conv.padding, conv.dilation, added, strict=True)
    ]
    return F.pad(spread, [side for pair in reversed(sides) for side in pair])
