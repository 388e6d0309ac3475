"""ERQ: two steps of ridge regression, one for the activations' error and one for the weights'."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from ..calibrate import Calibration
from ..collect import Stats
from ..config import Scheme
from ..report import Report
from ..solve import STATUS, Problem, Solution, best_bias, centred, correct
from ..solvers.dequantize import dequantize
from ..solvers.flips import flips_quantize
from ..solvers.portfolio import Candidate
from ..solvers.ridge import ridge_choose
from ..solvers.rtn import rtn_quantize
from ..steps import (
    Run,
    add_solution,
    collect_inputs,
    correct_weights,
    matrix_of,
    observe,
    preparing,
    reparameterize_layernorms,
    rewrite_attention,
    solve_weights,
)
from .repq_vit import choose_ranges, keep_biases
from .softmax import MEASURED, activations_for, measure_softmax

# Of the mean diagonal: the released code adds 1000 to sums over 6304 tokens whose variance is about 1.
RIDGE = 0.16


@dataclass(frozen=True)
class Wqer:
    """The rounding half of ERQ; the settings of :func:`torchquant.solvers.flips.flips_quantize`."""

    refine: str = "gradient"
    steps: int = 100
    order: str = "natural"
    solver: str = "halving"
    shrink: tuple[float, ...] | None = (1.0,)


def erq(
    model: nn.Module,
    calib: Any,
    scheme: str | Scheme = "W4A4",
    *,
    aqer: bool = True,
    wqer: bool | Wqer = True,
    ridge: float | str = RIDGE,
    weight_ridge: float = RIDGE,
    softmax: str = "log_sqrt2",
    overrides: Mapping[str, str | Scheme | None] | None = None,
    ignore: Sequence[str] = (),
    first_last_bits: int | None = 8,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Quantize a vision transformer in place: RepQ-ViT's activations, then two regressions a layer [1].

    Aqer moves the float weights (and biases) to where they make up for the quantization of the inputs: ``min || W x -
    W' x~ ||^2 + l || W' - W ||^2``, in closed form. Wqer rounds half of the remaining columns at a time, flips single
    roundings while that helps, and lets the other half answer for the error.

    Args:
        model: any module; attention as :func:`torchquant.nn.rewrite_attention` knows it.
        calib: calibration data, as for :func:`torchquant.quantize_`; 32 pictures in the publication.
        scheme: ``"W4A4"``, ``"W3A3"`` ...
        aqer: False leaves the float weights as they are.
        wqer: False rounds to nearest; or other settings than the published ones.
        ridge: l of Aqer, relative to the mean diagonal of the inputs' Gram; ``"auto"``: for each layer the one that
            does best on half of the batches when it is fitted to the others.
        weight_ridge: the same of Wqer.
        softmax: quantizer of the softmax's output; ``"auto"``: in each module the one with the least expected error;
            ``"measured"``: in all of them the one that changes the model's outputs least.
        overrides, ignore, first_last_bits, seed, progress: as for :func:`torchquant.quantize_`.

    References:
        [1] Zhong et al., ERQ: Error Reduction for Post-Training Quantization of Vision Transformers, 2407.06794.
    """
    with preparing(
        model, calib, scheme, activations=activations_for(softmax), method="rtn", overrides=overrides, ignore=ignore,
        first_last_bits=first_last_bits, seed=seed, progress=progress,
    ) as run:  # fmt: skip
        rewrite_attention(run)
        observe(run)
        choose_ranges(run)
        errors = measure_softmax(run) if softmax == MEASURED else {}
        reparameterize_layernorms(run)
        reduce_errors(run, aqer, wqer, ridge, weight_ridge)
    run.report.details["softmax"] = errors
    return run.report


def reduce_errors(
    run: Run, aqer: bool, wqer: bool | Wqer, ridge: float | str = RIDGE, weight_ridge: float = RIDGE
) -> None:
    """Aqer, then Wqer or rounding, of all layers that are open."""
    ridges = choose_ridges(run) if ridge == "auto" and aqer else {}
    collect_inputs(run)
    if not aqer:
        keep_biases(run)
    elif ridges:
        for name, stats in run.stats.items():
            run.corrected[name] = correct(*matrix_of(run.targets[name]), stats, ridges[name])
    else:
        correct_weights(run, float(ridge))
    if wqer is not False:
        round_by_halves(run, Wqer() if wqer is True else wqer, weight_ridge)
    solve_weights(run)


# --- Aqer ---


def choose_ridges(run: Run) -> dict[str, float]:
    """For each layer the ridge that does best on the odd batches when fitted to the even ones."""
    assert run.data is not None
    whole = run.data
    if not isinstance(whole.batches, list) or len(whole.batches) < 2:
        raise ValueError("erq: ridge='auto' needs calibration data of at least two batches")
    halves = []
    try:
        for part in (whole.batches[0::2], whole.batches[1::2]):
            run.data = Calibration(part, progress=run.progress)
            collect_inputs(run)
            halves.append(run.stats)
    finally:
        run.data = whole
    return {
        name: choose_ridge(matrix_of(run.targets[name]), stats, halves[1][name]) for name, stats in halves[0].items()
    }


def choose_ridge(layer: tuple[Tensor, Tensor | None], fitted: Stats, held_out: Stats) -> float:
    weight, bias = layer[0].float().contiguous(), layer[1]
    parts = []
    for stats in (fitted, held_out):
        stats = centred(stats, weight) if bias is not None and stats.sums is not None else stats
        assert stats.cross is not None
        parts += [stats.gram, stats.cross.transpose(-1, -2).contiguous()]
    return ridge_choose(weight, *parts)[0]


# --- Wqer ---


def round_by_halves(run: Run, settings: Wqer, ridge: float) -> None:
    names = [name for name in run.stats if name not in run.layers]
    for name in tqdm(names, desc="wqer", disable=not run.progress, leave=False):
        began = time.perf_counter()
        stats = run.stats.pop(name)
        add_solution(run, name, halve(run, name, stats, settings, ridge), time.perf_counter() - began, stats.tokens)
        run.layers[name].method = "erq" if name in run.corrected else "wqer"
        run.corrected.pop(name, None)


def halve(run: Run, name: str, stats: Stats, settings: Wqer, ridge: float) -> Solution:
    """One layer's codes. Around the means of the inputs the bias drops out, and is what these leave in the end."""
    target, scheme = run.targets[name], run.targets[name].scheme
    original, bias = matrix_of(target)
    original = original.float().contiguous()
    start = run.corrected[name][0] if name in run.corrected else original
    free = bias is not None and stats.sums is not None
    around = centred(stats, original) if free else stats
    codes, scale, zero_point, info = flips_quantize(
        start, around.gram, bits=scheme.weight_bits, group_size=scheme.group_size, grid=scheme.grid, ridge=ridge,
        shrink=settings.shrink, order=settings.order, refine=settings.refine, steps=settings.steps,
        solver=settings.solver,
    )  # fmt: skip
    problem = Problem.of(start, around, run.ridge, original=original)
    rounded = rtn_quantize(original, bits=scheme.weight_bits, group_size=scheme.group_size, grid=scheme.grid)
    status, dead, damping, _ = info.tolist()
    solution = Solution(codes, scale, zero_point, STATUS[status], damping, dead)
    solution.error_rtn = problem.relative_error(Candidate("rtn", *rounded), scheme.group_size)
    solution.error = problem.relative_error(Candidate("wqer", codes, scale, zero_point), scheme.group_size)
    if free:
        values = dequantize(codes, scale, zero_point, group_size=scheme.group_size)
        solution.bias = best_bias(bias, original, values, stats)  # type: ignore[arg-type]
    return solution
