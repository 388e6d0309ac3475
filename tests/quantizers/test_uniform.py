"""uniform_quantize, uniform_dequantize and uniform_fit against float64 rounding, at every granularity."""

import math

import pytest
import torch
from helpers import FLOAT_TYPES, assert_same, check_op, layouts, random, scripted, threads, tier
from hypothesis import given, settings
from hypothesis import strategies as st

from torchquant.quantizers import (
    dynamic_fake_quantize,
    dynamic_quantize,
    uniform_dequantize,
    uniform_fit,
    uniform_quantize,
)
from torchquant.solvers import rtn_quantize
from torchquant.statistics import histogram_accumulate_, histogram_range, new_histogram

QUANTIZE = torch.ops.torchquant.uniform_quantize.default
DEQUANTIZE = torch.ops.torchquant.uniform_dequantize.default
FIT = torch.ops.torchquant.uniform_fit.default
FAKE = torch.ops.torchquant.dynamic_fake_quantize.default
DYNAMIC = torch.ops.torchquant.dynamic_quantize.default


def activations(*shape: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed, with channels of different size and place."""
    x = torch.randn(shape, generator=random(seed)) * torch.randn(shape, generator=random(seed + 1)).exp()
    return x * torch.linspace(0.1, 4, shape[-1]) + torch.linspace(-1, 2, shape[-1]) if shape else x


# Granularity -> (shape of x, shape of scale, the same scale broadcast to x, options).
CASES = {
    "tensor": ((3, 5, 7), (), lambda s: s, {}),
    "tensor of one entry": ((3, 5, 7), (1,), lambda s: s, {}),
    "token": ((3, 5, 7), (3, 5, 1), lambda s: s, {}),
    "last channels": ((3, 5, 7), (7,), lambda s: s, {}),
    "first channels": ((3, 5, 7), (3,), lambda s: s[:, None, None], {"axis": 0}),
    "middle channels": ((3, 5, 7, 2), (5,), lambda s: s[:, None, None], {"axis": 1}),
    "negative axis": ((3, 5, 7, 2), (7,), lambda s: s[:, None], {"axis": -2}),
    "image channels": ((2, 4, 3, 3), (1, 4, 1, 1), lambda s: s, {}),
    "head and token": ((2, 4, 6, 5), (2, 4, 1, 5), lambda s: s, {}),
    "own channels": ((2, 6), (1, 6), lambda s: s, {}),
    "groups": ((3, 20), (3, 3), lambda s: s.repeat_interleave(8, -1)[..., :20], {"group_size": 8}),
    "shared groups": ((2, 3, 20), (5,), lambda s: s.repeat_interleave(4, -1), {"group_size": 4}),
    "groups of one": ((2, 6), (2, 6), lambda s: s, {"group_size": 1}),
    "vector": ((9,), (9,), lambda s: s, {}),
    "number": ((), (), lambda s: s, {}),
}


def grids_for(shape, bits, seed=4):
    scale = torch.rand(shape, generator=random(seed)) + 0.05
    zero_point = (torch.rand(shape, generator=random(seed + 1)) * 2**bits).round()
    return scale, zero_point


def assert_nearest(codes, x, scale, zero_point, bits):
    """Every code nearest, where float32 cannot have moved the tie."""
    position = (x.double() / scale.double() + zero_point.double()).clamp(0, 2**bits - 1)
    away = (position - codes.cpu().double()).abs()
    assert (away <= 0.5 + 1e-6 * 2**bits).all()


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", CASES)
def test_codes_and_values_at_every_granularity(place, name, bits, dtype):
    shape, grid_shape, broadcast, options = CASES[name]
    x = (3 * activations(*shape)).to(dtype)
    scale, zero_point = grids_for(grid_shape, bits)
    on = [t.to(place) for t in (x, scale, zero_point)]
    codes = uniform_quantize(*on, bits=bits, **options)
    assert codes.shape == shape and codes.dtype == torch.uint8
    assert_nearest(codes, x, broadcast(scale), broadcast(zero_point), bits)
    values = uniform_dequantize(codes, *on[1:], **options)
    wanted = (codes.cpu().float() - broadcast(zero_point)) * broadcast(scale)
    assert_same(values.cpu(), wanted)
    assert_same(uniform_quantize(values, *on[1:], bits=bits, **options), codes)  # levels stay where they are


def test_ties_go_to_the_even_code_and_ends_saturate(place):
    x = torch.tensor([-9.0, 0.5, 1.5, 2.5, 13.5, 14.5, 15.5, 3e38], device=place)
    one, zero = torch.tensor(1.0, device=place), torch.tensor(0.0, device=place)
    assert uniform_quantize(x, one, zero, bits=4).tolist() == [0, 0, 2, 2, 14, 14, 15, 15]
    assert uniform_quantize(x, one, zero + 0.5, bits=4).tolist() == [0, 1, 2, 3, 14, 15, 15, 15]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fit_per_token_and_group_is_that_of_rounding_a_weight(place, bits, symmetric):
    x = activations(11, 45).to(place)
    grid = "symmetric" if symmetric else "asymmetric"
    for granularity, group_size in (("token", 0), ("group", 16), ("group", 45), ("group", 100)):
        wanted = rtn_quantize(x, bits=bits, group_size=group_size, grid=grid)
        options = {"bits": bits, "granularity": granularity, "group_size": group_size, "symmetric": symmetric}
        assert_same(dynamic_quantize(x, **options), wanted)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape, axis", [((4, 6, 5), -1), ((4, 6, 5), 1), ((4, 6, 5), 0), ((7,), 0)])
def test_fit_per_channel_is_fit_of_each_channel(place, shape, axis, symmetric):
    x = activations(*shape).to(place)
    scale, zero_point = uniform_fit(x, bits=4, granularity="channel", axis=axis, symmetric=symmetric)
    assert scale.shape == zero_point.shape == (shape[axis],)
    for channel in range(shape[axis]):
        one = uniform_fit(x.select(axis, channel), bits=4, symmetric=symmetric)
        assert_same(one, (scale[channel], zero_point[channel]))
        assert one[0].shape == ()


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("granularity", ["tensor", "token", "channel", "group"])
@pytest.mark.parametrize("bits", [3, 8])
def test_a_fitted_grid_is_within_half_a_step_of_every_value(place, granularity, bits, dtype):
    x = activations(6, 10, 24).to(place, dtype)
    options = {"axis": 1} if granularity == "channel" else {}
    options |= {"group_size": 10} if granularity == "group" else {}
    codes, scale, zero_point = dynamic_quantize(x, bits=bits, granularity=granularity, **options)
    values = uniform_dequantize(codes, scale, zero_point, **options)
    step = uniform_dequantize(torch.ones_like(codes), scale, torch.zeros_like(scale), **options)
    # An integral zero point moves the range by up to half a step: the outermost values may lose as much again.
    assert ((values - x.float()).abs() <= 1.0001 * step).all()
    assert torch.equal(zero_point, zero_point.round())


def test_static_ranges_lose_less_than_the_full_range(place):
    x = activations(400, 64).to(place)
    per_tensor, per_channel = new_histogram(device=place), new_histogram(64, device=place)
    histogram_accumulate_(per_tensor, x)
    histogram_accumulate_(per_channel, x)

    def error(scale, zero_point):
        codes = uniform_quantize(x, scale, zero_point, bits=4)
        return (uniform_dequantize(codes, scale, zero_point) - x).square().mean()

    errors = [
        error(*histogram_range(per_channel, bits=4)),
        error(*histogram_range(per_tensor, bits=4)),
        error(*histogram_range(per_tensor, bits=4, rule="percentile", percentile=0.999)),
        error(*uniform_fit(x, bits=4)),
    ]
    assert errors == sorted(errors) and errors[1] < 0.5 * errors[3]


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0])
def test_constant_values_are_exact(place, value):
    x = torch.full((3, 4), value, device=place)
    for granularity in ("tensor", "token", "channel"):
        codes, scale, zero_point = dynamic_quantize(x, bits=3, granularity=granularity)
        assert_same(uniform_dequantize(codes, scale, zero_point), x)


def test_layout_does_not_matter(place):
    x, grids = activations(12, 20).to(place), [t.to(place) for t in grids_for((20,), 4)]
    wanted, fitted = uniform_quantize(x, *grids, bits=4), uniform_fit(x, bits=4, granularity="token")
    for view in layouts(x).values():
        assert_same(uniform_quantize(view, *grids, bits=4), wanted)
        assert_same(uniform_fit(view, bits=4, granularity="token"), fitted)
    for view in layouts(wanted).values():
        assert_same(uniform_dequantize(view, *grids), uniform_dequantize(wanted, *grids))


def test_threads_and_tiers_give_the_same_bits(each_tier):
    x = activations(300, 131)
    cases = [({"granularity": "token"}, {}), ({"granularity": "group", "group_size": 9}, {"group_size": 9})]

    def run():
        outputs = []
        for fit, options in [*cases, ({"granularity": "channel"}, {}), ({}, {})]:
            codes, scale, zero_point = dynamic_quantize(x, bits=4, **fit)
            outputs += [codes, scale, zero_point, uniform_dequantize(codes, scale, zero_point, **options)]
        return outputs

    with threads(1):
        wanted = run()
    with threads(4):
        assert_same(run(), wanted)
    with tier("scalar"):
        assert_same(run(), wanted)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 131])
def test_rows_of_any_width_get_the_codes_of_fit_and_quantize(each_tier, columns, symmetric):
    x = activations(9, columns)
    x[1], x[2], x[3] = 0.0, -1.5, 1e-40
    x[4] *= 1e30
    x[5] = x[5].abs() + 100
    x[6, 0], x[7, -1] = -40.0, 40.0
    for bits in (3, 8):
        fit = {"bits": bits, "granularity": "token", "symmetric": symmetric}
        scale, zero_point = uniform_fit(x, **fit)
        wanted = uniform_quantize(x, scale, zero_point, bits=bits), scale, zero_point
        values = uniform_dequantize(*wanted)
        for view in layouts(x).values():
            assert_same(dynamic_quantize(view, **fit), wanted)
            assert_same(dynamic_fake_quantize(view, **fit), values)
        heads = torch.stack([x.view(3, 3, columns)] * 2, -2)[:, :, 1].transpose(0, 1)  # not in one piece
        assert_same(dynamic_quantize(heads, **fit), [t.view(3, 3, -1).transpose(0, 1) for t in wanted])
        assert_same(dynamic_fake_quantize(heads, **fit), values.view(3, 3, -1).transpose(0, 1))


def test_gradients_are_not_in_the_way(place):
    x = activations(3, 8).to(place).requires_grad_()
    codes = dynamic_quantize(x, bits=4)[0]
    assert not codes.requires_grad
    assert_same(codes, dynamic_quantize(x.detach(), bits=4)[0])


ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)
ERRORS = {
    "uniform_quantize: bits must be 2..8, got 1": (torch.ones(2, 3), ONE, ZERO, {"bits": 1}),
    "uniform_quantize: x must be float32, float16 or bfloat16, got Double": (torch.ones(2).double(), ONE, ZERO, {}),
    "uniform_quantize: x must be finite, got 2 NaN or Inf": (torch.tensor([math.nan, math.inf, 1]), ONE, ZERO, {}),
    "uniform_quantize: scale must be float32, got Double": (torch.ones(2), ONE.double(), ZERO, {}),
    "uniform_quantize: zero_point must be float32, got Int": (torch.ones(2), ONE, ZERO.int(), {}),
    "uniform_quantize: scale must be positive, got 0": (torch.ones(2), ZERO, ZERO, {}),
    "uniform_quantize: scale must be finite, got 1 NaN or Inf": (torch.ones(2), ONE / 0, ZERO, {}),
    r"uniform_quantize: zero_point must have shape \[2\], got \[\]": (torch.ones(2), torch.ones(2), ZERO, {}),
    r"uniform_quantize: scale of shape \[2\] needs as many channels of x along axis -1, got \[2, 3\]": (
        torch.ones(2, 3),
        torch.ones(2),
        torch.ones(2),
        {},
    ),
    "along axis 5": (torch.ones(2, 3), torch.ones(2), torch.ones(2), {"axis": 5}),
    r"scale must be \[\], \[C\] or of x's rank and broadcast to x, got \[3, 1\] for x \[2, 3\]": (
        torch.ones(2, 3),
        torch.ones(3, 1),
        torch.ones(3, 1),
        {},
    ),
    r"scale must have shape \[2, 3\] or \[3\] for groups of 2, got \[2\]": (
        torch.ones(2, 5),
        torch.ones(2),
        torch.ones(2),
        {"group_size": 2},
    ),
    "x must have a last dimension to group": (ONE, ONE, ZERO, {"group_size": 2}),
    "group_size must be 0": (torch.ones(2), ONE, ZERO, {"group_size": -2}),
}


@pytest.mark.parametrize("text", ERRORS)
def test_bad_input_is_refused(text):
    x, scale, zero_point, options = ERRORS[text]
    with pytest.raises((ValueError, TypeError), match=text):
        uniform_quantize(x, scale, zero_point, **{"bits": 4, **options})


def test_bad_codes_and_fits_are_refused():
    with pytest.raises(TypeError, match="uniform_dequantize: codes must be uint8, got Int"):
        uniform_dequantize(torch.ones(2).int(), ONE, ZERO)
    with pytest.raises(ValueError, match="uniform_fit: granularity must be tensor, token, channel or group, got 'row'"):
        uniform_fit(torch.ones(2), bits=4, granularity="row")
    for options in ({"granularity": "group"}, {"granularity": "token", "group_size": 4}):
        with pytest.raises(ValueError, match="uniform_fit: group_size must be positive for groups and 0 otherwise"):
            uniform_fit(torch.ones(2), bits=4, **options)
    with pytest.raises(ValueError, match="uniform_fit: x needs the dimension 3, got"):
        uniform_fit(torch.ones(2), bits=4, granularity="channel", axis=3)
    for granularity in ("tensor", "token"):
        with pytest.raises(ValueError, match="uniform_fit: x must be finite, got 1 NaN or Inf"):
            uniform_fit(torch.tensor([1.0, math.nan, 2.0]), bits=4, granularity=granularity)
    for column in (0, 20, 39):
        x = torch.ones(3, 40)
        x[1, column] = math.nan if column else math.inf
        with pytest.raises(ValueError, match="dynamic_quantize: x must be finite, got 1 NaN or Inf"):
            dynamic_quantize(x, bits=4)
        with pytest.raises(ValueError, match="dynamic_fake_quantize: x must be finite, got 1 NaN or Inf"):
            dynamic_fake_quantize(x, bits=4)
    with pytest.raises(TypeError, match="uniform_fit: x must be float32, float16 or bfloat16, got Long"):
        uniform_fit(torch.arange(3), bits=4)


@pytest.mark.parametrize("name", [name for name in CASES if name != "number"])  # that one has no strided layout
def test_opcheck(place, name):
    shape, grid_shape, _, options = CASES[name]
    grids = [t.to(place) for t in grids_for(grid_shape, 4)]
    x = activations(*shape).to(place)
    check_op(QUANTIZE, (x, *grids), {"bits": 4, **options})
    check_op(DEQUANTIZE, (uniform_quantize(x, *grids, bits=4, **options), *grids), options)


def test_opcheck_of_fits(place):
    x = activations(4, 6).to(place)
    check_op(FIT, (x,), {"bits": 4})
    check_op(FIT, (x,), {"bits": 4, "granularity": "token", "symmetric": True})
    check_op(FIT, (x,), {"bits": 4, "granularity": "channel", "axis": 0})
    check_op(FIT, (x,), {"bits": 4, "granularity": "group", "group_size": 4})
    for granularity, options in (("tensor", {}), ("token", {}), ("channel", {"axis": 0}), ("group", {"group_size": 3})):
        check_op(DYNAMIC, (x,), {"bits": 4, "granularity": granularity, **options})
        check_op(FAKE, (x,), {"bits": 4, "granularity": granularity, **options})


@pytest.mark.parametrize("shape", [(0, 6), (4, 0), (2, 0, 3)])
def test_empty_inputs(place, shape):
    x = torch.ones(shape, device=place)
    for granularity, options in (("tensor", {}), ("token", {}), ("channel", {}), ("group", {"group_size": 4})):
        codes, *grids = dynamic_quantize(x, bits=4, granularity=granularity, **options)
        assert codes.shape == uniform_dequantize(codes, *grids, **options).shape == shape
        assert all((scale == 1).all() and (zero_point == 0).all() for scale, zero_point in [grids])
    check_op(FIT, (x,), {"bits": 4, "granularity": "group", "group_size": 4})
    check_op(QUANTIZE, (x, *uniform_fit(x, bits=4, granularity="token")), {"bits": 4})
    check_op(DEQUANTIZE, (x.byte(), *uniform_fit(x, bits=4, granularity="token")))


class Dynamic(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale, zero_point = dynamic_quantize(x, bits=4, granularity="token")
        return torch.ops.torchquant.uniform_dequantize(codes, scale, zero_point)


def test_torchscript_and_export_give_the_same():
    x = activations(5, 12)
    assert_same(scripted(Dynamic())(x), Dynamic()(x))
    exported = torch.export.export(Dynamic(), (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    assert_same(exported.module()(activations(9, 12)), Dynamic()(activations(9, 12)))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    dtype=st.sampled_from(FLOAT_TYPES),
    bits=st.integers(2, 8),
    granularity=st.sampled_from(["tensor", "token", "channel", "group"]),
    axis=st.integers(-4, 3),
    group_size=st.integers(1, 11),
    symmetric=st.booleans(),
    exponent=st.integers(-14, 12),
)
def test_any_activations(shape, dtype, bits, granularity, axis, group_size, symmetric, exponent):
    x = (torch.randn(shape, generator=random(2)) * 2.0**exponent).to(dtype)
    group_size = group_size if granularity == "group" else 0
    axis = axis if granularity == "channel" and -x.dim() <= axis < x.dim() else -1
    options = {"axis": axis, "group_size": group_size}
    codes, scale, zero_point = dynamic_quantize(x, bits=bits, granularity=granularity, symmetric=symmetric, **options)
    values = uniform_dequantize(codes, scale, zero_point, **options)
    fit = {"bits": bits, "granularity": granularity, "symmetric": symmetric}
    assert_same(dynamic_fake_quantize(x, **fit, **options), values)
    step = uniform_dequantize(torch.ones_like(codes), scale, torch.zeros_like(scale), **options)
    assert codes.shape == values.shape == tuple(shape) and (codes.long() < 2**bits).all()
    assert (scale > 0).all() and ((values - x.float()).abs() <= 1.001 * step).all()
