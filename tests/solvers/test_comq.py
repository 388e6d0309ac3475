"""comq_quantize decision by decision against the float64 references, then what the paper promises."""

import itertools

import pytest
import torch
from helpers import LAYERS, assert_same, layouts, threads, tier
from solvers import reference
from torch import Tensor

from torchquant.solvers import comq_quantize, dequantize, rtn_quantize

ORDERS = ("shared", "greedy", "semi", "cyclic")
DEFAULT_SHRINK = [1.0, 0.9, 0.8, 0.65, 0.5]
# Layers whose gradient float32 resolves to a small part of a step: whole rows of codes equal the float64 reference's.
PLAIN = ("correlated", "rank_deficient", "dead", "bfloat16", "half", "one_row", "one_column", "constant")


def quantize(layer, place, **options) -> tuple[Tensor, ...]:
    return comq_quantize(layer.weight.to(place), layer.gram.to(place), **options)


def problem_of(layer, **options) -> reference.Problem:
    known = {k: options[k] for k in ("bits", "group_size", "grid", "linear") if k in options}
    return reference.Problem(layer.weight, layer.gram, **known)


def assert_sweep(problem, order, before: Tensor, scale: Tensor, zero_point: Tensor, codes: Tensor):
    """Follows one sweep of the operator in float64: each code must be the nearest, given the codes before it."""
    visited = reference.visiting_order(problem, order)
    step = reference.comq_sweep(problem, before, scale, zero_point, visited, forced=codes)
    live = ~problem.dead
    band = reference.tie_band(problem, scale)
    reference.assert_nearest(codes.cpu()[:, live], step.x[:, live], band[:, live])
    return step


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_decision_of_the_first_sweep(place, order, bits):
    for name, make in LAYERS.items():
        layer = make(13, 48)
        for options in ({"grid": "asymmetric"}, {"grid": "midrise", "group_size": 20}, {"grid": "symmetric"}):
            options = {"bits": bits, **options}
            got = quantize(layer, place, sweeps=1, order=order, update_scale=False, shrink=[0.9], **options)
            problem = problem_of(layer, **options)
            grid, zero = reference.grid_of(layer.weight, bits, problem.group_size, problem.grid)
            torch.testing.assert_close(got[1].double().cpu(), 0.9 * grid, rtol=1e-6, atol=0)
            assert (got[2].double().cpu() == zero).double().mean() > 0.99
            assert_sweep(problem, order, problem.weight, got[1], got[2], got[0])
            assert got[3].tolist() == [0, int(problem.dead.sum()), 0], name


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group_size", [0, 20])
@pytest.mark.parametrize("update_scale", [True, False])
def test_every_decision_of_later_sweeps(place, order, group_size, update_scale):
    """Sweep s + 1 starts from what s sweeps returned; each step lowers the objective or leaves it."""
    for name in ("correlated", "rank_deficient", "dead", "massive"):
        layer = LAYERS[name](13, 48)
        options = {"bits": 3, "group_size": group_size, "order": order, "update_scale": update_scale, "shrink": [0.9]}
        problem = problem_of(layer, bits=3, group_size=group_size)
        before = quantize(layer, place, sweeps=1, **options)
        for sweeps in (2, 3):
            after = quantize(layer, place, sweeps=sweeps, **options)
            values = torch.where(problem.dead, problem.weight, problem.values(*before[:3]))
            step = assert_sweep(problem, order, values, before[1], before[2], after[0])
            assert step.gain.min() >= -1e-3 * problem.objective(values).max(), "a step raised the objective"
            if update_scale:
                wanted = reference.scale_step(problem, step.codes, before[1], before[2])
                # A step can shrink a scale by orders of magnitude: float32 errors are relative to where it started.
                size = torch.maximum(wanted, before[1].double().cpu())
                off = (after[1].double().cpu() - wanted).abs() / size
                assert off.max() < (2e-3 if name == "massive" else 2e-4)
            before = after


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group_size", [0, 20])
def test_codes_equal_the_gram_reference(place, order, group_size):
    equal = []
    for name in PLAIN:
        layer = LAYERS[name](32, 40)
        got = quantize(layer, place, bits=3, sweeps=2, order=order, group_size=group_size, shrink=[1.0])
        problem = problem_of(layer, bits=3, group_size=group_size)
        codes, scale, _ = reference.comq(problem, sweeps=2, order=order)
        same = (got[0].double().cpu() == codes).all(1)
        torch.testing.assert_close(got[1].double().cpu()[same], scale[same], rtol=1e-4, atol=0)
        equal.append(same)
    assert torch.cat(equal).double().mean() > 0.97


@pytest.mark.parametrize("order", ORDERS)
def test_codes_equal_the_published_data_space_algorithm(place, order):
    for sweeps in (1, 2):
        layer = LAYERS["correlated"](32, 40)
        got = quantize(layer, place, bits=3, sweeps=sweeps, order=order, update_scale=False, shrink=[1.0])
        problem = problem_of(layer, bits=3)
        published, *_ = reference.comq_in_data_space(problem, layer.x, sweeps=sweeps, order=order)
        assert reference.equal_rows(got[0], published) > 0.96
        in_gram_space, *_ = reference.comq(problem, sweeps=sweeps, order=order, update_scale=False)
        assert reference.equal_rows(published, in_gram_space) > 0.96  # the two references, which share no code


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("columns", [130, 200])
def test_several_blocks(place, order, columns):
    layer = LAYERS["correlated"](9, columns)
    problem = problem_of(layer, bits=4)
    options = {"bits": 4, "order": order, "update_scale": False, "shrink": [1.0]}
    first, second = (quantize(layer, place, sweeps=sweeps, **options) for sweeps in (1, 2))
    assert_sweep(problem, order, problem.weight, *first[1:3], first[0])
    assert_sweep(problem, order, problem.values(*first[:3]), *first[1:3], second[0])


def test_wide_layers(place):
    layer = LAYERS["correlated"](5, 1600, tokens=600)
    problem = problem_of(layer, bits=3)
    got = quantize(layer, place, bits=3, sweeps=1, update_scale=False, shrink=[1.0])
    assert_sweep(problem, "shared", problem.weight, got[1], got[2], got[0])


@pytest.mark.parametrize("group_size", [0, 20])
@pytest.mark.parametrize("linear", [False, True])
def test_search_keeps_the_factor_with_the_lowest_objective(place, group_size, linear):
    layer = LAYERS["correlated"](40, 48)
    gram, options = layer.gram, {"bits": 2, "group_size": group_size, "sweeps": 2}
    target = (layer.weight + 0.1 * layer.weight.roll(1, 0)) @ gram if linear else None
    if linear:
        options["linear"] = target.to(place)
    problem = problem_of(layer, **options)
    found = quantize(layer, place, **options)
    assert_same(found, quantize(layer, place, shrink=DEFAULT_SHRINK, **options))
    single = [quantize(layer, place, shrink=[f], **options) for f in DEFAULT_SHRINK]
    errors = torch.stack([problem.objective(problem.values(*q[:3])) for q in single])
    got = problem.objective(problem.values(*found[:3]))
    size = errors.abs().amax(0) if linear else got
    assert ((got - errors.amin(0)).abs() <= 1e-3 * size + 1e-9).all()
    assert errors.argmin(0).unique().numel() > 1, "rows differ in the factor they want"
    wanted = reference.comq_search(problem, DEFAULT_SHRINK, sweeps=2)
    assert reference.equal_rows(found[0], wanted[0]) > 0.9


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group_size", [0, 16])
def test_the_objective_never_rises_from_the_second_sweep_on(place, order, group_size):
    for name in ("correlated", "rank_deficient", "massive"):
        layer = LAYERS[name](24, 48)
        problem = problem_of(layer, bits=2, group_size=group_size)
        errors = []
        for sweeps in range(1, 7):
            got = quantize(layer, place, bits=2, group_size=group_size, order=order, sweeps=sweeps, shrink=[0.8])
            errors.append(problem.objective(problem.values(*got[:3])))
        for before, after in itertools.pairwise(errors):
            assert (after <= before * (1 + 1e-4) + 1e-7 * errors[0].max()).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("update_scale", [True, False])
@pytest.mark.parametrize("group_size", [0, 16])
def test_a_converged_result_is_a_fixed_point(place, order, update_scale, group_size):
    layer = LAYERS["correlated"](24, 32)
    options = {"bits": 3, "order": order, "update_scale": update_scale, "group_size": group_size}
    done = quantize(layer, place, sweeps=100, shrink=[0.9], **options)
    again = quantize(layer, place, sweeps=1, codes=done[0], scale=done[1], zero_point=done[2], **options)
    assert torch.equal(again[0], done[0])
    torch.testing.assert_close(again[1], done[1], rtol=1e-4, atol=0)
    problem = problem_of(layer, bits=3, group_size=group_size)
    values, delta = problem.values(*done[:3]), problem.expand(done[1])
    g, diagonal = problem.linear - values @ problem.gram, problem.gram.diagonal()
    for move in (1, -1):  # no single code that may still move lowers the objective
        legal = (done[0].double().cpu() + move >= 0) & (done[0].double().cpu() + move <= 7)
        rise = (move * delta).square() * diagonal - 2 * move * delta * g
        assert rise[legal].min() > -1e-3 * (delta.square() * diagonal).min()


def test_starting_from_its_own_codes_continues(place):
    layer = LAYERS["correlated"](24, 48)
    for options in ({}, {"group_size": 16}, {"order": "greedy"}, {"grid": "midrise"}):
        first = quantize(layer, place, bits=3, sweeps=1, shrink=[0.9], **options)
        going_on = quantize(
            layer, place, bits=3, sweeps=2, codes=first[0], scale=first[1], zero_point=first[2], **options
        )
        at_once = quantize(layer, place, bits=3, sweeps=3, shrink=[0.9], **options)
        assert reference.equal_rows(going_on[0], at_once[0]) > 0.9
        assert torch.equal(going_on[2], first[2])


def test_a_diagonal_gram_means_rounding(place):
    layer = LAYERS["correlated"](12, 30)
    gram = torch.diag(torch.rand(30, generator=torch.Generator().manual_seed(0)) + 0.1).to(place)
    for order in ORDERS:
        got = comq_quantize(layer.weight.to(place), gram, bits=3, order=order, update_scale=False, shrink=[1.0])
        wanted = rtn_quantize(layer.weight.to(place), bits=3)
        assert (got[0] == wanted[0]).double().mean() > 0.995  # ties may fall either way after the first sweep
        assert_same(got[1:3], wanted[1:])


@pytest.mark.parametrize("grid", ["asymmetric", "midrise"])
def test_weights_on_the_grid_come_back(place, grid):
    layer = LAYERS["correlated"](12, 30)
    codes = torch.randint(8, (12, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes[:, 0], codes[:, 1] = 0, 7
    scale = 2.0 ** torch.arange(-6, 6)[:, None]
    zero_point = torch.full_like(scale, 3.0 if grid == "asymmetric" else 3.5)
    weight = dequantize(codes, scale, zero_point).to(place)
    for order in ORDERS:
        for shrink in ([1.0], None):
            got = comq_quantize(weight, layer.gram.to(place), bits=3, grid=grid, order=order, shrink=shrink)
            assert torch.equal(got[0].cpu(), codes)
            torch.testing.assert_close(dequantize(*got[:3]), weight, rtol=1e-6, atol=0)


def test_the_scale_is_stationary(place):
    layer = LAYERS["correlated"](16, 40)
    problem = problem_of(layer, bits=3)
    got = quantize(layer, place, bits=3, sweeps=2, shrink=[0.9])
    values = problem.values(*got[:3])
    slope = (values * (problem.linear - values @ problem.gram)).sum(1)  # <q, P - Q H>
    size = (values.abs() * (problem.linear.abs() + (values @ problem.gram).abs())).sum(1)
    assert (slope.abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("order", ORDERS)
def test_units_do_not_matter(place, order):
    layer = LAYERS["correlated"](16, 40)
    got = quantize(layer, place, bits=3, order=order)
    for factor in (2.0**-9, 8.0):
        scaled = comq_quantize(layer.weight.to(place) * factor, layer.gram.to(place), bits=3, order=order)
        assert_same((scaled[0], scaled[1], scaled[2]), (got[0], got[1] * factor, got[2]))
        assert_same(comq_quantize(layer.weight.to(place), layer.gram.to(place) * factor, bits=3, order=order), got)
    assert reference.equal_rows(quantize(layer, place, bits=3, order=order)[0], got[0]) == 1
    thirds = comq_quantize(layer.weight.to(place), layer.gram.to(place) * 0.3, bits=3, order=order)
    assert reference.equal_rows(thirds[0], got[0]) > 0.9


@pytest.mark.parametrize("order", ["shared", "greedy", "semi"])
def test_a_permutation_of_the_columns_commutes(place, order):
    layer = LAYERS["correlated"](32, 40)
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    weight, gram = layer.weight[:, shuffled], layer.gram[shuffled][:, shuffled]
    got = comq_quantize(weight.to(place), gram.to(place), bits=3, order=order, shrink=[0.9])
    wanted = quantize(layer, place, bits=3, order=order, shrink=[0.9])
    assert reference.equal_rows(got[0], wanted[0][:, shuffled.to(place)]) > 0.96


def test_against_every_possible_code(place):
    """Never below the optimum over all 4^5 codes, and most rows reach it."""
    layer = LAYERS["correlated"](200, 5)
    got = quantize(layer, place, bits=2, sweeps=3, order="cyclic", update_scale=False, shrink=[1.0])
    problem = problem_of(layer, bits=2)
    every = torch.cartesian_prod(*[torch.arange(4.0)] * 5).double()
    levels = (every[None] - got[2].double().cpu()[:, None]) * got[1].double().cpu()[:, None]  # [N, 1024, K]
    error = layer.weight.double()[:, None] - levels
    optimum = torch.einsum("nck,kl,ncl->nc", error, problem.gram, error).amin(1)
    reached = problem.objective(problem.values(*got[:3]))
    assert (reached >= optimum * (1 - 1e-6)).all()
    assert (reached <= optimum * (1 + 1e-6)).double().mean() > 0.5


def test_the_linear_term(place):
    layer = LAYERS["correlated"](24, 40)
    weight, gram = layer.weight.to(place), layer.gram.to(place)
    plain = comq_quantize(weight, gram, bits=3)
    same_target = comq_quantize(
        weight, gram, bits=3, linear=(layer.weight.double() @ layer.gram.double()).float().to(place)
    )
    assert reference.equal_rows(same_target[0], plain[0]) > 0.9
    # Inputs that the layers before have changed: the target is the old output, the Gram that of the new inputs.
    changed = (
        layer.x + 0.05 * layer.x.std() * torch.randn(layer.x.shape, generator=torch.Generator().manual_seed(1)).double()
    )
    target, new_gram = layer.weight.double() @ (layer.x.T @ changed), changed.T @ changed
    options = {"bits": 3, "sweeps": 1, "update_scale": False, "shrink": [1.0]}
    got = comq_quantize(weight, new_gram.to(place), linear=target.float().to(place), **options)
    problem = reference.Problem(layer.weight, new_gram, 3, linear=target)
    assert_sweep(problem, "shared", problem.weight, got[1], got[2], got[0])
    corrected = comq_quantize(weight, new_gram.float().to(place), bits=3, linear=target.float().to(place))
    ignored = comq_quantize(weight, new_gram.float().to(place), bits=3)
    error, other = (
        ((layer.x @ layer.weight.double().T - changed @ reference.dequantize(*q[:3]).T) ** 2).sum()
        for q in (corrected, ignored)
    )
    assert error < other


@pytest.mark.parametrize("group_size", [0, 3])
def test_depthwise_is_one_problem_per_channel(place, group_size):
    layers = [LAYERS["correlated"](2, 9, seed=seed) for seed in range(5)]
    weight, grams = torch.cat([x.weight for x in layers]).to(place), torch.stack([x.gram for x in layers]).to(place)
    for order in ORDERS:
        options = {"bits": 3, "order": order, "group_size": group_size}
        together = comq_quantize(weight, grams, **options)
        apart = [comq_quantize(weight[2 * b : 2 * b + 2], grams[b], **options) for b in range(5)]
        assert reference.equal_rows(together[0], torch.cat([q[0] for q in apart])) >= 0.9
        torch.testing.assert_close(together[1], torch.cat([q[1] for q in apart]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("init", ["rtn", "gptq"])
@pytest.mark.parametrize("group_size", [0, 16])
def test_a_start_is_never_made_worse(place, init, group_size):
    for name in ("correlated", "rank_deficient", "dead"):
        layer = LAYERS[name](24, 48)
        problem = problem_of(layer, bits=2, group_size=group_size)
        options = {"bits": 2, "group_size": group_size, "shrink": [0.8]}
        start = rtn_quantize(layer.weight.to(place), **options)
        got = quantize(layer, place, init=init, **options)
        before, after = (problem.objective(problem.values(*q[:3])) for q in (start, got))
        assert (after <= before * (1 + 1e-5)).all() if init == "rtn" else after.sum() < before.sum()


def test_threads_tiers_and_layouts_give_the_same_bits(each_tier):
    for rows, columns, group_size in ((200, 70, 0), (33, 150, 32)):
        layer = LAYERS["correlated"](rows, columns)
        for order in ORDERS:
            options = {"bits": 3, "group_size": group_size, "order": order}
            with tier("scalar"), threads(1):
                wanted = comq_quantize(layer.weight, layer.gram, **options)
            for count in (1, 2, 8):
                with threads(count):
                    assert_same(comq_quantize(layer.weight, layer.gram, **options), wanted)
            for view, gram in zip(layouts(layer.weight).values(), layouts(layer.gram).values(), strict=True):
                assert_same(comq_quantize(view, gram, **options), wanted)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_far_better_than_rounding(place, bits):
    layer = LAYERS["correlated"](48, 96)
    problem = problem_of(layer, bits=bits)
    rounded = problem.objective(problem.values(*rtn_quantize(layer.weight, bits=bits))).sum()
    assert problem.objective(problem.values(*quantize(layer, place, bits=bits)[:3])).sum() < 0.5 * rounded
