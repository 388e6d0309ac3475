"""Ranges of activation quantizers: one pass into a histogram against torch.quantile, as published codes use it; those
of every token at run time against torch's own operators."""

from collections.abc import Callable, Iterator

import numpy
import torch
from torch import Tensor

from torchquant.quantizers import (
    dynamic_fake_quantize,
    dynamic_quantize,
    uniform_dequantize,
    uniform_fit,
    uniform_quantize,
)
from torchquant.statistics import exact_quantile, histogram_accumulate_, histogram_range, new_histogram

from .harness import Contest, Floor, Peer, check
from .layers import Shape, label

BITS = 4
PERCENTILES = (0.999, 0.9999, 0.99999)  # what I&S-ViT (arXiv 2311.10126) tries, both tails
PERCENTILE = PERCENTILES[1]
QUANTILE_LIMIT = 1 << 24  # elements that torch.quantile takes
BIN_WIDTH = 2.0**-5  # of the default histogram, relative
ACTIVATIONS: tuple[Shape, ...] = ((8192, 8192),)  # 64 M values: the inputs of one layer in calibration
TARGET = 20.0
TOKENS: tuple[Shape, ...] = ((197, 384), (197, 1536), (1182, 64))  # of DeiT-S: to linear layers; q, k, v of all heads
TOKEN_BITS = 8

Grid = tuple[Tensor, Tensor]  # scale, zero_point


def make_activations(shape: Shape) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tails = torch.randn(shape, generator=generator).mul_(0.7).exp_()
    return torch.randn(shape, generator=generator).mul_(tails)


def grid_between(low: Tensor, high: Tensor) -> Grid:
    scale = (high - low) / (2**BITS - 1)
    return scale, torch.round(-low / scale)


def quantiles_in_pieces(x: Tensor, percentile: float) -> Grid:
    """Both ends by torch.quantile; beyond its limit the mean over pieces, which is an estimate."""
    ends = torch.tensor([1 - percentile, percentile])
    pieces = [torch.quantile(piece, ends) for piece in x.flatten().split(QUANTILE_LIMIT)]
    low, high = torch.stack(pieces).mean(0)
    return grid_between(low, high)


def quantiles_by_numpy(x: Tensor, percentile: float) -> Grid:
    """The published way round the limit."""
    low, high = numpy.quantile(x.flatten().numpy(), [1 - percentile, percentile])
    return grid_between(torch.tensor(low), torch.tensor(high))


def fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    scale, zero_point = grid
    return x.div(scale).add_(zero_point).round_().clamp_(0, 2**BITS - 1).sub_(zero_point).mul_(scale)


def score_percentile(x: Tensor, percentile: float) -> float:
    """One of PERCENTILES: a sort, a fake quantization and its squared error."""
    return float((fake_quantize(x, quantiles_in_pieces(x, percentile)) - x).square_().mean())


def range_run(x: Tensor, rule: str) -> Callable[[], Grid]:
    def run() -> Grid:
        histogram = new_histogram()
        histogram_accumulate_(histogram, x)
        return histogram_range(histogram, bits=BITS, rule=rule, percentile=PERCENTILE)

    return run


def error_of(x: Tensor, grid: Grid) -> float:
    codes = uniform_quantize(x, *grid, bits=BITS)
    return float((uniform_dequantize(codes, *grid) - x).square_().mean())


def check_percentile(x: Tensor, grid: Grid) -> str:
    wanted = float(exact_quantile(x, PERCENTILE) - exact_quantile(x, 1 - PERCENTILE)) / (2**BITS - 1)
    off = abs(float(grid[0]) / wanted - 1)
    check(off <= BIN_WIDTH, f"histogram: the percentile range is {off:.1%} off")
    return f"range {off:.2%} off the exact one"


def check_mse(x: Tensor, grid: Grid) -> str:
    exact = [grid_between(exact_quantile(x, 1 - p), exact_quantile(x, p)) for p in PERCENTILES]
    ratio = error_of(x, grid) / min(error_of(x, one) for one in exact)
    check(ratio <= 1.01, f"histogram: {ratio} times the squared error of the best percentile")
    return f"squared error {ratio:.3f} of the best percentile's"


def histogram(shape: Shape) -> Iterator[Contest]:
    x = make_activations(shape)
    bytes_read = 4.0 * x.numel()
    floor = Floor(lambda: x.sum(), bytes_read, "GB/s, one read of the tensor", (("one read", bytes_read),))
    by_percentile, by_error = range_run(x, "percentile"), range_run(x, "mse")
    yield Contest(
        "histogram, range by percentile",
        label(shape, shape),
        by_percentile,
        [
            Peer(
                f"torch.quantile in pieces of 2^{QUANTILE_LIMIT.bit_length() - 1}",
                lambda: quantiles_in_pieces(x, PERCENTILE),
                target=TARGET,
            ),
            Peer("numpy.quantile", lambda: quantiles_by_numpy(x, PERCENTILE)),
        ],
        floor,
        check_percentile(x, by_percentile()),
    )
    yield Contest(
        "histogram, range by squared error",
        label(shape, shape),
        by_error,
        [
            Peer(
                f"torch: best of {len(PERCENTILES)} percentiles (1 timed)",
                lambda: score_percentile(x, PERCENTILE),
                1 / len(PERCENTILES),
                TARGET,
            )
        ],
        floor,
        check_mse(x, by_error()),
    )


def tokens_by_torch(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point by the formula, as dynamic quantization is mostly written."""
    low, high = x.aminmax(dim=-1, keepdim=True)
    top = 2**TOKEN_BITS - 1
    scale = (high - low) / top
    zero_point = torch.round(-low / scale)
    return torch.round(x / scale + zero_point).clamp_(0, top).to(torch.uint8), scale, zero_point


def tokens_in_two_steps(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale, zero_point = uniform_fit(x, bits=TOKEN_BITS, granularity="token")
    return uniform_quantize(x, scale, zero_point, bits=TOKEN_BITS), scale, zero_point


def check_tokens(x: Tensor) -> None:
    ours, wanted = dynamic_quantize(x, TOKEN_BITS), tokens_in_two_steps(x)
    same = all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
    check(same, "dynamic: other codes or grids than uniform_fit and uniform_quantize")
    values = torch.equal(dynamic_fake_quantize(x, TOKEN_BITS), uniform_dequantize(*ours))
    check(values, "dynamic: other values than uniform_dequantize")


def dynamic(shape: Shape) -> Iterator[Contest]:
    x = make_activations(shape)
    check_tokens(x)
    yield Contest(
        "dynamic, codes of tokens",
        label(shape, shape),
        lambda: dynamic_quantize(x, TOKEN_BITS),
        [
            Peer("torch: the formula", lambda: tokens_by_torch(x)),
            Peer("uniform_fit, then uniform_quantize", lambda: tokens_in_two_steps(x)),
        ],
    )
    yield Contest(
        "dynamic, values of tokens",
        label(shape, shape),
        lambda: dynamic_fake_quantize(x, TOKEN_BITS),
        [Peer("uniform_fit, then both ways", lambda: uniform_dequantize(*tokens_in_two_steps(x)))],
    )
