"""gptq_quantize decision by decision against the textbook column loop, then what it promises."""

import pytest
import torch
from helpers import GRIDS, LAYERS, assert_same, check_op, layouts, scripted, threads, tier
from hypothesis import given, settings
from hypothesis import strategies as st
from solvers import reference
from solvers.any_layer import ANY_LAYER, check_any_layer
from torch import Tensor

from torchquant.solvers import gptq_quantize, rtn_quantize

OP = torch.ops.torchquant.gptq_quantize.default
ORDERS = ("natural", "activation")
DEFAULT_SHRINK = [1.0, 0.9, 0.8, 0.65, 0.5]


def quantize(layer, place, **options) -> tuple[Tensor, ...]:
    return gptq_quantize(layer.weight.to(place), layer.gram.to(place), **options)


def assert_decisions(
    layer, got, band: float = 3e-4, allowed: float = 0.03, damp: float = 0.01, order: str = "natural", **options
):
    """Given the operator's earlier codes, each code must be the nearest to its compensated weight."""
    problem = reference.Problem(layer.weight, layer.gram, **options)
    _, x = reference.gptq(problem, got[1], got[2], damp=damp, order=order, forced=got[0])
    reference.assert_nearest(got[0], x, band, allowed)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [0, 20])
def test_every_decision(place, order, bits, group_size):
    for name, make in LAYERS.items():
        for grid in GRIDS:
            layer = make(13, 48)
            options = {"bits": bits, "group_size": group_size, "grid": grid}
            got = quantize(layer, place, order=order, shrink=[0.9], **options)
            scale, zero = reference.grid_of(layer.weight, bits, group_size, grid)
            torch.testing.assert_close(got[1].double().cpu(), 0.9 * scale, rtol=1e-6, atol=0)
            assert (got[2].double().cpu() == zero).double().mean() > 0.99
            allowed = 0.03 + (
                got[1].shape[1] / layer.weight.shape[1] if grid == "symmetric" or name == "constant" else 0
            )
            assert_decisions(layer, got, allowed=allowed, order=order, **options)
            assert got[3].tolist() == [0, int((layer.gram.diagonal() == 0).sum()), 0], name


@pytest.mark.parametrize("damp", [0.001, 0.1, 1.0])
def test_every_decision_for_other_dampings(place, damp):
    layer = LAYERS["correlated"](13, 48)
    got = quantize(layer, place, bits=3, damp=damp, shrink=[1.0])
    assert got[3].tolist() == [0, 0, 0]
    assert_decisions(layer, got, damp=damp, bits=3)


@pytest.mark.parametrize("columns", [128, 129, 300])
def test_several_blocks(place, columns):
    layer = LAYERS["correlated"](9, columns)
    assert_decisions(layer, quantize(layer, place, bits=4, shrink=[1.0]), bits=4)


def test_codes_equal_the_textbook(place):
    equal = []
    for name in ("correlated", "rank_deficient", "bfloat16", "half"):
        for order in ORDERS:
            layer = LAYERS[name](32, 40)
            got = quantize(layer, place, bits=3, order=order, shrink=[1.0])
            wanted, _ = reference.gptq(reference.Problem(layer.weight, layer.gram, 3), got[1], got[2], order=order)
            equal.append((got[0].double().cpu() == wanted).all(1))
    assert torch.cat(equal).double().mean() > 0.97


def test_the_block_size_is_only_for_speed(place):
    layer = LAYERS["correlated"](32, 100)
    wanted = quantize(layer, place, bits=3)
    for block_size in (1, 7, 64, 1000):
        assert reference.equal_rows(quantize(layer, place, bits=3, block_size=block_size)[0], wanted[0]) > 0.9


@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("name", ["correlated", "rank_deficient", "massive"])
def test_search_keeps_the_factor_with_the_lowest_objective(place, group_size, name):
    layer, options = LAYERS[name](40, 48), {"bits": 2, "group_size": group_size}
    problem = reference.Problem(layer.weight, layer.gram, **options)
    found = quantize(layer, place, **options)
    assert_same(found, quantize(layer, place, shrink=DEFAULT_SHRINK, **options))
    single = [quantize(layer, place, shrink=[f], **options) for f in DEFAULT_SHRINK]
    errors = torch.stack([problem.objective(problem.values(*q[:3])) for q in single])
    got = problem.objective(problem.values(*found[:3]))
    assert (got <= errors.amin(0) * (1 + 1e-3)).all()
    assert errors.argmin(0).unique().numel() > 1, "rows differ in the factor they want"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_far_better_than_rounding(place, bits):
    layer = LAYERS["correlated"](48, 96)
    problem = reference.Problem(layer.weight, layer.gram, bits)
    rounded = problem.objective(problem.values(*rtn_quantize(layer.weight, bits=bits))).sum()
    assert problem.objective(problem.values(*quantize(layer, place, bits=bits)[:3])).sum() < 0.6 * rounded


def test_a_diagonal_gram_means_rounding(place):
    layer = LAYERS["correlated"](12, 30)
    gram = torch.diag(torch.rand(30, generator=torch.Generator().manual_seed(0)) + 0.1).to(place)
    got = gptq_quantize(layer.weight.to(place), gram, bits=3, shrink=[1.0])
    assert_same(got[:3], rtn_quantize(layer.weight.to(place), bits=3))


def test_weights_on_the_grid_come_back(place):
    layer = LAYERS["correlated"](12, 30)
    codes = torch.randint(16, (12, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes[:, 0], codes[:, 1] = 0, 15
    weight = (codes.float() - 7) * 2.0 ** torch.arange(-6, 6)[:, None]
    got = gptq_quantize(weight.to(place), layer.gram.to(place), bits=4)
    assert torch.equal(got[0].cpu(), codes)
    torch.testing.assert_close(reference.dequantize(*got[:3]), weight.double(), rtol=1e-6, atol=0)


def test_units_do_not_matter(place):
    layer = LAYERS["correlated"](16, 40)
    got = quantize(layer, place, bits=3)
    for factor in (2.0**-9, 8.0):
        scaled = gptq_quantize(layer.weight.to(place) * factor, layer.gram.to(place), bits=3)
        assert_same(scaled[:3], (got[0], got[1] * factor, got[2]))
        assert_same(gptq_quantize(layer.weight.to(place), layer.gram.to(place) * factor, bits=3), got)


def test_activation_order_is_natural_order_of_sorted_columns(place):
    layer = LAYERS["correlated"](32, 40)
    ranked = torch.argsort(layer.gram.diagonal(), descending=True)
    got = quantize(layer, place, bits=3, order="activation")
    wanted = gptq_quantize(layer.weight[:, ranked].to(place), layer.gram[ranked][:, ranked].to(place), bits=3)
    assert reference.equal_rows(got[0][:, ranked.to(place)], wanted[0]) > 0.96


def test_damping_is_raised_and_declared(place):
    """A Gram of rank one is not positive definite in float32 without damping."""
    layer = LAYERS["correlated"](12, 64, tokens=1)
    codes, *_, info = quantize(layer, place, bits=3, damp=0.0)
    status, dead, raised = info.tolist()
    assert (status, dead) == (1, 0) and 1 <= raised <= 3
    assert (codes <= 7).all()


def test_a_gram_that_is_no_gram_falls_back_to_rounding(place):
    weight = LAYERS["correlated"](6, 8).weight.to(place)
    gram = torch.eye(8, device=place)
    gram[0, 1] = gram[1, 0] = 1e4
    *got, info = gptq_quantize(weight, gram, bits=3, shrink=[1.0])
    assert info.tolist() == [2, 0, 3]
    assert_same(got, rtn_quantize(weight, bits=3))


@pytest.mark.parametrize("group_size", [0, 3])
def test_depthwise_is_one_problem_per_channel(place, group_size):
    layers = [LAYERS["correlated"](2, 9, seed=seed) for seed in range(5)]
    weight, grams = torch.cat([x.weight for x in layers]).to(place), torch.stack([x.gram for x in layers]).to(place)
    for order in ORDERS:
        options = {"bits": 3, "order": order, "group_size": group_size}
        together = gptq_quantize(weight, grams, **options)
        apart = [gptq_quantize(weight[2 * b : 2 * b + 2], grams[b], **options) for b in range(5)]
        assert_same(together[:3], [torch.cat(parts) for parts in zip(*(q[:3] for q in apart), strict=True)])


def test_one_bad_gram_among_good_ones(place):
    layers = [LAYERS["correlated"](2, 8, seed=seed) for seed in range(3)]
    weight, grams = torch.cat([x.weight for x in layers]).to(place), torch.stack([x.gram for x in layers]).to(place)
    grams[1, 0, 1] = grams[1, 1, 0] = 1e6
    *got, info = gptq_quantize(weight, grams, bits=3, shrink=[1.0])
    assert info.tolist()[0] == 2
    for b in (0, 2):
        rows = slice(2 * b, 2 * b + 2)
        assert_same([t[rows] for t in got], gptq_quantize(weight[rows], grams[b], bits=3, shrink=[1.0])[:3])


def test_threads_tiers_and_layouts_give_the_same_bits(each_tier):
    for rows, columns, group_size in ((200, 70, 0), (33, 150, 32)):
        layer = LAYERS["correlated"](rows, columns)
        for order in ORDERS:
            options = {"bits": 3, "group_size": group_size, "order": order}
            with tier("scalar"), threads(1):
                wanted = gptq_quantize(layer.weight, layer.gram, **options)
            for count in (1, 2, 8):
                with threads(count):
                    assert_same(gptq_quantize(layer.weight, layer.gram, **options), wanted)
            for view, gram in zip(layouts(layer.weight).values(), layouts(layer.gram).values(), strict=True):
                assert_same(gptq_quantize(view, gram, **options), wanted)


def test_opcheck(place):
    layer = LAYERS["correlated"](6, 20)
    weight, gram = layer.weight.to(place), layer.gram.to(place)
    for options in (
        {},
        {"group_size": 8, "order": "activation", "grid": "midrise"},
        {"shrink": [1.0], "block_size": 4},
    ):
        check_op(OP, (weight, gram), {"bits": 3, **options})
    check_op(OP, (weight, gram.expand(2, 20, 20)), {"bits": 3})
    for rows, columns in ((0, 5), (3, 0), (0, 0)):
        check_op(
            OP, (torch.empty(rows, columns, device=place), torch.zeros(columns, columns, device=place)), {"bits": 3}
        )


def script_gptq(weight: Tensor, gram: Tensor):
    return torch.ops.torchquant.gptq_quantize(weight, gram, bits=3, group_size=8, damp=0.05, order="activation")


def test_torchscript_gives_the_same(place):
    layer = LAYERS["correlated"](6, 20)
    weight, gram = layer.weight.to(place), layer.gram.to(place)
    assert_same(scripted(script_gptq)(weight, gram), script_gptq(weight, gram))
    tracked = script_gptq(weight.clone().requires_grad_(), gram)
    assert_same([t.detach() for t in tracked], script_gptq(weight, gram))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"damp": -0.1}, "damp must not be negative, got -0.1"),
        ({"damp": float("nan")}, "damp must not be negative, got nan"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"order": "random"}, "order must be natural or activation, got 'random'"),
    ],
)
def test_errors_name_the_argument(place, options, text):
    with pytest.raises(ValueError, match=f"gptq_quantize: {text}"):
        gptq_quantize(torch.ones(4, 8, device=place), torch.eye(8, device=place), bits=3, **options)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    **ANY_LAYER,
    options=st.fixed_dictionaries(
        {
            "bits": st.integers(2, 8),
            "group_size": st.integers(0, 45),
            "grid": st.sampled_from(GRIDS),
            "order": st.sampled_from(ORDERS),
            "damp": st.sampled_from([0.0, 1e-4, 0.01, 1.0]),
            "block_size": st.integers(1, 150),
            "shrink": st.sampled_from([None, [1.0], [0.9, 0.7]]),
        }
    ),
)
def test_any_layer(options, **layer):
    check_any_layer(gptq_quantize, 3, options=options, **layer)
