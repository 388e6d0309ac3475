"""Histograms against sorted float64 data: exact sums, quantiles within a bin, ranges that beat every other."""

import math

import pytest
import torch
from helpers import FLOAT_TYPES, assert_same, check_op, layouts, random, scripted, threads, tier
from hypothesis import given, settings
from hypothesis import strategies as st

from torchquant.statistics import (
    exact_quantile,
    histogram_accumulate_,
    histogram_quantile,
    histogram_range,
    new_histogram,
)

ACCUMULATE = torch.ops.torchquant.histogram_accumulate_.default
QUANTILE = torch.ops.torchquant.histogram_quantile.default
RANGE = torch.ops.torchquant.histogram_range.default
RULES = ("mse", "entropy", "percentile", "minmax")
QUANTILES = [0.0, 0.001, 0.25, 0.5, 0.9, 0.999, 1.0]


def heavy(count: int, seed: int = 0) -> torch.Tensor:
    spread = torch.randn(count, generator=random(seed)).exp()
    return torch.randn(count, generator=random(seed + 1)) * spread


# Post-softmax, post-ReLU, post-GELU, one-sided, constant: what calibration meets.
VALUES = {
    "heavy": heavy(20000),
    "softmax": torch.randn(200, 197, generator=random(3)).mul(2).softmax(1).flatten(),
    "relu": heavy(20000).relu(),
    "gelu": torch.nn.functional.gelu(heavy(20000)),
    "far": 40 + heavy(5000),
    "negative": -heavy(5000).abs() - 1,
    "constant": torch.full((1000,), 0.7),
    "zero": torch.zeros(100),
    "one": torch.tensor([-3.3]),
    "extreme": torch.tensor([3.4e38, -3.4e38, 1e-45, -1e-45, 0.0, -0.0]),
}


def histogram_of(x: torch.Tensor, bins: int = 0) -> torch.Tensor:
    histogram = new_histogram(bins=bins, device=x.device)
    histogram_accumulate_(histogram, x)
    return histogram


def reference(x: torch.Tensor, bins: int) -> torch.Tensor:
    """The contract in integers and float64."""
    value = x.flatten().float().cpu() + 0.0  # -0 + 0 = +0
    bits = value.view(torch.int32).long() & 0xFFFFFFFF
    ordered = torch.where(bits >= 1 << 31, ~bits & 0xFFFFFFFF, bits | 1 << 31)
    index = ordered >> 32 - int(math.log2(bins))
    powers = torch.stack([torch.ones_like(value), value, value.double().square()]).double()
    powers[1] = value.double()
    return torch.zeros(3, bins, dtype=torch.float64).index_add_(1, index, powers)


@pytest.mark.parametrize("bins", [512, 4096, 16384, 65536])
@pytest.mark.parametrize("name", VALUES)
def test_equals_the_contract(place, name, bins):
    x = VALUES[name].to(place)
    got, wanted = histogram_of(x, bins).cpu(), reference(x, bins)
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


def test_sums_of_many_values_need_many_tables(place):
    x = heavy(40000).repeat(3).to(place)
    for bins in (512, 1024):  # tables of 2^13 and of 2^15 values
        torch.testing.assert_close(histogram_of(x, bins).cpu(), reference(x, bins), rtol=1e-12, atol=0)


def test_merging_is_adding(place):
    x = heavy(9000).to(place)
    parts = new_histogram(device=place)
    for part in x.split(1700):
        histogram_accumulate_(parts, part)
    torch.testing.assert_close(parts, histogram_of(x), rtol=1e-13, atol=0)
    assert torch.equal(parts[0], histogram_of(x)[0])


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_channels_are_histograms_of_their_own(place, dtype, axis):
    x = heavy(5 * 37 * 6).reshape(5, 37, 6).to(place, dtype)
    histogram = new_histogram(x.shape[axis], device=place)
    histogram_accumulate_(histogram, x, axis=axis)
    for channel in range(x.shape[axis]):
        torch.testing.assert_close(
            histogram[channel].cpu(), reference(x.select(axis, channel), 4096), rtol=1e-12, atol=0
        )


def test_layout_does_not_matter(place):
    x = heavy(600).reshape(20, 30).to(place)
    for name, view in layouts(x).items():
        assert_same(histogram_of(view), histogram_of(x)), name
    image = heavy(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).to(place)
    assert_same(histogram_of(image.to(memory_format=torch.channels_last)), histogram_of(image))
    assert_same(histogram_of(x[:1].expand(4, 30)), histogram_of(x[:1].repeat(4, 1)))


def test_threads_and_tiers_give_the_same_bits(each_tier):
    x = heavy(200_000)
    channels = x.reshape(100, 40, 50)

    def both():
        per_channel = new_histogram(40)
        histogram_accumulate_(per_channel, channels, axis=1)
        return histogram_of(x, 1024), per_channel

    with threads(1):
        wanted = both()
    with threads(4):
        assert_same(both(), wanted)
    with tier("scalar"):
        assert_same(both(), wanted)


@pytest.mark.parametrize("name", VALUES)
def test_quantiles_are_within_a_bin(place, name):
    x = VALUES[name].to(place)
    got = histogram_quantile(histogram_of(x), QUANTILES).cpu()
    wanted = torch.quantile(x.double().cpu(), torch.tensor(QUANTILES, dtype=torch.float64))
    near = 2.0**-5 * wanted.abs() + 2.0**-126  # between two bins, their distance comes on top
    gap = x.sort().values.double().diff().amax().cpu() if name == "heavy" else torch.tensor(0.0)
    assert ((got.double() - wanted).abs() <= near + gap).all()
    if name in ("constant", "zero", "one"):
        assert torch.equal(got, wanted.float())


def test_one_or_two_values_of_a_bin_are_exact(place):
    x = torch.tensor([5.01, 5.02, 80.5, -2.25], device=place)
    got = histogram_quantile(histogram_of(x), [0.0, 1 / 3, 2 / 3, 1.0])
    torch.testing.assert_close(got.cpu(), torch.tensor([-2.25, 5.01, 5.02, 80.5]), rtol=1e-6, atol=0)


def test_quantiles_of_channels(place):
    x = heavy(4000).reshape(1000, 4).to(place)
    histogram = new_histogram(4, device=place)
    histogram_accumulate_(histogram, x)
    got = histogram_quantile(histogram, [0.1, 0.9])
    assert got.shape == (4, 2) and got.dtype == torch.float32
    for channel in range(4):
        assert_same(got[channel], histogram_quantile(histogram[channel], [0.1, 0.9]))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("name", VALUES)
def test_exact_quantile_is_that_of_sorted_data(place, name, dtype):
    x = VALUES[name].to(place, dtype)
    if not x.isfinite().all():
        x = x.clamp(-6e4, 6e4)
    for q in QUANTILES:
        wanted = torch.quantile(x.double(), q)
        for values in (x, list(x.split(777))):
            torch.testing.assert_close(exact_quantile(values, q).double(), wanted, rtol=2e-7, atol=1e-45)


def test_exact_quantile_has_no_limit_on_the_number_of_values():
    count = (1 << 24) + 5
    x = torch.arange(count, dtype=torch.float32).flip(0).mul_(0.5)  # float32 holds every one
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x, 0.5)
    assert exact_quantile(x, 0.5) == (count - 1) / 4
    assert exact_quantile(x, 1.0) == (count - 1) / 2


def error_of(x, scale, zero_point, bits):
    codes = (x / scale.cpu() + zero_point.cpu()).round().clamp(0, 2**bits - 1)
    return ((codes - zero_point.cpu()) * scale.cpu() - x).double().square().mean()


def candidate_grids(x, bits, symmetric):
    """Scale and zero point of ranges that shrink towards zero, or from one side where all values lie on it."""
    low, high, top = x.amin(), x.amax(), 2**bits - 1
    for shrink in torch.linspace(0.02, 1, 50).tolist():
        if symmetric:
            yield x.abs().amax() * shrink / (top / 2), torch.tensor(float(2 ** (bits - 1)))
            continue
        for other in torch.linspace(0.1, 1, 24).tolist() if low < 0 < high else [1.0]:
            start = low * other if high > 0 else high + (low - high) * shrink
            end = start + (high - start) * shrink if low >= 0 else high * (shrink if high > 0 else 1)
            scale = (end - start) / top
            yield scale, (-start / scale).round()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["heavy", "softmax", "relu", "gelu", "far", "negative"])
def test_mse_range_is_as_good_as_a_search_on_the_data(place, name, bits, symmetric):
    x = VALUES[name]
    if name == "far" and symmetric:
        x = x - 40  # far from zero, a symmetric level that falls on the values is a lottery that no search wins
    scale, zero_point = histogram_range(histogram_of(x.to(place)), bits=bits, symmetric=symmetric)
    tried = [grid for grid in candidate_grids(x, bits, symmetric) if grid[0] > 0]
    assert error_of(x, scale, zero_point, bits) <= 1.05 * min(error_of(x, *grid, bits) for grid in tried)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", VALUES)
def test_minmax_covers_every_value_and_little_more(place, name, symmetric):
    x = VALUES[name].double()
    options = {"bits": 8, "symmetric": symmetric, "rule": "minmax"}
    scale, zero_point = (t.cpu().double() for t in histogram_range(histogram_of(VALUES[name].to(place)), **options))
    low, high, largest = x.amin(), x.amax(), x.abs().amax()
    slack = 0.5001 * scale + 1e-6 * largest
    top = scale if symmetric else 0  # a symmetric grid has one level less above than below
    assert -zero_point * scale <= low + slack and (255 - zero_point) * scale >= high - slack - top
    extent = 2 * largest if symmetric else high - low
    if high > low and largest < 1e38:  # a constant has a grid of its own
        assert 255 * scale <= extent + 2.0**-4 * largest


def test_percentile_is_the_range_between_quantiles(place):
    histogram = histogram_of(heavy(20000).to(place))
    low, high = histogram_quantile(histogram, [0.01, 0.99]).cpu()
    scale, zero_point = histogram_range(histogram, bits=8, rule="percentile", percentile=0.99)
    torch.testing.assert_close(scale.cpu(), (high - low) / 255, rtol=1e-6, atol=0)
    assert zero_point == torch.round(-low / scale.cpu())
    scale, zero_point = histogram_range(histogram, bits=8, symmetric=True, rule="percentile", percentile=0.99)
    torch.testing.assert_close(scale.cpu(), max(-low, high) / 127.5, rtol=1e-6, atol=0)
    assert zero_point == 128


def test_entropy_clips_outliers_and_keeps_even_data_whole(place):
    even = torch.linspace(-1, 1, 20001)
    outlier = torch.cat([torch.randn(20000, generator=random(5)), torch.tensor([200.0, -200.0])])
    full = histogram_range(histogram_of(outlier.to(place)), bits=8, rule="minmax")[0]
    assert histogram_range(histogram_of(outlier.to(place)), bits=8, rule="entropy")[0] < 0.1 * full
    full = histogram_range(histogram_of(even.to(place)), bits=8, rule="minmax")[0]
    assert histogram_range(histogram_of(even.to(place)), bits=8, rule="entropy")[0] > 0.9 * full


@pytest.mark.parametrize("rule", RULES)
def test_ranges_of_channels(place, rule):
    x = (heavy(6000).reshape(2000, 3) * torch.tensor([1.0, 30.0, 0.0])).to(place)
    histogram = new_histogram(3, device=place)
    histogram_accumulate_(histogram, x)
    scale, zero_point = histogram_range(histogram, bits=4, rule=rule)
    assert scale.shape == zero_point.shape == (3,) and scale.dtype == torch.float32
    for channel in range(3):
        single = histogram_range(histogram[channel], bits=4, rule=rule)
        assert_same(single, (scale[channel], zero_point[channel]))
        assert single[0].shape == ()
    assert (scale[2], zero_point[2]) == (1, 0), "a channel of zeros"


def test_empty_tensors_change_nothing(place):
    histogram = histogram_of(heavy(10).to(place))
    before = histogram.clone()
    histogram_accumulate_(histogram, torch.empty(0, 3, device=place))
    assert_same(histogram, before)


ERRORS = {
    "histogram_accumulate_: histogram must be float64, got Float": (torch.zeros(3, 512), torch.ones(3), {}),
    r"histogram must be \[3, B\] or \[C, 3, B\] with B = 512, 1024, .. 65536, got \[3, 500\]": (
        torch.zeros(3, 500, dtype=torch.float64),
        torch.ones(3),
        {},
    ),
    r"got \[512\]": (torch.zeros(512, dtype=torch.float64), torch.ones(3), {}),
    "x must be float32, float16 or bfloat16, got Double": (new_histogram(), torch.ones(3).double(), {}),
    r"x must have the C=4 channels of histogram along axis -1, got \[2, 3\]": (
        new_histogram(4),
        torch.ones(2, 3),
        {},
    ),
    "channels of histogram along axis 2": (new_histogram(4), torch.ones(2, 3), {"axis": 2}),
    "x must be finite, got 2 NaN or Inf": (new_histogram(), torch.tensor([1.0, math.nan, -math.inf]), {}),
    "x must be finite, got 1 NaN or Inf": (new_histogram(2), torch.tensor([[1.0, math.inf]]), {}),
}


@pytest.mark.parametrize("text", ERRORS)
def test_bad_input_is_refused_and_changes_nothing(text):
    histogram, x, options = ERRORS[text]
    before = histogram.clone()
    with pytest.raises((ValueError, TypeError), match=text):
        histogram_accumulate_(histogram, x, **options)
    assert_same(histogram, before)


def test_bad_questions_are_refused():
    histogram = histogram_of(torch.ones(3))
    with pytest.raises(ValueError, match=r"histogram_quantile: quantiles must be in \[0, 1\], got 1.5"):
        histogram_quantile(histogram, [1.5])
    with pytest.raises(ValueError, match="histogram_quantile: histogram must hold at least one value, got none"):
        histogram_quantile(new_histogram(), [0.5])
    with pytest.raises(ValueError, match="histogram_range: histogram must hold at least one value in every channel"):
        histogram_range(new_histogram(2), bits=4)
    with pytest.raises(ValueError, match="histogram_range: bits must be 2..8, got 9"):
        histogram_range(histogram, bits=9)
    with pytest.raises(ValueError, match="rule must be mse, entropy, percentile or minmax, got 'kl'"):
        histogram_range(histogram, bits=4, rule="kl")
    with pytest.raises(ValueError, match=r"percentile must be a fraction in \(0.5, 1\], got 99"):
        histogram_range(histogram, bits=4, percentile=99)
    with pytest.raises(ValueError, match=r"exact_quantile: q must be in \[0, 1\], got -1"):
        exact_quantile(torch.ones(3), -1)
    with pytest.raises(ValueError, match="exact_quantile: x must hold at least one value, got none"):
        exact_quantile([torch.ones(0)], 0.5)


def test_opcheck(place):
    x = heavy(24).reshape(4, 6).to(place)
    check_op(ACCUMULATE, (new_histogram(device=place), x))
    check_op(ACCUMULATE, (new_histogram(4, device=place), x), {"axis": 0})
    check_op(ACCUMULATE, (new_histogram(6, device=place), x[:0]))
    for histogram in (histogram_of(x), torch.stack([histogram_of(x), histogram_of(x * 2)])):
        check_op(QUANTILE, (histogram, [0.1, 0.5, 1.0]))
        check_op(QUANTILE, (histogram, []))
        for rule in RULES:
            check_op(RANGE, (histogram,), {"bits": 4, "rule": rule})
    check_op(RANGE, (new_histogram(0, device=place),), {"bits": 4})


def script_histogram(x: torch.Tensor):
    histogram = torch.zeros([3, 1024], dtype=torch.float64)
    torch.ops.torchquant.histogram_accumulate_(histogram, x)
    scale, zero_point = torch.ops.torchquant.histogram_range(histogram, bits=4, rule="entropy")
    return scale, zero_point, torch.ops.torchquant.histogram_quantile(histogram, [0.5])


class Observer(torch.nn.Module):
    def forward(self, x):
        histogram = torch.zeros(3, 1024, dtype=torch.float64)
        torch.ops.torchquant.histogram_accumulate_(histogram, x)
        return torch.ops.torchquant.histogram_range(histogram, bits=4)


def test_torchscript_and_export_give_the_same():
    x = heavy(500)
    assert_same(scripted(script_histogram)(x), script_histogram(x))
    exported = torch.export.export(Observer(), (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert_same(exported.module()(heavy(77)), Observer()(heavy(77)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=4),
    dtype=st.sampled_from(FLOAT_TYPES),
    bins=st.sampled_from([512 << m for m in range(8)]),
    axis=st.integers(-4, 3),
    exponent=st.integers(-40, 12),
)
def test_any_tensor(shape, dtype, bins, axis, exponent):
    x = (torch.randn(shape, generator=random(9)) * 2.0**exponent).to(dtype)
    torch.testing.assert_close(histogram_of(x, bins), reference(x, bins), rtol=1e-12, atol=0)
    if -x.dim() <= axis < x.dim():
        histogram = new_histogram(x.shape[axis], bins=bins)
        histogram_accumulate_(histogram, x, axis=axis)
        torch.testing.assert_close(histogram.sum(0), reference(x, bins), rtol=1e-12, atol=0)
    if x.numel():
        scale, zero_point = histogram_range(histogram_of(x, bins), bits=3)
        assert scale > 0 and scale.isfinite() and zero_point == zero_point.round()
