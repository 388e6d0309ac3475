"""Subset quantization (DFSQ, arXiv 2305.05888): levels by shortest path against k-means, codes by table against the
nearest level."""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchquant.quantizers import (
    subset_dequantize,
    subset_quantize,
    subset_select,
    subset_select_kmeans,
    subset_universe,
)
from torchquant.quantizers.subset import RESTARTS

from .harness import Contest, Floor, Peer, check
from .layers import Shape, label

LEVELS = 16
# A layer of EDSR on 32 patches of 48 x 48; DFSQ clusters channel by channel.
CHANNELS: tuple[Shape, ...] = ((64, 73728),)
TARGET = 100.0


def make_channels(shape: Shape) -> Tensor:
    """Behind a ReLU, largest value 1."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).clamp_(min=0)
    return x / x.amax(1, keepdim=True)


def squared_error(x: Tensor, levels: Tensor) -> float:
    return float((subset_dequantize(subset_quantize(x, levels), levels).double() - x.double()).square().sum())


def check_selection(x: Tensor, universe: Tensor) -> str:
    levels, error = subset_select(x, universe, levels=LEVELS)
    _, published = subset_select_kmeans(x, universe, levels=LEVELS)
    slack = 1e-9 * float(x.double().square().sum())
    off = abs(squared_error(x, levels) - float(error))
    check(off <= slack, f"subset: the error is {off} off")
    check(float(error) <= float(published) + slack, f"subset: error {float(error)}, k-means {float(published)}")
    return f"squared error {float(error / published.clamp(min=slack)):.2f} of k-means'"


def selection(shape: Shape, x: Tensor, universe: Tensor) -> Contest:
    """Of one channel."""
    return Contest(
        f"subset, {LEVELS} of {len(universe)} elements, 1 channel",
        label(shape, shape),
        lambda: subset_select(x, universe, levels=LEVELS),
        [
            Peer(
                f"torch k-means, {RESTARTS} restarts (1 timed)",
                lambda: subset_select_kmeans(x, universe, levels=LEVELS, restarts=1),
                1 / RESTARTS,
                TARGET,
            )
        ],
        note=check_selection(x, universe),
    )


def codes(shape: Shape, x: Tensor, universe: Tensor, count: int) -> Contest:
    """Of all channels, with shared levels."""
    levels, _ = subset_select(x, universe, levels=count)
    middle = (levels[1:] + levels[:-1]) / 2
    same = torch.equal(subset_quantize(x, levels), torch.bucketize(x, middle).byte())
    check(same, "subset: codes differ from those of torch.bucketize")
    argmin = f"nearest by torch argmin (1 of {shape[0]} rows)"
    return Contest(
        f"subset, codes of {count} levels",
        label(shape, shape),
        lambda: subset_quantize(x, levels),
        [
            Peer("torch.bucketize", lambda: torch.bucketize(x, middle, out_int32=True)),
            Peer(argmin, lambda: (x[0, :, None] - levels).abs().argmin(1), 1 / shape[0]),
        ],
        Floor(x.sum, 4.0 * x.numel(), "GB/s", (("read x, write codes", 5.0 * x.numel()),)),
    )


def subset(shape: Shape) -> Iterator[Contest]:
    x, universe = make_channels(shape), subset_universe("dfsq")
    yield selection(shape, x[0], universe)
    yield from (codes(shape, x, universe, count) for count in (LEVELS, 4 * LEVELS))
