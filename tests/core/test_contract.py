"""The edge cases that every weight solver handles alike, and the wording of errors: operator, argument, rule, what was
got."""

from collections.abc import Callable

import pytest
import torch
from helpers import BITS, GRIDS, LAYERS, assert_same
from solvers import reference
from torch import Tensor

from torchquant import solvers as operators

GRAM_SOLVERS = ("comq_quantize", "gptq_quantize", "flips_quantize")
SOLVERS = ("rtn_quantize", *GRAM_SOLVERS)


def solve(name: str, weight: Tensor, gram: Tensor | None = None, **options: object) -> tuple[Tensor, ...]:
    """Any weight solver by its name: codes, scale, zero_point[, info]."""
    if gram is None:
        gram = torch.eye(weight.shape[-1], device=weight.device)
    arguments = (weight,) if name == "rtn_quantize" else (weight, gram)
    return getattr(operators, name)(*arguments, **{"bits": 4, **options})


def values(result: tuple[Tensor, ...], group_size: int = 0) -> Tensor:
    return reference.dequantize(*result[:3], group_size)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("grid", GRIDS)
def test_constant_rows_are_exact(place, solver, grid, bits):
    weight = torch.tensor([0.0, 0.5, -0.5, 3e-5, -7.3])[:, None].repeat(1, 12).to(place)
    codes, scale, zero_point, *_ = result = solve(solver, weight, bits=bits, grid=grid, shrink=[1.0])
    torch.testing.assert_close(values(result), weight.double().cpu(), rtol=1e-6, atol=0)
    assert scale[0].item() == 1.0
    if solver == "rtn_quantize" and grid != "midrise":
        assert torch.equal(scale[1:, 0], weight[1:, 0].abs())
        assert torch.equal((codes - zero_point)[1:, 0], weight[1:, 0].sign())


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_row_one_column_one_weight(place, solver):
    for rows, columns in ((1, 1), (1, 9), (9, 1)):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(place)
        gram = 2.0 * torch.eye(columns, device=place)
        result = solve(solver, weight, gram, bits=3)
        scale = reference.expand(result[1], columns, 0)
        assert ((values(result) - weight.double().cpu()).abs() <= 0.501 * scale).all() or columns == 9
        if columns == 1:
            torch.testing.assert_close(values(result), weight.double().cpu(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("solver", GRAM_SOLVERS)
@pytest.mark.parametrize(
    "options", [{}, {"group_size": 8}, {"grid": "midrise"}, {"order": "activation"}, {"order": "greedy"}]
)
def test_dead_channels_are_rounded_on_the_final_scale(place, solver, options):
    if options.get("order") == ("activation" if solver == "comq_quantize" else "greedy"):
        options = {}
    layer = LAYERS["dead"](12, 40)
    weight, gram = layer.weight.to(place), layer.gram.to(place)
    codes, scale, zero_point, info = solve(solver, weight, gram, **options)
    problem = reference.Problem(weight, gram, 4, options.get("group_size", 0))
    delta, zero = problem.expand(scale), problem.expand(zero_point)
    x = reference.position(problem.weight, delta, zero, 15)[:, problem.dead]
    reference.assert_nearest(codes[:, problem.dead.to(place)], x, 1e-4)
    assert info.tolist()[1] == int(problem.dead.sum())


@pytest.mark.parametrize("solver", GRAM_SOLVERS)
def test_a_gram_of_zeros_means_rounding(place, solver):
    weight = LAYERS["correlated"](6, 20).weight.to(place)
    codes, scale, zero_point, info = solve(solver, weight, torch.zeros(20, 20, device=place), shrink=[1.0])
    for got, wanted in zip((codes, scale, zero_point), operators.rtn_quantize(weight, bits=4), strict=True):
        assert torch.equal(got, wanted)
    assert info.tolist()[1] == 20


@pytest.mark.parametrize("solver", GRAM_SOLVERS)
def test_rank_deficient_grams_are_handled(place, solver):
    for seed in range(3):
        layer = LAYERS["rank_deficient"](16, 60, seed=seed)
        weight, gram = layer.weight.to(place), layer.gram.to(place)
        result = solve(solver, weight, gram, bits=3)
        rounded = operators.rtn_quantize(weight, bits=3)
        error, naive = (reference.objective(weight, gram, values(q)).sum() for q in (result, rounded))
        assert error < 0.7 * naive
        assert result[3].tolist()[0] in (0, 1)


@pytest.mark.parametrize("solver", GRAM_SOLVERS)
@pytest.mark.parametrize("diagonal", [1e-12, 1e-30, 1e-38, 1e-42, 1e30])
def test_grams_of_any_size(place, solver, diagonal):
    """A channel that is all but dead must not turn into the lowest level."""
    weight = LAYERS["correlated"](6, 16).weight.to(place)
    gram = torch.eye(16, device=place)
    gram[3, 3] = diagonal
    fixed = {"update_scale": False} if solver == "comq_quantize" else {}
    codes, scale, *_ = solve(solver, weight, gram, shrink=[1.0], **fixed)
    wanted = operators.rtn_quantize(weight, bits=4)
    assert torch.equal(codes, wanted[0]) and torch.equal(scale, wanted[1])


@pytest.mark.parametrize("solver", GRAM_SOLVERS)
@pytest.mark.parametrize("factor", [1e-30, 1e-12, 1e12, 1e25])
def test_a_gram_in_other_units(place, solver, factor):
    layer = LAYERS["correlated"](8, 24)
    weight, gram = layer.weight.to(place), layer.gram.to(place)
    result, scaled = solve(solver, weight, gram, bits=3), solve(solver, weight, gram * factor, bits=3)
    assert all(t.isfinite().all() for t in scaled[1:3])
    error, other = (reference.objective(weight, gram, values(q)) for q in (result, scaled))
    torch.testing.assert_close(other.sum(), error.sum(), rtol=0.02, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_points_may_lie_outside_the_codes(place, solver):
    weight = (2 + torch.rand(4, 16, generator=torch.Generator().manual_seed(0))).to(place)
    result = solve(solver, weight, shrink=[1.0])
    assert (result[2] < 0).all()
    assert ((values(result) - weight.double().cpu()).abs() <= 0.51 * result[1].double().cpu()).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_ragged_last_group(place, solver):
    weight = LAYERS["correlated"](5, 37).weight.to(place)
    result = solve(solver, weight, group_size=16, shrink=[1.0])
    assert result[1].shape == (5, 3)
    last = solve(solver, weight[:, 32:], shrink=[1.0])
    assert torch.equal(result[0][:, 32:], last[0])
    torch.testing.assert_close(result[1][:, 2:], last[1])


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_group_of_all_columns_is_no_group(place, solver):
    layer = LAYERS["correlated"](7, 24)
    weight, gram = layer.weight.to(place), layer.gram.to(place)
    for group_size in (24, 1000):
        assert_same(solve(solver, weight, gram, group_size=group_size), solve(solver, weight, gram))


BAD_OPTIONS: list[tuple[dict[str, object], str]] = [
    ({"bits": 1}, "bits must be 2..8, got 1"),
    ({"bits": 9}, "bits must be 2..8, got 9"),
    ({"group_size": -1}, "group_size must be 0 .* or positive, got -1"),
    ({"grid": "ternary"}, "grid must be asymmetric, symmetric or midrise, got 'ternary'"),
    ({"shrink": []}, "shrink must hold at least one factor, got none"),
    ({"shrink": [1.0, 0.0]}, r"shrink factors must be in \(0, 1\], got 0"),
    ({"shrink": [1.5]}, r"shrink factors must be in \(0, 1\], got 1.5"),
    ({"shrink": [float("nan")]}, r"shrink factors must be in \(0, 1\], got nan"),
]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("options", "text"), BAD_OPTIONS)
def test_bad_options_are_named(place, solver, options, text):
    with pytest.raises(ValueError, match=f"{solver}: {text}"):
        solve(solver, torch.randn(4, 8, device=place), **options)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(place, solver, bad):
    weight = torch.randn(4, 8, device=place)
    weight[2, 3] = weight[0, 0] = bad
    with pytest.raises(ValueError, match=f"{solver}: weight must be finite, got 2 NaN or Inf"):
        solve(solver, weight)
    with pytest.raises(ValueError, match=f"{solver}: weight must be finite, got 2 NaN or Inf"):
        solve(solver, weight.to(torch.bfloat16))


@pytest.mark.parametrize("solver", SOLVERS)
def test_large_weights_are_finite(place, solver):
    """Their float32 sum overflows; they are still numbers."""
    weight = torch.full((4, 8), 1e38, device=place)
    weight[0, 0] = -1e38
    assert solve(solver, weight, shrink=[1.0])[1].isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(), (8,), (2, 4, 8)])
def test_weights_that_are_no_matrix(place, solver, shape):
    got = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"{solver}: weight must be a matrix \[N, K\], got shape \[{got}\]"):
        solve(solver, torch.zeros(shape, device=place), torch.eye(8, device=place))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("dtype", "name"), [(torch.float64, "Double"), (torch.int32, "Int"), (torch.bool, "Bool")])
def test_weights_of_other_types(place, solver, dtype, name):
    with pytest.raises(TypeError, match=f"{solver}: weight must be float32, float16 or bfloat16, got {name}"):
        solve(solver, torch.ones(4, 8, device=place).to(dtype))


BAD_GRAMS: list[tuple[type, Callable[[], Tensor], str]] = [
    (ValueError, lambda: torch.zeros(8, 7), r"gram must be square of size K=8, got \[8, 7\]"),
    (ValueError, lambda: torch.eye(7), r"gram must be square of size K=8, got \[7, 7\]"),
    (ValueError, lambda: torch.zeros(8), r"gram must be square of size K=8, got \[8\]"),
    (ValueError, lambda: torch.ones(3, 8, 8), "rows of weight must split evenly among the Grams, got N=4"),
    (ValueError, lambda: torch.zeros(0, 8, 8), "rows of weight must split evenly among the Grams"),
    (TypeError, lambda: torch.eye(8, dtype=torch.bfloat16), "gram must be float32 or float64, got BFloat16"),
    (TypeError, lambda: torch.eye(8, dtype=torch.int64), "gram must be float32 or float64, got Long"),
    (ValueError, lambda: torch.eye(8) * float("nan"), "gram must be finite, got 64 NaN or Inf"),
    (ValueError, lambda: torch.diag(torch.tensor([float("inf")] + [1.0] * 7)), "gram must be finite, got 1 NaN or Inf"),
]


@pytest.mark.parametrize("solver", GRAM_SOLVERS)
@pytest.mark.parametrize(("error", "gram", "text"), BAD_GRAMS)
def test_bad_grams_are_named(place, solver, error, gram, text):
    with pytest.raises(error, match=f"{solver}: (the )?{text}"):
        solve(solver, torch.randn(4, 8, device=place), gram().to(place))


@pytest.mark.parametrize("solver", GRAM_SOLVERS)
def test_a_gram_on_another_device(place, solver):
    if place.type == "cpu":
        pytest.skip("another device needs CUDA")
    with pytest.raises((ValueError, RuntimeError), match=f"{solver}: gram must be on cuda:0, got cpu"):
        solve(solver, torch.randn(4, 8, device=place), torch.eye(8))


@pytest.mark.parametrize("solver", SOLVERS)
def test_info_and_empty_inputs(place, solver):
    for rows, columns in ((0, 8), (4, 0), (0, 0)):
        codes, scale, zero_point, *info = solve(solver, torch.zeros(rows, columns, device=place))
        assert codes.shape == (rows, columns) and scale.shape == zero_point.shape == (rows, 1)
        assert all(i.dtype == torch.int64 and i.shape == (4 if solver == "flips_quantize" else 3,) for i in info)
        assert scale.isfinite().all() and zero_point.isfinite().all()
