"""Gram matrices of activations: all that the weight solvers need to know of the calibration data."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gram_accumulate_(gram: Tensor, x: Tensor) -> None:
    """Add the Gram matrix of activations in place: ``gram += x^T x``, summed over all leading dimensions (tokens) of x.

    Only the upper triangle of ``gram`` is read (half the work); ``gram`` is exactly symmetric afterwards. The result
    does not depend on the number of threads. Partial Grams over batches, threads or ranks may be added.

    Args:
        gram: ``[K, K]`` float32, or float64 for products and sums in double; changed in place.
        x: ``[..., K]`` float32, float16 or bfloat16, any strides; cast to gram's dtype before any product (TF32
            is never used). Without tokens nothing happens.

    Raises:
        ValueError: gram not square, another number of columns, another device, or a NaN or Inf in x.
        TypeError: wrong dtype.
    """
    torch.ops.torchquant.gram_accumulate_(gram, x)


def cross_gram_accumulate_(cross: Tensor, x: Tensor, y: Tensor) -> None:
    """Add the products of two activations of the same tokens in place: ``cross += x^T y``.

    Args:
        cross: ``[Kx, Ky]`` float32 or float64; changed in place.
        x: ``[..., Kx]`` float32, float16 or bfloat16.
        y: ``[..., Ky]`` likewise, with the same leading dimensions.

    Raises:
        ValueError: wrong shapes or device, or a NaN or Inf in x or y. TypeError: wrong dtype.
    """
    torch.ops.torchquant.cross_gram_accumulate_(cross, x, y)


def conv_gram_accumulate_(
    gram: Tensor,
    x: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    transposed: bool = False,
    output_padding: Sequence[int] = (),
) -> None:
    """Add the Gram matrices of a convolution's patches in place: ``gram[g] += patches_g^T patches_g``.

    ``patches_g`` has one row per output position and the columns of ``weight.reshape(out_channels, -1)``, so that a
    row w of the weight gives ``sum(outputs**2) = w gram w^T`` (without bias). A transposed convolution is the plain
    one, of stride 1, on its input with zeros inserted; the matching matrix is ``weight`` with in and out channels
    exchanged (per group) and every tap flipped. Patches are made in batches of bounded memory.

    Args:
        gram: ``[groups, K, K]``, or ``[K, K]`` when ``groups == 1``; float32 or float64; changed in place.
            ``K = in_channels // groups * prod(kernel_size)``.
        x: ``[B, in_channels, *spatial]`` float32, float16 or bfloat16, with 1, 2 or 3 spatial dimensions;
            padded with zeros.
        kernel_size, stride, padding, dilation: one entry per spatial dimension, as in ``torch.nn.Conv2d``.
        groups: as in ``torch.nn.Conv2d``.
        transposed: the layer is a transposed convolution.
        output_padding: of a transposed convolution; empty = 0.

    Raises:
        ValueError: wrong shapes, options or device, or a NaN or Inf in x. TypeError: wrong dtype.
    """
    torch.ops.torchquant.conv_gram_accumulate_(
        gram,
        x,
        kernel_size=list(kernel_size),
        stride=list(stride),
        padding=list(padding),
        dilation=list(dilation),
        groups=groups,
        transposed=transposed,
        output_padding=list(output_padding),
    )


@torch.library.register_fake("torchquant::gram_accumulate_")
def _(gram, x):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("torchquant::cross_gram_accumulate_")
def _(cross, x, y):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("torchquant::conv_gram_accumulate_")
def _(  # type: ignore[no-untyped-def]
    gram, x, *, kernel_size, stride, padding, dilation, groups=1, transposed=False, output_padding=()
):
    return None
