"""ridge_update against regression on the stacked inputs, and the choice of its ridge against trying every one."""

import pytest
import torch
from helpers import FLOAT_TYPES, assert_same, check_op, correlated_inputs, heavy_tailed, layouts, scripted, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchquant.solvers import ridge_choose, ridge_update
from torchquant.solvers.ridge import RIDGES

UPDATE = torch.ops.torchquant.ridge_update.default
ERRORS = torch.ops.torchquant.ridge_errors.default


class Inputs:
    """Float inputs, the same on a coarse grid, and the products of both."""

    def __init__(self, tokens: int, columns: int, seed: int = 0, ones: bool = False, step: float = 0.5) -> None:
        x = correlated_inputs(tokens, columns, seed)
        grid = step * x.square().mean().sqrt()
        quantized = torch.round(x / grid) * grid
        one = [torch.ones(tokens, 1, dtype=torch.float64)] if ones else []
        self.x, self.quantized = torch.cat([x, *one], 1), torch.cat([quantized, *one], 1)

    @property
    def gram(self) -> Tensor:
        return self.quantized.T @ self.quantized

    @property
    def cross(self) -> Tensor:
        return self.quantized.T @ self.x

    def error(self, weight: Tensor, updated: Tensor) -> float:
        return float((self.x @ weight.double().T - self.quantized @ updated.double().T).square().sum())


def penalty(inputs: Inputs, ridge: float, bias_column: bool = False, penalize_bias: bool = True) -> Tensor:
    """The diagonal that the ridge stands for."""
    diagonal = inputs.gram.diagonal()
    unit = (diagonal[:-1] if bias_column else diagonal).mean()
    amounts = torch.full_like(diagonal, float(ridge * unit))
    if bias_column and not penalize_bias:
        amounts[-1] = 0
    return amounts


def stacked(weight: Tensor, inputs: Inputs, amounts: Tensor) -> Tensor:
    """Regression of what is missing, with the penalty as further rows of the inputs."""
    missing = (inputs.x - inputs.quantized) @ weight.double().T
    rows = torch.cat([inputs.quantized, torch.diag(amounts.sqrt())])
    change = torch.linalg.lstsq(rows, torch.cat([missing, missing.new_zeros(len(amounts), missing.shape[1])])).solution
    return weight.double() + change.T


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("bias", ["none", "penalized", "free"])
def test_equals_the_stacked_regression(place, ridge, bias):
    inputs, options = (
        Inputs(90, 24, ones=bias != "none"),
        {"bias_column": bias != "none", "penalize_bias": bias != "free"},
    )
    weight = heavy_tailed(7, inputs.x.shape[1])
    got = ridge_update(weight.to(place), inputs.gram.to(place), inputs.cross.to(place), ridge=ridge, **options)
    amounts = penalty(inputs, ridge, **options)
    torch.testing.assert_close(got.cpu(), stacked(weight, inputs, amounts).float(), rtol=1e-5, atol=2e-7)
    change = got.cpu().double() - weight.double()
    residual = change @ (inputs.gram + torch.diag(amounts)) - weight.double() @ (inputs.cross - inputs.gram).T
    assert residual.abs().max() < 1e-5 * (weight.double() @ inputs.cross.T).abs().max()


def test_the_closed_form_of_the_contract(place):
    inputs, weight = Inputs(70, 16), heavy_tailed(5, 16)
    amounts = torch.diag(penalty(inputs, 0.2))
    wanted = torch.linalg.solve(inputs.gram + amounts, (inputs.cross + amounts) @ weight.double().T).T
    got = ridge_update(weight.to(place), inputs.gram.to(place), inputs.cross.to(place), ridge=0.2)
    torch.testing.assert_close(got.cpu(), wanted.float(), rtol=1e-5, atol=1e-7)


def test_lowers_the_penalized_error_and_a_larger_ridge_moves_less(place):
    inputs, weight = Inputs(80, 32), heavy_tailed(9, 32)
    before, moves = inputs.error(weight, weight), []
    for ridge in (0.0, 1e-3, 1e-2, 0.1, 1.0, 10.0, 1e6):
        got = ridge_update(weight.to(place), inputs.gram.to(place), inputs.cross.to(place), ridge=ridge).cpu()
        moves.append(float((got - weight).square().sum()))
        assert inputs.error(weight, got) + float(penalty(inputs, ridge)[0]) * moves[-1] < before
    assert moves == sorted(moves, reverse=True) and moves[-1] < 1e-6 * moves[0]


@pytest.mark.parametrize("tokens", [60, 900])
@pytest.mark.parametrize("ridge", [1e-3, 0.01, 0.1])
def test_solving_in_float32_loses_no_more_than_rounding_the_grams(place, tokens, ridge):
    inputs, weight = Inputs(tokens, 300), heavy_tailed(40, 300)
    exact = [t.to(place) for t in (inputs.gram, inputs.cross)]
    rounded = [t.float() for t in exact]
    wanted, known, got = (
        ridge_update(weight.to(place), *grams, ridge=ridge).cpu()
        for grams in (exact, [t.double() for t in rounded], rounded)
    )
    assert (got - known).norm() < 2 * (known - wanted).norm() < 1e-2 * (wanted - weight).norm()
    assert abs(inputs.error(weight, got) - inputs.error(weight, wanted)) < 1e-6 * inputs.error(weight, weight)


def test_equal_inputs_leave_the_weight(place):
    inputs, weight = Inputs(50, 20), heavy_tailed(6, 20).to(place)
    gram = inputs.gram.to(place)
    for ridge in (0.0, 0.1, 100.0):
        assert torch.equal(ridge_update(weight, gram, gram, ridge=ridge), weight)


def test_dead_inputs_keep_their_columns(place):
    inputs, weight = Inputs(50, 20), heavy_tailed(6, 20)
    inputs.quantized[:, 3] = 0
    for ridge in (0.0, 0.1):
        got = ridge_update(weight.to(place), inputs.gram.to(place), inputs.cross.to(place), ridge=ridge).cpu()
        assert torch.equal(got[:, 3], weight[:, 3])
        assert inputs.error(weight, got) < 0.9 * inputs.error(weight, weight)


def test_fewer_tokens_than_inputs_without_a_ridge(place):
    inputs, weight = Inputs(10, 30), heavy_tailed(6, 30)
    got = ridge_update(weight.to(place), inputs.gram.float().to(place), inputs.cross.float().to(place), ridge=0.0).cpu()
    assert inputs.error(weight, got) < 0.02 * inputs.error(weight, weight)
    assert (got - weight).norm() < 2 * weight.norm()


def test_one_problem_per_gram(place):
    several, weight = [Inputs(40, 9, seed=seed) for seed in range(4)], heavy_tailed(8, 9).to(place)
    gram, cross = (torch.stack([getattr(i, name) for i in several]).to(place) for name in ("gram", "cross"))
    together = ridge_update(weight, gram, cross, ridge=0.05)
    apart = [ridge_update(weight[2 * b : 2 * b + 2], gram[b], cross[b], ridge=0.05) for b in range(4)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-6, atol=1e-8)
    errors = [
        ridge_choose(weight[2 * b : 2 * b + 2], gram[b], cross[b], gram[b - 1], cross[b - 1])[1] for b in range(4)
    ]
    found = ridge_choose(weight, gram, cross, gram.roll(1, 0), cross.roll(1, 0))[1]
    torch.testing.assert_close(found, torch.stack(errors).sum(0), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("bias", ["none", "penalized", "free"])
def test_all_ridges_at_once_are_every_ridge_tried(place, bias):
    options = {"bias_column": bias != "none", "penalize_bias": bias != "free"}
    fit, heldout = (Inputs(60, 24, seed=seed, ones=options["bias_column"]) for seed in (0, 10))
    heldout.x, heldout.quantized = heldout.x + fit.x * 2, heldout.quantized + fit.quantized * 2
    weight = heavy_tailed(7, fit.x.shape[1])
    products = [t.to(place) for t in (fit.gram, fit.cross, heldout.gram, heldout.cross)]
    ridge, errors = ridge_choose(weight.to(place), *products, **options)
    updated = [stacked(weight, fit, penalty(fit, ridge, **options)) for ridge in RIDGES]
    before = heldout.error(weight, weight)
    wanted = torch.tensor([heldout.error(weight, w) - before for w in updated], dtype=torch.float64)
    torch.testing.assert_close(errors.cpu(), wanted, rtol=1e-6, atol=1e-6 * before)
    assert ridge == RIDGES[int(wanted.argmin())]


def test_few_tokens_want_a_larger_ridge_than_many(place):
    weight, heldout = heavy_tailed(12, 32).to(place), Inputs(4000, 32, seed=0)
    chosen = []
    for tokens in (40, 2000):
        fit = Inputs(4000, 32, seed=0)
        fit.x, fit.quantized = fit.x[:tokens], fit.quantized[:tokens]
        products = [t.to(place) for t in (fit.gram, fit.cross, heldout.gram, heldout.cross)]
        ridge, errors = ridge_choose(weight, *products)
        assert errors.min() < 0
        chosen.append(ridge)
    assert chosen[0] > 3 * chosen[1] and RIDGES[0] < chosen[0] < RIDGES[-1]


def test_threads_and_layouts_give_the_same():
    inputs, weight = Inputs(300, 150), heavy_tailed(210, 150)
    products = [t.float() for t in (inputs.gram, inputs.cross)]
    wanted, (ridge, errors) = ridge_update(weight, *products, ridge=0.01), ridge_choose(weight, *products, *products)
    for count in (1, 2, 8):
        with threads(count):
            assert_same(ridge_update(weight, *products, ridge=0.01), wanted)
            again, errors_again = ridge_choose(weight, *products, *products)
            assert again == ridge  # an eigendecomposition has other last bits
            torch.testing.assert_close(errors_again, errors, rtol=1e-10, atol=0)
    for name, view in layouts(weight).items():
        assert_same(ridge_update(view, *(layouts(t)[name] for t in products), ridge=0.01), wanted)


def test_opcheck(place):
    inputs, weight = Inputs(40, 12), heavy_tailed(6, 12).to(place)
    gram, cross = inputs.gram.to(place), inputs.cross.to(place)
    for options in ({}, {"bias_column": True}, {"bias_column": True, "penalize_bias": False}):
        check_op(UPDATE, (weight, gram, cross), {"ridge": 0.1, **options})
        check_op(ERRORS, (weight, gram, cross, gram, cross), {"ridges": [0.1, 1.0], **options})
    check_op(UPDATE, (weight.half(), gram.expand(2, 12, 12), cross.expand(2, 12, 12)), {"ridge": 0.1})
    for rows, columns in ((0, 5), (3, 0), (0, 0)):
        empty, square = torch.empty(rows, columns, device=place), torch.zeros(columns, columns, device=place)
        check_op(UPDATE, (empty, square, square), {"ridge": 0.1})
        check_op(ERRORS, (empty, square, square, square, square), {"ridges": [0.1]})


def script_ridge(weight: Tensor, gram: Tensor, cross: Tensor):
    updated = torch.ops.torchquant.ridge_update(weight, gram, cross, ridge=0.1, bias_column=True, penalize_bias=False)
    return updated, torch.ops.torchquant.ridge_errors(weight, gram, cross, gram, cross, ridges=[0.1, 2.0])


def test_torchscript_and_export_give_the_same(place):
    inputs = Inputs(40, 12)
    arguments = heavy_tailed(6, 12).to(place), inputs.gram.to(place), inputs.cross.to(place)
    wanted = script_ridge(*arguments)
    assert_same(scripted(script_ridge)(*arguments), wanted)

    class Module(torch.nn.Module):
        def forward(self, weight: Tensor, gram: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
            return script_ridge(weight, gram, cross)

    assert_same(torch.export.export(Module(), arguments).module()(*arguments), wanted)


def test_errors_name_the_argument(place):
    weight, square = torch.ones(4, 8, device=place), torch.eye(8, device=place)
    for options, text in (
        ({"ridge": -0.1}, "ridge must be finite and not negative, got -0.1"),
        ({"ridge": float("inf")}, "ridge must be finite and not negative, got inf"),
    ):
        with pytest.raises(ValueError, match=f"ridge_update: {text}"):
            ridge_update(weight, square, square, **options)
    with pytest.raises(ValueError, match=r"ridge_update: cross must have shape \[8, 8\], got \[7, 8\]"):
        ridge_update(weight, square, square[:7], ridge=0.1)
    with pytest.raises(TypeError, match="ridge_update: cross must be float32 or float64, got Half"):
        ridge_update(weight, square, square.half(), ridge=0.1)
    with pytest.raises(ValueError, match="ridge_update: cross must be finite, got 64 NaN or Inf"):
        ridge_update(weight, square, square * float("nan"), ridge=0.1)
    with pytest.raises(ValueError, match="ridge_update: bias_column needs the bias as the last column"):
        ridge_update(weight[:, :0], square[:0, :0], square[:0, :0], ridge=0.1, bias_column=True)
    with pytest.raises(ValueError, match="is gram a Gram matrix"):
        ridge_update(weight, square - 100, square, ridge=0.0)
    with pytest.raises(ValueError, match="ridge_errors: ridges must be finite and positive, got 0"):
        ridge_choose(weight, square, square, square, square, ridges=[0.1, 0.0])
    with pytest.raises(ValueError, match="ridge_errors: ridges must hold at least one value"):
        ridge_choose(weight, square, square, square, square, ridges=[])
    with pytest.raises(ValueError, match="ridge_errors: heldout_gram must have shape"):
        ridge_choose(weight, square, square, square[:7, :7], square, ridges=[0.1])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 9), st.integers(0, 25)),
    tokens=st.integers(1, 50),
    dtype=st.sampled_from(FLOAT_TYPES),
    ridge=st.sampled_from([0.0, 1e-4, 0.01, 1.0]),
    bias=st.booleans(),
    penalized=st.booleans(),
)
def test_any_layer(shape, tokens, dtype, ridge, bias, penalized):
    rows, columns = shape
    if columns == 0:
        bias = False
    inputs, weight = Inputs(tokens, max(columns - bias, 1), ones=bias), heavy_tailed(rows, columns).to(dtype)
    gram, cross = inputs.gram[:columns, :columns], inputs.cross[:columns, :columns]
    inputs.x, inputs.quantized = inputs.x[:, :columns], inputs.quantized[:, :columns]
    got = ridge_update(weight, gram, cross, ridge=ridge, bias_column=bias, penalize_bias=penalized)
    assert got.shape == shape and got.dtype == torch.float32 and got.isfinite().all()
    before = inputs.error(weight, weight)
    assert inputs.error(weight, got) <= before * (1 + 1e-6) + 1e-9
