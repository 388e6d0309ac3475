"""Log-binned histograms of activations: quantiles and quantizer ranges of any number of values, in one pass."""

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

TENSOR_BINS = 16384
CHANNEL_BINS = 4096


def new_histogram(channels: int | None = None, *, bins: int = 0, device: torch.device | str | None = None) -> Tensor:
    """An empty histogram for `histogram_accumulate_`: float64 ``[3, B]``, or ``[channels, 3, B]``.

    Rows: count, sum and sum of squares of the values in each bin. Histograms of batches, threads or ranks with the
    same bins merge by adding.

    Args:
        channels: one histogram for each channel; None = one for the whole tensor.
        bins: B = 512 * 2**m, m = 0..7; the relative width of a bin is 2**-m. 0 = 16384 (m = 5), per channel 4096.
        device: of the tensors that will be counted.
    """
    if bins == 0:
        bins = TENSOR_BINS if channels is None else CHANNEL_BINS
    shape = (3, bins) if channels is None else (channels, 3, bins)
    return torch.zeros(shape, dtype=torch.float64, device=device)


def histogram_accumulate_(histogram: Tensor, x: Tensor, *, axis: int = -1) -> None:
    """Count the values of x in place: bin of x = the top ``9 + m`` bits of its float32 pattern, ordered by value.

    No range has to be known beforehand and no value falls outside; small values are resolved as finely, relative to
    their size, as large ones. Sums are exact integers inside a call, so the result does not depend on the number of
    threads, nor on the CPU tier or device. -0 counts as 0.

    Args:
        histogram: float64 ``[3, B]`` for all values of x, or ``[C, 3, B]`` for each channel along ``axis``; see
            `new_histogram`. Changed in place, not at all when x is refused.
        x: float32, float16 or bfloat16, any shape and strides. Without values nothing happens.
        axis: the channels of x; only for ``[C, 3, B]``.

    Raises:
        ValueError: wrong shapes, axis or device, or a NaN or Inf in x. TypeError: wrong dtype.
    """
    torch.ops.torchquant.histogram_accumulate_(histogram, x, axis=axis)


def histogram_quantile(histogram: Tensor, quantiles: Sequence[float]) -> Tensor:
    """Quantiles by linear interpolation, as `torch.quantile`, of the values in a histogram.

    The values of a bin are taken as evenly spread between bounds that follow from its three sums, so that the error is
    less than the width of one bin, a bin with one or two values is exact, and so is one whose values are all equal.
    `exact_quantile` has no error.

    Args:
        histogram: ``[3, B]`` or ``[C, 3, B]``, with values in every channel.
        quantiles: Q numbers in [0, 1]; 0 and 1 give the minimum and the maximum (bounds of them, in the bin's width).

    Returns:
        float32 ``[Q]`` or ``[C, Q]``.

    Raises:
        ValueError: a quantile outside [0, 1], wrong shape, no values. TypeError: wrong dtype.
    """
    return torch.ops.torchquant.histogram_quantile(histogram, list(quantiles))


def histogram_range(
    histogram: Tensor, *, bits: int, symmetric: bool = False, rule: str = "mse", percentile: float = 0.9999
) -> tuple[Tensor, Tensor]:
    """The uniform quantizer for the values in a histogram: ``value = (code - zero_point) * scale``.

    Every candidate range costs one walk over the occupied bins, whatever the number of values.

    Args:
        histogram: ``[3, B]`` or ``[C, 3, B]``, with values in every channel.
        bits: 2..8.
        symmetric: zero point ``2**(bits-1)`` instead of an integral one from the range's ends.
        rule: ``"minmax"``: all values; ``"percentile"``: from quantile ``1 - percentile`` to quantile ``percentile``;
            ``"mse"``: the range with the smallest squared error; ``"entropy"``: the one with the smallest
            Kullback-Leibler divergence between the values and their codes (TensorRT's calibration). The last two
            search from the full range inwards and are never worse than it.
        percentile: a fraction in (0.5, 1]; only for its rule.

    Returns:
        scale and zero_point, float32 ``[]`` or ``[C]``.

    Raises:
        ValueError: wrong bits, rule, percentile or shape, no values. TypeError: wrong dtype.
    """
    return torch.ops.torchquant.histogram_range(
        histogram, bits=bits, symmetric=symmetric, rule=rule, percentile=percentile
    )


def exact_quantile(x: Tensor | Sequence[Tensor], q: float) -> Tensor:
    """`torch.quantile` of all values of x, without its limit of 2**24: a histogram, then a second pass that sorts out
    the values of one bin.

    Args:
        x: float32, float16 or bfloat16; one tensor or several, whose values count as one set.
        q: in [0, 1].

    Returns:
        float32 ``[]``, interpolated linearly between the two nearest values.

    Raises:
        ValueError: q outside [0, 1], no values, or a NaN or Inf in x. TypeError: wrong dtype.
    """
    batches = [x] if isinstance(x, Tensor) else list(x)
    if not 0 <= q <= 1:
        raise ValueError(f"exact_quantile: q must be in [0, 1], got {q}")
    if not sum(batch.numel() for batch in batches):
        raise ValueError("exact_quantile: x must hold at least one value, got none")
    histogram = new_histogram(bins=2 * TENSOR_BINS, device=batches[0].device)
    for batch in batches:
        histogram_accumulate_(histogram, batch)
    counts = histogram[0].long().cumsum(0)
    rank = q * (int(counts[-1]) - 1)
    below = _value_at_rank(batches, counts, int(rank))
    fraction = rank - int(rank)
    if fraction == 0:
        return below
    above = _value_at_rank(batches, counts, int(rank) + 1)
    return torch.lerp(below.double(), above.double(), fraction).float()


def _value_at_rank(batches: Sequence[Tensor], counts: Tensor, rank: int) -> Tensor:
    """The value number rank (from 0) of all; counts [B] = number of values up to the end of each bin."""
    index = int(torch.searchsorted(counts, rank, right=True))
    low, high = _bin_edges(index, counts.numel())
    values = (batch.detach().float() for batch in batches)  # half types would round the edges
    parts = [batch[(batch >= low) & (batch <= high)] for batch in values]
    inside = torch.cat(parts)
    if inside.amin() == inside.amax():  # a selection among equal values would take quadratic time
        return inside[0]
    before = 0 if index == 0 else int(counts[index - 1])
    return inside.kthvalue(rank - before + 1).values


def _bin_edges(index: int, bins: int) -> tuple[float, float]:
    """The least and the greatest float32 of a bin."""
    width = (1 << 32) // bins
    first, last = index * width, index * width + width - 1
    if last == (1 << 31) - 1:
        last -= 1  # that pattern is -0, which counts as 0
    low, high = (p - (1 << 31) if p >= 1 << 31 else (1 << 32) - 1 - p for p in (first, last))
    return struct.unpack("<2f", struct.pack("<2I", low, high))


@torch.library.register_fake("torchquant::histogram_accumulate_")
def _(histogram, x, *, axis=-1):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("torchquant::histogram_quantile")
def _(histogram, quantiles):  # type: ignore[no-untyped-def]
    return histogram.new_empty((*histogram.shape[:-2], len(quantiles)), dtype=torch.float32)


@torch.library.register_fake("torchquant::histogram_range")
def _(histogram, *, bits, symmetric=False, rule="mse", percentile=0.9999):  # type: ignore[no-untyped-def]
    scale = histogram.new_empty(histogram.shape[:-2], dtype=torch.float32)
    return scale, torch.empty_like(scale)
