"""rtn_quantize against the float64 reference, and what rounding promises."""

import pytest
import torch
from helpers import BITS, FLOAT_TYPES, GRIDS, LAYERS, assert_same, check_op, layouts, scripted, threads, tier
from hypothesis import given, settings
from hypothesis import strategies as st
from solvers import reference

from torchquant.solvers import rtn_quantize

OP = torch.ops.torchquant.rtn_quantize.default


def assert_rounded(weight: torch.Tensor, bits: int, group_size: int, grid: str, place: torch.device) -> None:
    """Grid equal to the reference's, and every code nearest on it."""
    codes, scale, zero_point = rtn_quantize(weight.to(place), bits=bits, group_size=group_size, grid=grid)
    wanted_scale, wanted_zero = reference.grid_of(weight, bits, group_size, grid)
    torch.testing.assert_close(scale.double().cpu(), wanted_scale, rtol=1e-6, atol=0)
    assert (zero_point.double().cpu() != wanted_zero).double().mean() <= 0.01  # an integral one may be a tie
    columns = weight.shape[1]
    delta, zero = (reference.expand(t, columns, group_size) for t in (scale, zero_point))
    ratio = weight.double() / delta
    band = 4 * reference.FLOAT32_EPS * (ratio.abs() + zero.abs() + 1)
    x = reference.position(weight.double(), delta, zero, 2**bits - 1)
    # The most negative weight of a symmetric grid is a tie by construction: one code of every group.
    ties = scale.shape[1] / columns if grid == "symmetric" else 0
    reference.assert_nearest(codes, x, band, allowed=0.03 + ties)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [0, 16, 7, 100])
def test_equals_the_reference(place, bits, group_size, grid):
    for make in LAYERS.values():
        assert_rounded(make(9, 45).weight, bits, group_size, grid, place)


def test_shapes_and_types(place):
    codes, scale, zero_point = rtn_quantize(torch.randn(5, 33, device=place), bits=3, group_size=8)
    assert (codes.shape, codes.dtype) == ((5, 33), torch.uint8)
    assert (scale.shape, scale.dtype) == ((5, 5), torch.float32)
    assert (zero_point.shape, zero_point.dtype) == ((5, 5), torch.float32)
    assert codes.max() <= 7


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("group_size", [0, 16])
def test_shrink_keeps_the_factor_with_the_smallest_weight_error(place, grid, group_size):
    weight, factors = LAYERS["correlated"](24, 80).weight.to(place), [1.0, 0.9, 0.8, 0.65, 0.5]
    chosen = rtn_quantize(weight, bits=3, group_size=group_size, grid=grid, shrink=factors)
    single = [rtn_quantize(weight, bits=3, group_size=group_size, grid=grid, shrink=[f]) for f in factors]

    def errors(quantized):  # [N, G]
        part = (weight.double().cpu() - reference.dequantize(*quantized, group_size)).square()
        return torch.stack([p.sum(1) for p in part.split(group_size or part.shape[1], dim=1)], 1)

    best = torch.stack([errors(q) for q in single]).amin(0)
    torch.testing.assert_close(errors(chosen), best, rtol=1e-5, atol=0)
    assert (chosen[1] != single[0][1]).any(), "the search must have shrunk something"


def test_shrink_scales_both_ends(place):
    weight = torch.randn(4, 32, device=place)
    _, scale, zero_point = rtn_quantize(weight, bits=4)
    _, smaller, same_zero = rtn_quantize(weight, bits=4, shrink=[0.5])
    assert_same((smaller, same_zero), (scale * 0.5, zero_point))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", BITS)
def test_quantizing_again_is_the_identity(place, bits, grid):
    weight = LAYERS["correlated"](16, 48).weight.to(place)
    codes, scale, zero_point = rtn_quantize(weight, bits=bits, group_size=16, grid=grid)
    value = reference.dequantize(codes, scale, zero_point, 16)
    delta, zero = (reference.expand(t, 48, 16) for t in (scale, zero_point))
    x = reference.position(value, delta, zero, 2**bits - 1)
    assert torch.equal(torch.round(x), codes.double().cpu())


def test_ties_go_to_the_even_code(place):
    weight = torch.tensor([[0.0, 15.0, 0.5, 1.5, 2.5, 3.5, 14.5]], device=place)
    codes, scale, zero_point = rtn_quantize(weight, bits=4)
    assert (scale.item(), zero_point.item()) == (1.0, 0.0)
    assert codes.tolist() == [[0, 15, 0, 2, 2, 4, 14]]


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_half_types_are_widened_before_anything_else(place, dtype):
    weight = torch.randn(6, 40, device=place).to(dtype)
    assert_same(rtn_quantize(weight, bits=4, group_size=16), rtn_quantize(weight.float(), bits=4, group_size=16))


def test_layout_does_not_matter(place):
    weight = torch.randn(10, 22, device=place)
    wanted = rtn_quantize(weight, bits=3, group_size=5)
    for name, view in layouts(weight).items():
        assert not view.is_contiguous(), name
        assert_same(rtn_quantize(view, bits=3, group_size=5), wanted)
    row = torch.randn(1, 22, device=place)
    assert_same(rtn_quantize(row.expand(4, 22), bits=3), rtn_quantize(row.repeat(4, 1), bits=3))


def test_threads_and_tiers_give_the_same_bits(each_tier):
    weight = LAYERS["correlated"](67, 130).weight
    options = {"bits": 3, "group_size": 32, "shrink": [1.0, 0.9, 0.8]}
    with threads(1):
        wanted = rtn_quantize(weight, **options)
    for count in (2, 8):
        with threads(count):
            assert_same(rtn_quantize(weight, **options), wanted)
    with tier("scalar"):
        assert_same(rtn_quantize(weight, **options), wanted)


def test_opcheck(place):
    weight = torch.randn(6, 20, device=place)
    for options in ({}, {"group_size": 8, "grid": "midrise"}, {"shrink": [1.0, 0.8]}):
        check_op(OP, (weight,), {"bits": 3, **options})
    for shape in ((0, 5), (3, 0), (0, 0)):
        for group_size in (0, 4):
            check_op(OP, (torch.empty(shape, device=place),), {"bits": 3, "group_size": group_size})


def script_rtn(weight: torch.Tensor):
    return torch.ops.torchquant.rtn_quantize(weight, bits=3, group_size=8, grid="symmetric", shrink=[1.0, 0.9])


def test_torchscript_gives_the_same(place):
    weight = torch.randn(5, 30, device=place)
    assert_same(scripted(script_rtn)(weight), script_rtn(weight))


def test_weights_that_require_grad(place):
    weight = torch.randn(5, 30, device=place, requires_grad=True)
    assert_same([t.detach() for t in rtn_quantize(weight, bits=3)], rtn_quantize(weight.detach(), bits=3))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 20), st.integers(0, 40)),
    dtype=st.sampled_from(FLOAT_TYPES),
    bits=st.integers(2, 8),
    group_size=st.integers(0, 45),
    grid=st.sampled_from(GRIDS),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "strided"]),
    exponent=st.integers(-12, 12),
    shrink=st.lists(st.sampled_from([1.0, 0.9, 0.5]), min_size=1, max_size=3),
)
def test_any_weight(shape, dtype, bits, group_size, grid, layout, exponent, shrink):
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 2.0**exponent).to(dtype)
    view = weight if layout == "contiguous" else layouts(weight)[layout]
    options = {"bits": bits, "group_size": group_size, "grid": grid, "shrink": shrink}
    codes, scale, zero_point = rtn_quantize(view, **options)
    assert_same((codes, scale, zero_point), rtn_quantize(weight, **options))
    groups = 1 if group_size == 0 else -(-shape[1] // group_size)
    assert codes.shape == shape and scale.shape == zero_point.shape == (shape[0], groups)
    assert (codes.long() < 2**bits).all() and (scale > 0).all() and scale.isfinite().all()
    if grid == "asymmetric":
        assert torch.equal(zero_point, zero_point.round())
    elif weight.numel():
        assert (zero_point == (2 ** (bits - 1) if grid == "symmetric" else zero_point)).all()
