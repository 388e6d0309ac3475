"""magr_preprocess against a float64 proximal gradient with a sort, then what the method promises."""

import functools
import itertools

import pytest
import torch
from helpers import FLOAT_TYPES, LAYERS, assert_same, check_op, layouts, random, scripted, threads, tier
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchquant import _C
from torchquant.solvers import magr_preprocess

OP = torch.ops.torchquant.magr_preprocess.default
SOLVERS = ("ista", "fista", "admm")


# ---- reference: float64, the prox through the sorted projection onto the l1 ball (Moreau), no shared code


def prox_reference(z: Tensor, t: float) -> Tensor:
    """z - t P(z / t), P the projection of each row onto the l1 ball of radius 1 by the sort of Duchi et al."""
    if t == 0:
        return z
    y = z / t
    ranked = y.abs().sort(dim=1, descending=True).values
    count = torch.arange(1, z.shape[1] + 1, dtype=z.dtype)
    shrinkage = (ranked.cumsum(1) - 1) / count
    last = (ranked > shrinkage).sum(1, keepdim=True) - 1
    theta = shrinkage.gather(1, last)
    projected = torch.where(y.abs().sum(1, keepdim=True) <= 1, y, y.sign() * (y.abs() - theta).clamp_min(0))
    return z - t * projected


def normalized(gram: Tensor) -> Tensor:
    largest = torch.linalg.eigvalsh(gram.double())[-1]
    return gram.double() / largest if largest > 0 else gram.double()


def ista_reference(weight: Tensor, gram: Tensor, alpha: float, iters: int, group_size: int = 0) -> Tensor:
    w, h = weight.double(), normalized(gram)
    v = w
    for _ in range(iters):
        z = v - (v - w) @ h
        v = torch.cat([prox_reference(part, alpha) for part in z.split(group_size or z.shape[1], dim=1)], dim=1)
    return v


def objective(v: Tensor, weight: Tensor, gram: Tensor, alpha: float, group_size: int = 0) -> Tensor:
    d = v.double() - weight.double()
    largest = sum(part.abs().amax(1) for part in v.double().split(group_size or v.shape[1], dim=1))
    return 0.5 * ((d @ normalized(gram)) * d).sum(1) + alpha * largest


def preprocess(layer, place: torch.device | str = "cpu", **options) -> Tensor:
    return magr_preprocess(layer.weight.to(place), layer.gram.to(place), **options).cpu()


def assert_near(got: Tensor, wanted: Tensor, weight: Tensor, tolerance: float = 4e-6) -> None:
    scale = weight.double().abs().amax(1, keepdim=True).clamp_min(1e-30)
    assert ((got.double() - wanted).abs() / scale).max() <= tolerance


# ---- 1, 8: the prox, seen as the first step (its gradient is zero)


@pytest.mark.parametrize("solver", ["ista", "fista", "admm"])
@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 40, 129])
def test_the_first_step_is_the_prox(place: torch.device, columns: int, solver: str) -> None:
    step = {"ista": 1.0, "fista": 1 / 1.02, "admm": 1 / 0.003}[solver]
    weight = torch.randn(9, columns, generator=random(1))
    weight[1], weight[2], weight[3, ::2] = 0.0, 0.5, 0.0
    weight[4] = weight[4].sign()  # ties
    weight[5] *= 1e-4  # less than t altogether
    gram = torch.eye(columns) + 0.1
    for t in (1e-3, 0.3, 0.4 * columns):
        got = magr_preprocess(weight.to(place), gram.to(place), alpha=t / step, iters=1, solver=solver).cpu()
        assert_near(got, prox_reference(weight.double(), t), weight)
        left = (weight.double() - got.double()).abs().sum(1)
        fits = weight.double().abs().sum(1) > t
        torch.testing.assert_close(left[fits], torch.full_like(left[fits], t), rtol=1e-5, atol=3e-7 * columns)
        assert not got[~fits].any()
        inside = got.abs() < got.abs().amax(1, keepdim=True)
        assert torch.equal(got[inside], weight[inside]), "what is not clamped keeps its bits"


def test_one_column_is_soft_shrinkage(place: torch.device) -> None:
    weight = torch.tensor([[2.0], [-0.5], [0.01], [0.0]])
    got = magr_preprocess(weight.to(place), torch.tensor([[7.0]], device=place), alpha=0.1, iters=100).cpu()
    torch.testing.assert_close(got, torch.tensor([[1.9], [-0.4], [0.0], [0.0]]), rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    group_size=st.integers(0, 80),
    t=st.floats(1e-6, 50),
    levels=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 99),
    tier_name=st.sampled_from(_C.cpu_tiers()),
)
def test_any_prox(rows: int, columns: int, group_size: int, t: float, levels: int, seed: int, tier_name: str) -> None:
    weight = torch.randint(-levels, levels + 1, (rows, columns), generator=random(seed)) / levels
    with tier(tier_name):
        got = magr_preprocess(weight, torch.eye(columns), alpha=t, iters=1, group_size=group_size)
    parts = [prox_reference(part, t) for part in weight.double().split(group_size or columns, dim=1)]
    torch.testing.assert_close(got.double(), torch.cat(parts, dim=1), rtol=1e-5, atol=2e-6)


# ---- 2, 3: every step of the reference


@pytest.mark.parametrize("group_size", [0, 16, 20])
@pytest.mark.parametrize("iters", [2, 7, 60])
def test_ista_is_the_reference(place: torch.device, iters: int, group_size: int) -> None:
    for make in LAYERS.values():
        layer = make(13, 48)
        options = {"alpha": 1e-3, "iters": iters, "group_size": group_size}
        got = preprocess(layer, place, **options)
        wanted = ista_reference(layer.weight, layer.gram, **options)
        assert_near(got, wanted, layer.weight, tolerance=1e-3)  # lambda_max is known to 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", LAYERS)
def test_objective_falls_and_the_outputs_stay(place: torch.device, name: str, solver: str) -> None:
    layer, alpha = LAYERS[name](24, 48), 1e-3
    start = objective(layer.weight, layer.weight, layer.gram, alpha)
    before = start
    looks = {"ista": (1, 2, 4, 8, 16, 32, 64, 128), "fista": (32, 128), "admm": (2000,)}  # ADMM falls only in the end
    for iters in looks[solver]:
        v = preprocess(layer, place, alpha=alpha, iters=iters, solver=solver)
        now = objective(v, layer.weight, layer.gram, alpha)
        assert (now <= before * (1 + 1e-5) + 1e-12).all()
        before = now
        d = v.double() - layer.weight.double()
        moved = ((d @ normalized(layer.gram)) * d).sum(1)
        assert (moved <= 2 * start * (1 + 1e-5) + 1e-12).all()
    live = layer.weight.double().abs().amax(1) > 0
    assert (before[live] < start[live]).all()


# ---- 4, 9: convergence


@pytest.mark.parametrize("solver", SOLVERS)
def test_converged_rows_satisfy_the_optimality_conditions(place: torch.device, solver: str) -> None:
    layer, alpha = LAYERS["correlated"](16, 12), 1e-2
    v = preprocess(layer, place, alpha=alpha, iters=20000, solver=solver).double()
    gradient = (v - layer.weight.double()) @ normalized(layer.gram)
    top = v.abs().amax(1, keepdim=True)
    live = top[:, 0] > 0
    torch.testing.assert_close(
        gradient[live].abs().sum(1), torch.full((int(live.sum()),), alpha).double(), rtol=2e-3, atol=0
    )
    gap = alpha * top[:, 0] + (gradient * v).sum(1)
    assert (gap.abs() <= 1e-3 * alpha * layer.weight.double().abs().amax(1)).all()
    plateau = v.abs() >= top * (1 - 1e-4)
    assert (gradient.abs()[~plateau] <= 1e-3 * alpha).all()
    assert ((gradient * v.sign())[plateau & live[:, None]] <= 1e-3 * alpha).all()


def test_a_row_that_the_inputs_hardly_see_becomes_zero(place: torch.device) -> None:
    layer = LAYERS["correlated"](6, 12)
    alpha = 1.01 * (layer.weight.double() @ normalized(layer.gram)).abs().sum(1).max().item()
    assert preprocess(layer, place, alpha=alpha, iters=20000).abs().max() < 1e-4 * layer.weight.abs().max()


@functools.cache
def minimiser(group_size: int) -> Tensor:
    layer = LAYERS["correlated"](12, 10)
    return ista_reference(layer.weight, layer.gram, 1e-2, 10_000, group_size)


@pytest.mark.parametrize("group_size", [0, 5])
@pytest.mark.parametrize("solver", ["fista", "admm"])
def test_accelerated_solvers_reach_the_same_minimiser(place: torch.device, solver: str, group_size: int) -> None:
    layer, alpha = LAYERS["correlated"](12, 10), 1e-2
    wanted = minimiser(group_size)
    got = preprocess(layer, place, alpha=alpha, iters=2000, solver=solver, group_size=group_size)
    assert ((got.double() - wanted).abs() / wanted.abs().max()).max() < 3e-3
    ours, theirs = (objective(v, layer.weight, layer.gram, alpha, group_size) for v in (got, wanted))
    assert (ours <= theirs * (1 + 1e-4)).all()


def test_forty_fista_steps_reach_the_objective_of_two_hundred_ista_steps(place: torch.device) -> None:
    layer = LAYERS["correlated"](64, 96)
    ista, fista = (
        objective(preprocess(layer, place, iters=iters, solver=solver), layer.weight, layer.gram, 1e-3).sum()
        for solver, iters in (("ista", 200), ("fista", 41))
    )
    assert fista <= ista * 1.001


# ---- 5, 6, 7: equivariance and limits


@pytest.mark.parametrize("solver", SOLVERS)
def test_equivariance(place: torch.device, solver: str) -> None:
    layer = LAYERS["correlated"](12, 40)
    options = {"iters": 50, "solver": solver}
    got = preprocess(layer, place, **options)
    assert_same(magr_preprocess(-layer.weight.to(place), layer.gram.to(place), **options).cpu(), -got)
    scaled = magr_preprocess(layer.weight.to(place) * 8, layer.gram.to(place), alpha=8e-3, **options).cpu()
    torch.testing.assert_close(scaled, 8 * got, rtol=1e-5, atol=1e-6)
    assert_same(magr_preprocess(layer.weight.to(place), layer.gram.to(place) * 1024, **options).cpu(), got)
    order = torch.randperm(40, generator=random(3))
    gram = layer.gram[order][:, order]
    permuted = magr_preprocess(layer.weight[:, order].to(place), gram.to(place), **options).cpu()
    torch.testing.assert_close(permuted, got[:, order], rtol=0, atol=1e-3 * layer.weight.abs().max().item())


@pytest.mark.parametrize("solver", SOLVERS)
def test_limits(place: torch.device, solver: str) -> None:
    layer = LAYERS["correlated"](12, 40)
    got = preprocess(layer, place, iters=20, solver=solver)
    for group_size in (40, 1000):
        assert_same(preprocess(layer, place, iters=20, solver=solver, group_size=group_size), got)
    assert_same(preprocess(layer, place, alpha=0.0, solver=solver), layer.weight)
    assert_same(preprocess(layer, place, iters=0, solver=solver), layer.weight)
    dead = magr_preprocess(layer.weight.to(place), torch.zeros(40, 40, device=place), solver=solver).cpu()
    assert_same(dead, layer.weight)


def test_the_weight_is_not_touched() -> None:
    layer = LAYERS["correlated"](5, 8)
    before = layer.weight.clone()
    for options in ({}, {"iters": 0}):
        preprocess(layer, **options).zero_()
        assert_same(layer.weight, before)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(place: torch.device, shape: tuple[int, int]) -> None:
    got = magr_preprocess(torch.empty(shape, device=place), torch.eye(shape[1], device=place))
    assert got.shape == shape and got.dtype == torch.float32


# ---- several Grams, dtypes, layouts, threads, tiers


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("problems", "rows", "columns"), [(3, 5, 24), (150, 1, 9)])
def test_several_grams_are_problems_of_their_own(
    place: torch.device, problems: int, rows: int, columns: int, solver: str
) -> None:
    layers = [LAYERS["correlated"](rows, columns, seed=seed) for seed in range(problems)]
    weight, gram = torch.cat([layer.weight for layer in layers]), torch.stack([layer.gram for layer in layers])
    gram[1] = 0
    options = {"iters": 30, "solver": solver}
    got = magr_preprocess(weight.to(place), gram.to(place), **options).cpu()
    singles = [
        magr_preprocess(w.to(place), g.to(place), **options).cpu()
        for w, g in zip(weight.split(rows), gram, strict=True)
    ]
    torch.testing.assert_close(got, torch.cat(singles), rtol=0, atol=1e-4 * weight.abs().max().item())
    assert_same(got[rows : 2 * rows], weight[rows : 2 * rows])


@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_halves_are_cast(place: torch.device, dtype: torch.dtype, gram_dtype: torch.dtype) -> None:
    layer = LAYERS["correlated"](12, 40)
    weight, gram = layer.weight.to(place, dtype), layer.gram.to(place, gram_dtype)
    assert_same(magr_preprocess(weight, gram, iters=20), magr_preprocess(weight.float(), gram.float(), iters=20))


@pytest.mark.parametrize("solver", SOLVERS)
def test_any_layout(place: torch.device, solver: str) -> None:
    layer = LAYERS["correlated"](12, 40)
    weight, gram = layer.weight.to(place), layer.gram.to(place)
    wanted = magr_preprocess(weight, gram, iters=20, solver=solver)
    for w, g in itertools.product(layouts(weight).values(), layouts(gram).values()):
        assert_same(magr_preprocess(w, g, iters=20, solver=solver), wanted)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("problems", [1, 20])
def test_same_bits_for_any_number_of_threads_and_tier(solver: str, problems: int) -> None:
    layers = [LAYERS["correlated"](260 // problems, 40, seed=seed) for seed in range(problems)]
    weight = torch.cat([layer.weight for layer in layers])
    gram = torch.stack([layer.gram for layer in layers]).squeeze(0)
    results = []
    for name, count in itertools.product(_C.cpu_tiers(), (1, 2, 8)):
        with tier(name), threads(count):
            results.append(magr_preprocess(weight, gram, iters=40, solver=solver, group_size=24))
    for other in results[1:]:
        assert_same(other, results[0])


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 40),
    group_size=st.integers(0, 45),
    dtype=st.sampled_from(FLOAT_TYPES),
    layout=st.sampled_from(["transposed", "sliced", "strided"]),
    solver=st.sampled_from(SOLVERS),
    name=st.sampled_from(sorted(LAYERS)),
)
@example(3, 1, 0, torch.float32, "strided", "fista", "correlated")  # contiguous at any stride, and BLAS looks at it
def test_any_shape_dtype_and_layout(
    rows: int, columns: int, group_size: int, dtype: torch.dtype, layout: str, solver: str, name: str
) -> None:
    layer = LAYERS[name](rows, columns)
    weight = layer.weight.to(dtype)
    options = {"iters": 12, "group_size": group_size, "solver": solver}
    got = magr_preprocess(layouts(weight)[layout], layer.gram, **options)
    assert_same(got, magr_preprocess(weight.contiguous(), layer.gram, **options))
    assert got.isfinite().all()
    if solver != "admm":
        start, now = (objective(v, weight, layer.gram, 1e-3, group_size) for v in (weight, got))
        assert (now <= start * (1 + 1e-4) + 1e-9).all()


# ---- errors, dispatcher

W, H = torch.ones(4, 6), torch.eye(6)


@pytest.mark.parametrize(
    ("weight", "gram", "options", "error", "text"),
    [
        (W, H[:5, :5], {}, ValueError, r"gram must be square of size K=6, got \[5, 5\]"),
        (W, torch.ones(3, 6, 6), {}, ValueError, r"rows of weight must split evenly among the Grams, got N=4"),
        (W[0], H, {}, ValueError, r"weight must be a matrix \[N, K\], got shape \[6\]"),
        (W.double(), H, {}, TypeError, "weight must be float32, float16 or bfloat16, got Double"),
        (W, H.half(), {}, TypeError, "gram must be float32 or float64, got Half"),
        (W / 0, H, {}, ValueError, "weight must be finite, got 24 NaN or Inf"),
        (W, H / 0, {}, ValueError, "gram must be finite, got 36 NaN or Inf"),
        (W, H, {"alpha": -1.0}, ValueError, "alpha must be finite and not negative, got -1"),
        (W, H, {"alpha": float("nan")}, ValueError, "alpha must be finite and not negative, got nan"),
        (W, H, {"iters": -1}, ValueError, "iters must not be negative, got -1"),
        (W, H, {"group_size": -2}, ValueError, "group_size must be 0 .* or positive, got -2"),
        (W, H, {"solver": "newton"}, ValueError, "solver must be ista, fista or admm, got 'newton'"),
    ],
)
def test_errors(weight: Tensor, gram: Tensor, options: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match="magr_preprocess: .*" + text):
        magr_preprocess(weight, gram, **options)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("shape", [(4, 6), (0, 6)])
def test_opcheck(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.ones(shape, dtype=dtype)
    check_op(OP, (weight, H), {"iters": 3, "solver": "fista"})


def test_torchscript() -> None:
    def shrink(weight: Tensor, gram: Tensor) -> Tensor:
        return torch.ops.torchquant.magr_preprocess(weight, gram, iters=5, group_size=4)

    layer = LAYERS["correlated"](5, 12)
    assert_same(scripted(shrink)(layer.weight, layer.gram), preprocess(layer, iters=5, group_size=4))
