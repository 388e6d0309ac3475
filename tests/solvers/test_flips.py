"""flips_quantize decision by decision against halving with an inverse per half, then what it promises."""

import itertools

import pytest
import torch
from helpers import GRIDS, LAYERS, assert_same, check_op, layouts, scripted, threads, tier
from hypothesis import given, settings
from hypothesis import strategies as st
from solvers import reference
from solvers.any_layer import ANY_LAYER, check_any_layer
from torch import Tensor

from torchquant.solvers import flips_quantize, flips_quantize_with_bias, gptq_quantize, rtn_quantize

OP = torch.ops.torchquant.flips_quantize.default
ORDERS = ("natural", "activation", "error")
REFINEMENTS = ("best", "gradient", "none")
MARGIN = 2e-4  # of M_ii D^2: flips that gain less are left alone


def quantize(layer, place, **options) -> tuple[Tensor, ...]:
    return flips_quantize(layer.weight.to(place), layer.gram.to(place), **options)


class Half:
    """One half as the given codes leave it: weights that answer for the earlier halves' errors, codes, gradient."""

    def __init__(
        self, problem: reference.Problem, columns: Tensor, weight: Tensor, grids: tuple[Tensor, Tensor]
    ) -> None:
        self.columns, self.weight = columns, weight[:, columns]
        self.scale, self.zero = (problem.expand(t)[:, columns] for t in grids)
        self.x = reference.position(self.weight, self.scale, self.zero, problem.top)
        self.gram, self.top = problem.gram[columns][:, columns], problem.top

    def gains(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """What flipping each code would add to the objective (infinite where there is no other side), and M_ii D^2."""
        error = (codes - self.zero) * self.scale - self.weight
        other = codes - error.sign()
        step = torch.where((other >= 0) & (other <= self.top), (other - codes) * self.scale, 0)
        curvature = self.gram.diagonal() * step.square()
        gains = 2 * (error @ self.gram) * step + curvature
        return torch.where(step == 0, torch.inf, gains), curvature

    def objective(self, codes: Tensor) -> Tensor:
        error = (codes - self.zero) * self.scale - self.weight
        return ((error @ self.gram) * error).sum(1)

    def refine(self, rule: str, steps: int = 100) -> Tensor:
        """The published loop, one row after another."""
        codes = torch.round(self.x)
        for row in range(len(codes)):
            for _ in range(steps):
                gains, _ = self.gains(codes)
                gradient = ((codes - self.zero) * self.scale - self.weight) @ self.gram
                error = (codes - self.zero) * self.scale - self.weight
                usable = (error * gradient > 0)[row] & gains[row].isfinite()
                score = gains[row] if rule == "best" else torch.where(usable, -gradient[row].abs(), torch.inf)
                column = score.argmin()
                if not score[column] < torch.inf or not gains[row, column] < 0:
                    break
                codes[row, column] -= error[row, column].sign()
        return codes


def halves(layer, codes: Tensor | None, grids: tuple[Tensor, Tensor], *, ridge: float, order: str = "natural",
           refine: str = "none", **options):  # fmt: skip
    """Walks through the halves in float64, following given codes or its own."""
    problem = reference.Problem(layer.weight, layer.gram, **options)
    damped = problem.gram + ridge * problem.gram.diagonal().mean() * torch.eye(len(problem.gram), dtype=torch.float64)
    weight, own = problem.weight.clone(), torch.zeros_like(problem.weight)
    rest = torch.arange(len(damped))
    if order == "activation":
        rest = torch.argsort(problem.gram.diagonal(), descending=True, stable=True)
    if order == "error":
        nearest = torch.round(reference.position(problem.weight, *(problem.expand(t) for t in grids), problem.top))
        rest = (problem.values(nearest, *grids) - problem.weight).square().sum(0).argsort(stable=True)
    while len(rest):
        now, rest = rest[: max(1, len(rest) // 2)], rest[max(1, len(rest) // 2) :]
        half = Half(problem, now, weight, grids)
        wanted = torch.round(half.x) if refine == "none" else half.refine(refine)
        own[:, now] = wanted if codes is None else codes.double().cpu()[:, now]
        change = (own[:, now] - half.zero) * half.scale - half.weight
        weight[:, rest] -= change @ damped[now][:, rest] @ torch.linalg.inv(damped[rest][:, rest])
        yield half, own[:, now]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group_size", [0, 20])
def test_without_flips_every_code_is_the_nearest(place, order, bits, group_size):
    for name, make in LAYERS.items():
        for grid in GRIDS:
            layer, options = make(13, 48), {"bits": bits, "group_size": group_size, "grid": grid}
            if order == "error" and name in ("constant", "one_row"):
                continue  # errors tie or come from one row: another rounding, another order
            got = quantize(layer, place, order=order, shrink=[1.0], refine="none", **options)
            for half, codes in halves(layer, got[0], (got[1], got[2]), ridge=0.01, order=order, **options):
                loose = 0.1 if grid == "symmetric" or name in ("constant", "one_column", "one_row") else 0.03
                reference.assert_nearest(codes, half.x, 1e-3, allowed=loose + 1 / codes.numel())
            assert got[3].tolist() == [0, int((layer.gram.diagonal() == 0).sum()), 0, 0], name


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [0, 20])
def test_no_flip_is_left_that_helps(place, bits, group_size):
    for name in ("correlated", "massive", "rank_deficient", "dead", "half"):
        layer, options = LAYERS[name](13, 48), {"bits": bits, "group_size": group_size}
        got = quantize(layer, place, shrink=[0.9], steps=1000, **options)
        flipped = 0
        for half, codes in halves(layer, got[0], (got[1], got[2]), ridge=0.01, **options):
            assert (codes - half.x).abs().max() < 1 + 1e-3, "on one of the two sides of the weight"
            gains, curvature = half.gains(codes)
            noise = 1e-5 * (half.gram.diagonal().max() * half.scale.square())
            assert (gains >= -MARGIN * curvature - noise).all(), name
            assert (half.objective(codes) <= half.objective(torch.round(half.x)) * (1 + 1e-4) + 1e-12).all()
            flipped += int((codes != torch.round(half.x)).sum())
        assert got[3].tolist()[3] >= flipped > 0 or name == "dead"


def test_every_flip_lowers_the_objective(place):
    """In the first half nothing is compensated yet, so stopping after each flip shows them all."""
    layer = LAYERS["correlated"](24, 40)
    for refine in ("best", "gradient"):
        shown: list[tuple[Tensor, Tensor]] = []
        for steps in range(12):
            got = quantize(layer, place, bits=3, shrink=[1.0], refine=refine, steps=steps)
            half, codes = next(halves(layer, got[0], (got[1], got[2]), ridge=0.01, bits=3))
            shown.append((half.objective(codes), codes))
        moved = [(after != before).sum(1) for (_, before), (_, after) in itertools.pairwise(shown)]
        for flips, (before, _), (after, _) in zip(moved, shown, shown[1:], strict=False):
            assert (flips <= 1).all() and (after[flips == 1] < before[flips == 1]).all()
        assert torch.stack(moved).sum() > 12


def test_flips_against_every_combination(place):
    layer = LAYERS["correlated"](30, 20)
    got = quantize(layer, place, bits=3, shrink=[1.0])
    half, codes = next(halves(layer, got[0], (got[1], got[2]), ridge=0.01, bits=3))
    assert codes.shape[1] == 10
    sides = torch.tensor(list(itertools.product((0.0, 1.0), repeat=10)), dtype=torch.float64)
    least = torch.stack([half.objective((half.x.floor() + s).clamp(0, 7)) for s in sides]).amin(0)
    rounded, found = half.objective(torch.round(half.x)), half.objective(codes)
    assert (found >= least * (1 - 1e-6)).all() and (found <= rounded * (1 + 1e-6)).all()
    assert (found - least).sum() < 0.4 * (rounded - least).sum()


@pytest.mark.parametrize("refine", REFINEMENTS)
def test_codes_equal_the_published_loop(place, refine):
    equal = []
    for name in ("correlated", "rank_deficient", "bfloat16"):
        layer = LAYERS[name](16, 24)
        got = quantize(layer, place, bits=3, refine=refine, shrink=[1.0], ridge=0.1)
        steps = halves(layer, None, (got[1], got[2]), ridge=0.1, refine=refine, bits=3)
        wanted = torch.cat([codes for _, codes in steps], 1)
        equal.append((got[0].double().cpu() == wanted).all(1))
    assert torch.cat(equal).double().mean() > 0.9


def test_halves_of_one_column_are_gptq(place):
    layer = LAYERS["correlated"](40, 3)
    for ridge in (0.01, 0.3):
        wanted = gptq_quantize(layer.weight.to(place), layer.gram.to(place), bits=3, shrink=[1.0], damp=ridge)
        got = quantize(layer, place, bits=3, shrink=[1.0], ridge=ridge, refine="none")
        assert reference.equal_rows(got[0], wanted[0]) > 0.97


@pytest.mark.parametrize("order", ["natural", "activation"])
def test_columnwise_is_gptq(place, order):
    layer = LAYERS["dead"](12, 40)
    options = {"bits": 3, "group_size": 16, "grid": "symmetric", "shrink": [1.0, 0.8], "order": order}
    got = quantize(layer, place, solver="columnwise", ridge=0.05, **options)
    wanted = gptq_quantize(layer.weight.to(place), layer.gram.to(place), damp=0.05, **options)
    assert_same(got[:3], wanted[:3])
    assert got[3].tolist() == [*wanted[3].tolist(), 0]


@pytest.mark.parametrize("solver", ["halving", "columnwise"])
def test_the_bias_answers_for_the_weights(place, solver):
    layer = LAYERS["correlated"](14, 41)
    layer.x[:, :-1] += 0.3 * torch.arange(40, dtype=torch.float64).sin()
    layer.x[:, -1] = 1
    gram = layer.gram.double()
    *got, bias = flips_quantize_with_bias(layer.weight.to(place), gram.to(place), bits=2, solver=solver)
    assert got[0].shape == (14, 40) and bias.shape == (14, 1)
    error = reference.dequantize(*got[:3]) - layer.weight[:, :-1].double()
    change = torch.cat([error, bias.double().cpu() - layer.weight[:, -1:].double()], 1)
    assert (change @ gram[:, -1]).abs().max() < 1e-4 * (error.abs() @ gram[:-1, -1].abs()).max()
    alone = flips_quantize(layer.weight[:, :-1].to(place), gram[:-1, :-1].to(place), bits=2, solver=solver)
    error_alone = reference.dequantize(*alone[:3]) - layer.weight[:, :-1].double()
    with_bias = ((change @ gram) * change).sum()
    assert with_bias < 0.98 * ((error_alone @ gram[:-1, :-1]) * error_alone).sum()
    assert not torch.equal(bias.cpu(), layer.weight[:, -1:].float())


def test_with_a_bias_halves_are_those_of_the_centred_inputs(place):
    layer = LAYERS["correlated"](14, 41)
    layer.x[:, -1] = 1
    got = flips_quantize_with_bias(
        layer.weight.to(place), layer.gram.to(place), bits=3, shrink=[1.0], refine="none", ridge=0.02
    )
    weight, centred = layer.weight[:, :-1], layer.x[:, :-1] - layer.x[:, :-1].mean(0)
    plain = type(layer)(weight, centred)
    for half, codes in halves(plain, got[0], (got[1], got[2]), ridge=0.02, bits=3):
        reference.assert_nearest(codes, half.x, 1e-3)


def test_inputs_apart_are_rounded(place):
    layer = LAYERS["correlated"](12, 30)
    gram = torch.diag(torch.rand(30, generator=torch.Generator().manual_seed(0)) + 0.1).to(place)
    for refine in REFINEMENTS:
        got = flips_quantize(layer.weight.to(place), gram, bits=3, shrink=[1.0], refine=refine)
        assert_same(got[:3], rtn_quantize(layer.weight.to(place), bits=3))
        assert got[3].tolist() == [0, 0, 0, 0]


def test_the_result_quantized_again_is_itself(place):
    layer = LAYERS["correlated"](12, 30)
    first = quantize(layer, place, bits=4, shrink=[1.0])
    values = reference.dequantize(*first[:3])
    spans = (first[0].amin(1) == 0) & (first[0].amax(1) == 15)  # the grid fitted to the values is the stored one
    assert spans.sum() >= 4
    again = flips_quantize(values.float().to(place), layer.gram.to(place), bits=4, shrink=[1.0])
    torch.testing.assert_close(reference.dequantize(*again[:3])[spans.cpu()], values[spans.cpu()], rtol=1e-5, atol=1e-7)
    assert torch.equal(again[0][spans], first[0][spans])


def test_each_step_of_the_method_helps(place):
    layer = LAYERS["correlated"](64, 96)
    problem = reference.Problem(layer.weight, layer.gram, 3)

    def error(result: tuple[Tensor, ...]) -> float:
        return float(problem.objective(problem.values(*result[:3])).sum())

    rounded = error(rtn_quantize(layer.weight.to(place), bits=3))
    halved, gradient, best = (
        error(quantize(layer, place, bits=3, shrink=[1.0], refine=r)) for r in reversed(REFINEMENTS)
    )
    searched = error(quantize(layer, place, bits=3))
    assert halved < 0.7 * rounded and gradient < halved and best < halved and searched < best


@pytest.mark.parametrize("group_size", [0, 16])
def test_search_keeps_the_factor_with_the_lowest_objective(place, group_size):
    layer, options = LAYERS["correlated"](40, 48), {"bits": 2, "group_size": group_size}
    problem, factors = reference.Problem(layer.weight, layer.gram, **options), [1.0, 0.9, 0.8, 0.65, 0.5]
    found = quantize(layer, place, **options)
    assert_same(found, quantize(layer, place, shrink=factors, **options))
    single = [quantize(layer, place, shrink=[f], **options) for f in factors]
    errors = torch.stack([problem.objective(problem.values(*q[:3])) for q in single])
    assert (problem.objective(problem.values(*found[:3])) <= errors.amin(0) * (1 + 1e-3)).all()
    assert errors.argmin(0).unique().numel() > 1, "rows differ in the factor they want"


def test_ridge_is_raised_and_declared(place):
    codes, *_, info = quantize(LAYERS["correlated"](12, 64, tokens=1), place, bits=3, ridge=0.0)
    status, dead, raised, _ = info.tolist()
    assert (status, dead) == (1, 0) and 1 <= raised <= 3
    assert (codes <= 7).all()


def test_a_gram_that_is_no_gram_falls_back_to_rounding(place):
    layers = [LAYERS["correlated"](2, 8, seed=seed) for seed in range(3)]
    weight, grams = torch.cat([x.weight for x in layers]).to(place), torch.stack([x.gram for x in layers]).to(place)
    grams[1, 0, 1] = grams[1, 1, 0] = 1e6
    *got, info = flips_quantize(weight, grams, bits=3, shrink=[1.0])
    assert info.tolist()[:3] == [2, 0, 3]
    assert_same([t[2:4] for t in got], rtn_quantize(weight[2:4], bits=3))
    for b in (0, 2):
        rows = slice(2 * b, 2 * b + 2)
        assert_same([t[rows] for t in got], flips_quantize(weight[rows], grams[b], bits=3, shrink=[1.0])[:3])


@pytest.mark.parametrize("group_size", [0, 3])
def test_depthwise_is_one_problem_per_channel(place, group_size):
    layers = [LAYERS["correlated"](2, 9, seed=seed) for seed in range(5)]
    weight, grams = torch.cat([x.weight for x in layers]).to(place), torch.stack([x.gram for x in layers]).to(place)
    for order in ORDERS:
        options = {"bits": 3, "order": order, "group_size": group_size}
        together = flips_quantize(weight, grams, **options)
        apart = [flips_quantize(weight[2 * b : 2 * b + 2], grams[b], **options) for b in range(5)]
        assert_same(together[:3], [torch.cat(parts) for parts in zip(*(q[:3] for q in apart), strict=True)])


def test_threads_tiers_and_layouts_give_the_same_bits(each_tier):
    for rows, columns, group_size in ((200, 70, 0), (33, 150, 32)):
        layer = LAYERS["correlated"](rows, columns)
        for refine, order in zip(REFINEMENTS, ORDERS, strict=True):
            options = {"bits": 3, "group_size": group_size, "order": order, "refine": refine}
            with tier("scalar"), threads(1):
                wanted = flips_quantize(layer.weight, layer.gram, **options)
            for count in (1, 2, 8):
                with threads(count):
                    assert_same(flips_quantize(layer.weight, layer.gram, **options), wanted)
            for view, gram in zip(layouts(layer.weight).values(), layouts(layer.gram).values(), strict=True):
                assert_same(flips_quantize(view, gram, **options), wanted)


def test_opcheck(place):
    layer = LAYERS["correlated"](6, 20)
    weight, gram = layer.weight.to(place), layer.gram.to(place)
    for options in (
        {},
        {"group_size": 8, "order": "activation", "grid": "midrise", "refine": "gradient"},
        {"shrink": [1.0], "solver": "columnwise", "bias_column": True},
    ):
        check_op(OP, (weight, gram), {"bits": 3, **options})
    check_op(OP, (weight, gram.expand(2, 20, 20)), {"bits": 3, "bias_column": True, "order": "error"})
    for rows, columns, bias in ((0, 5, False), (3, 0, False), (0, 0, False), (0, 5, True), (3, 1, True)):
        empty, square = torch.empty(rows, columns, device=place), torch.zeros(columns, columns, device=place)
        check_op(OP, (empty.zero_(), square), {"bits": 3, "bias_column": bias})


def script_flips(weight: Tensor, gram: Tensor):
    return torch.ops.torchquant.flips_quantize(weight, gram, bits=3, group_size=8, ridge=0.05, refine="gradient")


def test_torchscript_and_export_give_the_same(place):
    layer = LAYERS["correlated"](6, 20)
    arguments = layer.weight.to(place), layer.gram.to(place)
    wanted = script_flips(*arguments)
    assert_same(scripted(script_flips)(*arguments), wanted)

    class Module(torch.nn.Module):
        def forward(self, weight: Tensor, gram: Tensor) -> tuple[Tensor, ...]:
            return script_flips(weight, gram)

    assert_same(torch.export.export(Module(), arguments).module()(*arguments), wanted)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ridge": -0.1}, "ridge must not be negative, got -0.1"),
        ({"ridge": float("nan")}, "ridge must not be negative, got nan"),
        ({"order": "random"}, "order must be natural, activation or error, got 'random'"),
        ({"refine": "worst"}, "refine must be best, gradient or none, got 'worst'"),
        ({"steps": -1}, "steps must not be negative, got -1"),
        ({"solver": "rows"}, "solver must be halving or columnwise, got 'rows'"),
        ({"solver": "columnwise", "order": "error"}, "order 'error' is for solver 'halving'"),
    ],
)
def test_errors_name_the_argument(place, options, text):
    with pytest.raises(ValueError, match=f"flips_quantize: {text}"):
        flips_quantize(torch.ones(4, 8, device=place), torch.eye(8, device=place), bits=3, **options)


def test_a_bias_needs_a_column(place):
    with pytest.raises(ValueError, match="flips_quantize: bias_column needs the bias as the last column of weight"):
        flips_quantize_with_bias(torch.ones(4, 0, device=place), torch.eye(0, device=place), bits=3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    **ANY_LAYER,
    options=st.fixed_dictionaries(
        {
            "bits": st.integers(2, 8),
            "group_size": st.integers(0, 45),
            "grid": st.sampled_from(GRIDS),
            "order": st.sampled_from(ORDERS),
            "refine": st.sampled_from(REFINEMENTS),
            "ridge": st.sampled_from([0.0, 1e-4, 0.01, 1.0]),
            "steps": st.integers(0, 150),
            "shrink": st.sampled_from([None, [1.0], [0.9, 0.7]]),
        }
    ),
)
def test_any_layer(options, **layer):
    check_any_layer(flips_quantize, 4, options=options, **layer)
