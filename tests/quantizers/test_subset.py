"""subset_select against brute force, the published selection and its promises; codes against argmin in float64."""

import itertools

import pytest
import torch
from helpers import FLOAT_TYPES, assert_same, layouts, random, threads, tier
from quantizers.subset_universes import free_universe, grid_universe

from torchquant.quantizers import (
    choose_subset,
    subset_dequantize,
    subset_fit_scale,
    subset_quantize,
    subset_select,
    subset_select_kmeans,
    subset_universe,
    uniform_levels,
)
from torchquant.statistics import histogram_accumulate_, new_histogram

SELECT = torch.ops.torchquant.subset_select.default
QUANTIZE = torch.ops.torchquant.subset_quantize.default
DEQUANTIZE = torch.ops.torchquant.subset_dequantize.default


def laplace(count: int, seed: int = 0) -> torch.Tensor:
    uniform = torch.rand(count, generator=random(seed), dtype=torch.float64) - 0.5
    return normalized(-uniform.sign() * torch.log1p(-2 * uniform.abs().clamp(max=0.4999999)))


def half_normal(count: int, seed: int = 0) -> torch.Tensor:
    return normalized(torch.randn(count, generator=random(seed)).clamp(min=0))


def normal(count: int, seed: int = 0) -> torch.Tensor:
    return normalized(torch.randn(count, generator=random(seed)))


def normalized(x: torch.Tensor) -> torch.Tensor:
    return (x / x.abs().amax()).float()


DATA = {"laplace": laplace, "half normal": half_normal, "normal": normal}


def squared_error(x: torch.Tensor, levels: torch.Tensor) -> float:
    distance = (x.double().reshape(-1, 1) - levels.double()).abs()
    return distance.amin(1).square().sum().item()


def brute_force(x: torch.Tensor, universe: torch.Tensor, levels: int, keep_zero: bool) -> float:
    choices = [torch.stack(choice) for choice in itertools.combinations(universe, levels)]
    if keep_zero and (universe == 0).any():
        choices = [choice for choice in choices if (choice == 0).any()]
    return min(squared_error(x, choice) for choice in choices)


# --- universes ---


def test_the_published_universes():
    dfsq, magnitudes, signed = (subset_universe(name) for name in ("dfsq", "subsetq", "subsetq_signed"))
    assert (len(dfsq), len(magnitudes), len(signed)) == (377, 15, 29)
    for universe, units in ((dfsq, 1024), (magnitudes, 32), (signed, 32)):
        assert torch.equal(universe, universe.unique()) and universe.abs().max() == 1
        assert torch.equal(universe * units, (universe * units).round()) and (universe == 0).any()
    assert torch.equal(dfsq, -dfsq.flip(0)) and torch.equal(signed, -signed.flip(0))
    assert torch.equal(signed[signed >= 0], magnitudes)
    gaps = dfsq.diff()
    assert gaps.max() == 1 / 8 and gaps[0] == gaps[-1] == 1 / 8
    with pytest.raises(ValueError, match="subset_universe: name must be one of dfsq, subsetq, .*, got 'shifts'"):
        subset_universe("shifts")


# --- selection ---


@pytest.mark.parametrize("make", [grid_universe, free_universe])
@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_selection_equals_brute_force(place, make, levels):
    for seed, size in enumerate((5, 8, 11, 12)):
        for zero, keep_zero in ((False, True), (True, True), (True, False)):
            universe = make(size, seed)
            if zero and not (universe == 0).any():
                universe = torch.cat([universe[1:], torch.zeros(1)]).sort().values
            x = DATA["laplace"](200, seed) + 0.1
            chosen, error = subset_select(x.to(place), universe.to(place), levels=levels, keep_zero=keep_zero)
            chosen, error = chosen.cpu(), error.item()
            assert torch.isin(chosen, universe).all() and (chosen.diff() > 0).all()
            if keep_zero and (universe == 0).any():
                assert (chosen == 0).any()
            assert error == pytest.approx(squared_error(x, chosen), rel=1e-9)
            assert error == pytest.approx(brute_force(x, universe, levels, keep_zero), rel=1e-9)


@pytest.mark.parametrize("universe", ["dfsq", "subsetq_signed"])
@pytest.mark.parametrize("data", DATA)
def test_error_falls_with_levels_and_is_below_the_published_selection(place, universe, data):
    x, elements = DATA[data](3000).to(place), subset_universe(universe).to(place)
    before = float("inf")
    for levels in (1, 2, 4, 8, 16, 28):
        chosen, error = subset_select(x, elements, levels=levels)
        assert error.item() == pytest.approx(squared_error(x.cpu(), chosen.cpu()), rel=1e-9)
        assert error.item() <= before
        before = error.item()
        if levels in (4, 16):
            for seed in range(2):
                rival, rival_error = subset_select_kmeans(x, elements, levels=levels, generator=random(seed))
                assert torch.isin(rival, elements).all() and (rival == 0).any() and len(rival) == levels
                assert rival_error.item() == pytest.approx(squared_error(x.cpu(), rival.cpu()), rel=1e-9)
                assert error <= rival_error * (1 + 1e-12)


def test_at_64_levels_the_published_selection_is_far_off():
    """Of the specification: between 2.4 and 6.4 times the least error."""
    for data, factor in (("laplace", 2.0), ("half normal", 2.0), ("normal", 1.8)):
        x, elements = DATA[data](6000), subset_universe("dfsq")
        _, error = subset_select(x, elements, levels=64)
        _, rival = subset_select_kmeans(x, elements, levels=64)
        assert rival > factor * error


def test_kmeans_repeats_with_its_seed():
    x, elements = normal(500), subset_universe("dfsq")
    same = [subset_select_kmeans(x, elements, levels=8, generator=random(3)) for _ in range(2)]
    assert_same(same[0], same[1])
    assert_same(
        subset_select_kmeans(x, elements, levels=8),
        subset_select_kmeans(x, elements, levels=8, generator=random(0)),
    )
    with pytest.raises(ValueError, match="subset_select_kmeans: x must hold at least one value, got none"):
        subset_select_kmeans(torch.empty(0), elements, levels=4)


def test_symmetric_data_get_an_error_that_does_not_mind_the_sign(place):
    x, elements = normal(999).to(place), subset_universe("dfsq").to(place)
    both = torch.cat([x, -x])
    assert_same(subset_select(both, elements, levels=9), subset_select(-both, elements, levels=9))
    chosen, error = subset_select(x, elements, levels=8)
    mirrored, mirrored_error = subset_select(-x, elements, levels=8)
    assert torch.equal(chosen, -mirrored.flip(0))
    assert error.item() == pytest.approx(mirrored_error.item(), rel=1e-12)


def test_values_outside_the_universe_and_equal_values(place):
    elements = subset_universe("subsetq").to(place)
    x = torch.tensor([-1e4, 1e5, 0.5, 0.5], device=place)
    chosen, error = subset_select(x, elements, levels=3)
    assert torch.equal(chosen.cpu(), torch.tensor([0.0, 0.5, 1.0]))
    assert error.item() == pytest.approx(squared_error(x.cpu(), chosen.cpu()), rel=1e-9)
    levels, error = subset_select(elements, elements, levels=15)
    assert torch.equal(levels, elements) and error.item() == 0
    zeros, error = subset_select(torch.zeros(7, device=place), elements, levels=4)
    assert (zeros == 0).any() and error.item() == 0


@pytest.mark.parametrize("make", [grid_universe, free_universe])
def test_channels_are_selected_each_on_its_own(place, make):
    x, universe = torch.randn(3, 5, 7, generator=random(1)).to(place), make(20, 0).to(place)
    for axis in (0, 1, -1):
        levels, error = subset_select(x, universe, levels=4, axis=axis)
        assert levels.shape == (x.shape[axis], 4) and error.shape == (x.shape[axis],)
        for channel in range(x.shape[axis]):
            wanted = subset_select(x.select(axis, channel), universe, levels=4)
            assert_same((levels[channel], error[channel]), wanted)


def test_a_histogram_is_as_good_within_its_bins(place):
    for name, make in DATA.items():
        x, elements = make(20000).to(place), subset_universe("dfsq").to(place)
        histogram = new_histogram(device=place)
        histogram_accumulate_(histogram, x)
        _, error = subset_select(x, elements, levels=16)
        chosen, binned_error = subset_select(histogram, elements, levels=16)
        assert squared_error(x.cpu(), chosen.cpu()) <= 1.01 * error.item(), name
        assert binned_error.item() == pytest.approx(error.item(), rel=0.01)
    channels = new_histogram(2, device=place)
    rows = torch.stack([normal(500), half_normal(500)]).to(place)
    histogram_accumulate_(channels, rows, axis=0)
    levels, errors = subset_select(channels, elements, levels=8)
    assert levels.shape == (2, 8) and errors.shape == (2,)
    assert_same((levels[1], errors[1]), subset_select(channels[1], elements, levels=8))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_selection_widens_half_types(place, dtype):
    x, elements = normal(400).to(place, dtype), subset_universe("dfsq").to(place)
    assert_same(subset_select(x, elements, levels=8), subset_select(x.float(), elements, levels=8))


def test_selection_does_not_mind_threads_layout_or_tier(each_tier):
    x, elements = normal(600_000).reshape(600, 1000), subset_universe("dfsq")
    with threads(1):
        wanted = subset_select(x, elements, levels=16)
        wanted_channels = subset_select(x[:7], elements, levels=16, axis=0)
    for count in (2, 5):
        with threads(count), tier("scalar" if count == 5 else each_tier):
            assert_same(subset_select(x, elements, levels=16), wanted)
            assert_same(subset_select(x[:7], elements, levels=16, axis=0), wanted_channels)
    for view in layouts(x[:7]).values():
        assert_same(subset_select(view, elements, levels=16, axis=0), wanted_channels)


# --- codes ---


def nearest(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The first of the nearest levels."""
    distance = (x.double().reshape(-1, 1) - levels.double()).abs()
    first = (distance == distance.amin(1, keepdim=True)).int().argmax(1)
    return first.to(torch.uint8).reshape(x.shape)


def edges(levels: torch.Tensor) -> torch.Tensor:
    """Midpoints with their neighbours, the levels, and far outside."""
    middle = ((levels[1:].double() + levels[:-1].double()) / 2).float()
    far = torch.tensor([-100.0, -2.0, -1.0, 1.0, 2.0, 100.0, 0.0, -0.0])
    around = [torch.nextafter(middle, torch.tensor(s * torch.inf)) for s in (-1.0, 1.0)]
    return torch.cat([middle, *around, levels, far])


def level_sets() -> dict[str, torch.Tensor]:
    dfsq = subset_universe("dfsq")
    return {
        "few": dfsq[::40],
        "sixteen": dfsq[::24][:16],
        "table": dfsq[::5],
        "whole table": torch.arange(-128, 128) / 1024,
        "bisection": torch.randn(40, generator=random(5)).sort().values,
        "uniform": uniform_levels(normal(100), 6),
        "beyond one": torch.arange(-20, 20) / 16,
        "one": torch.tensor([0.25]),
        "equal neighbours": torch.tensor([-0.5, 0.0, 0.0, 0.0, 1.0]),
        "tiny": torch.tensor([-1.4e-45, 0.0, 1.4e-45, 1e-38]),
    }


@pytest.mark.parametrize("name", level_sets())
def test_codes_are_the_nearest_level(place, name):
    levels = level_sets()[name]
    x = torch.cat([edges(levels), torch.randn(5000, generator=random(2)) * 0.5])
    if name == "tiny":
        x = x[x.abs() < 1e-30]  # the reference's differences are exact among these only
    codes = subset_quantize(x.to(place), levels.to(place))
    assert codes.dtype == torch.uint8 and codes.shape == x.shape
    wanted = nearest(x, levels)
    same = levels[codes.cpu().long()] == levels[wanted.long()]  # equal levels may have either code
    assert same.all() if name == "equal neighbours" else torch.equal(codes.cpu(), wanted)
    order = x.sort().indices.to(place)
    assert (codes[order].int().diff() >= 0).all()
    back = subset_dequantize(codes, levels.to(place))
    assert back.dtype == torch.float32 and torch.equal(back, levels.to(place)[codes.long()])
    assert torch.equal(subset_dequantize(subset_quantize(back, levels.to(place)), levels.to(place)), back)


def test_far_values_get_the_outermost_codes(place):
    for levels in level_sets().values():
        codes = subset_quantize(torch.tensor([-3e38, 3e38], device=place), levels.to(place))
        assert codes.tolist() == [0, len(levels) - 1]


def test_ties_go_to_the_lower_level(place):
    for levels in (torch.tensor([-1.0, 0.0, 0.5]), subset_universe("dfsq")[::4]):
        middle = (levels[1:] + levels[:-1]) / 2
        codes = subset_quantize(middle.to(place), levels.to(place))
        assert codes.tolist() == list(range(len(levels) - 1))


@pytest.mark.parametrize("count", [5, 16, 40])
def test_channels_have_levels_of_their_own(place, count):
    universe = subset_universe("dfsq")
    for shape, axis in (((2, 3, 5, 9), 1), ((2, 3, 40, 41), 1), ((3, 50), 0), ((50, 3), 1), ((50, 3), -1), ((3,), 0)):
        x = torch.randn(shape, generator=random(4)) * 0.4
        levels = torch.stack(
            [universe[torch.randperm(377, generator=random(i))[:count]].sort().values for i in range(3)]
        )
        codes = subset_quantize(x.to(place), levels.to(place), axis=axis)
        wanted = torch.stack([nearest(x.select(axis, c), levels[c]) for c in range(3)], axis)
        assert torch.equal(codes.cpu(), wanted)
        values = subset_dequantize(codes, levels.to(place), axis=axis)
        assert torch.equal(
            values.cpu(), torch.stack([levels[c][wanted.select(axis, c).long()] for c in range(3)], axis)
        )
    one = subset_quantize(x.to(place)[:1], levels[:1].to(place), axis=0)
    assert torch.equal(one, subset_quantize(x.to(place)[:1], levels[0].to(place)))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_codes_of_half_types_and_strides(place, dtype):
    levels = subset_universe("dfsq")[::9].to(place)
    x = (torch.randn(20, 33, generator=random(1)) * 0.4).to(place, dtype)
    wanted = subset_quantize(x.float(), levels)
    assert_same(subset_quantize(x, levels), wanted)
    for view in layouts(x).values():
        assert_same(subset_quantize(view, levels), wanted)
    rows = levels[:40].reshape(20, 2)
    assert_same(subset_quantize(x.t(), rows, axis=1), subset_quantize(x, rows, axis=0).t().contiguous())


def test_codes_do_not_mind_threads_or_tier(each_tier):
    x = torch.randn(7, 3, 61, 83, generator=random(0)) * 0.4
    for levels in (subset_universe("dfsq")[::9], torch.randn(3, 20, generator=random(1)).sort(1).values):
        with threads(1):
            wanted = subset_quantize(x, levels, axis=1)
        for count in (2, 8):
            with threads(count), tier("scalar" if count == 8 else each_tier):
                assert_same(subset_quantize(x, levels, axis=1), wanted)


def test_a_code_without_a_level_is_nan(place):
    codes = torch.tensor([0, 1, 2, 255], dtype=torch.uint8, device=place)
    values = subset_dequantize(codes, torch.tensor([1.0, 2.0], device=place))
    assert values[:2].tolist() == [1.0, 2.0] and values[2:].isnan().all()


# --- choice and scale ---


@pytest.mark.parametrize("data", DATA)
def test_uniform_levels_take_over_where_they_are_better(data):
    x = DATA[data](6000)
    for bits, wanted in ((3, "subset"), (4, "subset"), (8, "uniform")):
        choice = choose_subset(x, bits=bits)
        assert choice.name == wanted
        assert choice.error == min(choice.subset_error, choice.uniform_error)
        assert choice.error.item() == pytest.approx(squared_error(x, choice.levels), rel=1e-6)
        assert len(choice.levels) == 2**bits and (choice.levels == 0).any()
        forced = choose_subset(x, bits=bits, fallback=False)
        assert forced.name == "subset" and torch.isin(forced.levels, subset_universe("dfsq")).all()
    published = choose_subset(x, bits=4, selector="kmeans", generator=random(1), fallback=False)
    assert published.error >= choose_subset(x, bits=4).error


def test_each_channel_has_its_own_choice():
    even = torch.linspace(0, 1, 64)[torch.randint(64, (2000,), generator=random(0))]
    x = torch.stack([laplace(2000), even, normal(2000)]).reshape(3, 40, 50).transpose(0, 1)
    choice = choose_subset(x, bits=6, axis=1)
    assert choice.uniform.tolist()[1] and choice.uniform_error[1] < 1e-9
    for channel in range(3):
        single = choose_subset(x[:, channel], bits=6)
        assert_same((choice.levels[channel], choice.error[channel]), (single.levels, single.error))
    mixed = choose_subset(x[:, :2], bits=6, axis=1) if not choice.uniform[0] else choice
    assert mixed.name in ("subset, 1 of 2 uniform", "uniform")
    published = choose_subset(x, bits=3, axis=1, selector="kmeans", fallback=False)
    assert published.name == "subset" and published.levels.shape == (3, 8)
    assert (published.error >= choose_subset(x, bits=3, axis=1).error).all()


def test_choice_errors():
    with pytest.raises(ValueError, match="choose_subset: bits must be 2..8, got 9"):
        choose_subset(torch.ones(3), bits=9)
    with pytest.raises(ValueError, match="choose_subset: selector must be one of exact, kmeans, got 'greedy'"):
        choose_subset(torch.ones(3), bits=4, selector="greedy")
    with pytest.raises(ValueError, match="choose_subset: x must hold at least one value, got none"):
        choose_subset(torch.empty(0), bits=4)


def test_uniform_levels_of_constant_and_one_sided_values():
    assert uniform_levels(torch.zeros(4), 2).tolist() == [0.0, 1.0, 2.0, 3.0]
    assert uniform_levels(torch.tensor([1.0, 3.0]), 2).tolist() == [0.0, 1.0, 2.0, 3.0]
    assert uniform_levels(torch.tensor([-3.0, -1.0]), 2).tolist() == [-3.0, -2.0, -1.0, 0.0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scale_is_the_least_squares_one_and_the_error_never_rises(bits):
    magnitudes, universe = torch.randn(4000, generator=random(bits)).abs(), subset_universe("subsetq")
    errors = []
    for iters in (1, 2, 3, 10, 100):
        scale, levels, error = subset_fit_scale(magnitudes, universe, levels=2 ** (bits - 1), iters=iters)
        errors.append(error.item())
    assert all(after <= before for before, after in itertools.pairwise(errors)) and errors[-1] < errors[0]
    q = subset_dequantize(subset_quantize(magnitudes / scale, levels), levels).double()
    fitted = (q * magnitudes.double()).sum() / q.square().sum()
    assert scale.item() == pytest.approx(fitted.item(), rel=0.01)
    assert (q * scale - magnitudes).square().sum().item() <= error.item() * (1 + 1e-6)


def test_scale_of_values_that_are_all_zero():
    scale, levels, error = subset_fit_scale(torch.zeros(9), subset_universe("subsetq"), levels=4)
    assert (scale.item(), len(levels), error.item()) == (1.0, 4, 0.0)
    with pytest.raises(ValueError, match="subset_fit_scale: x must hold at least one value, got none"):
        subset_fit_scale(torch.empty(0), subset_universe("subsetq"), levels=4)
