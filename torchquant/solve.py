"""One layer: run the steps of a method on its weight and statistics, and say how well that went."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .collect import Stats
from .config import COMQ, GPTQ, RTN, Auto, MagR, Scheme, Step, method_name
from .kernels import integer_group_scales
from .quantizers import uniform_quantize
from .solvers import comq_quantize, dequantize, gptq_quantize, magr_preprocess, ridge_update, rtn_quantize
from .solvers.portfolio import Candidate, portfolio_quantize, row_objective, times_gram

STATUS = ("ok", "damped", "rounded")  # by the operators' info[0]
NAN = float("nan")
BINS = 64  # of weight histograms
CONSTANT = 1e-6  # share of a channel's energy around its mean below which it counts as constant


@dataclass
class Solution:
    """Codes and grid of one layer, with what the report says of them."""

    codes: Tensor  # uint8 [N, K]
    scale: Tensor  # float32 [N, G]
    zero_point: Tensor  # float32 [N, G]
    status: str = STATUS[0]
    damping: int = 0
    dead_channels: int = 0
    error_rtn: float = NAN
    error: float = NAN
    winners: dict[str, int] = field(default_factory=dict)
    largest: tuple[float, float] | None = None  # mean over rows of max |w|, before and after MagR
    bias: Tensor | None = None  # [N], in place of the float layer's; None = as it was


@dataclass
class Problem:
    """``min_Q tr(Q H Q^T) - 2 tr(Q P^T)``, with P = W H unless the inputs' quantization is to be corrected too.

    H (and X^T X~, and so the errors reported) carries a ridge: directions that the calibration data hardly show are not
    free. Without it the solvers fit these data and lose on others.
    """

    weight: Tensor  # float32 [N, K]
    gram: Tensor  # [K, K] or [B, K, K]
    linear: Tensor | None = None  # P [N, K]
    constant: float = 0.0  # what the objective of row_objective lacks, summed over rows
    energy: float = 0.0  # squared float outputs, summed

    @classmethod
    def of(cls, weight: Tensor, stats: Stats, ridge: float = 0.0, *, original: Tensor | None = None) -> "Problem":
        """``original``: the weight that gives the float outputs, where ``weight`` is another one to start from.

        With ``stats.sums`` of a layer whose bias may change (see ``centred``) the problem is that of the best bias.
        """
        added = ridge * stats.gram.diagonal(dim1=-2, dim2=-1).mean(-1)  # [] or [B]
        gram = plus_diagonal(stats.gram, added)
        own = times_gram(weight, gram)
        energy = float((own.double() * weight.double()).sum())
        if stats.cross is None or stats.energy is None:
            return cls(weight, gram, None, 0.0, energy)
        linear = times_gram(weight, plus_diagonal(stats.cross, added))
        if original is not None:
            linear = linear + times_gram(original - weight, stats.cross)
        squares = weight.double().square().view(added.numel(), -1).sum(1)  # [B]
        floats = float(stats.energy.sum()) + float((squares * added.double()).sum())
        constant = floats - 2 * float((linear.double() * weight.double()).sum()) + energy
        return cls(weight, gram, linear, constant, floats + stats.mean_energy)

    def relative_error(self, found: Candidate, group_size: int) -> float:
        """|| X W^T - X~ Q^T || / || X W^T ||; 0 for a layer whose outputs are all zero."""
        if self.energy <= 0:
            return 0.0
        rows = row_objective(self.weight, self.gram, self.linear, found, group_size)
        return (max(float(rows.double().sum()) + self.constant, 0.0) / self.energy) ** 0.5


def plus_diagonal(gram: Tensor, added: Tensor) -> Tensor:
    """``gram + added I`` as a new tensor; ``[K, K]`` and a number, or ``[B, K, K]`` and ``[B]``."""
    result = gram.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(added[..., None])
    return result


def centred(stats: Stats, weight: Tensor) -> Stats:
    """The same tokens around their means: the errors that the best bias leaves.

    ``weight``: the one that gives the float outputs.
    """
    assert stats.sums is not None and stats.cross is not None and stats.energy is not None
    count = float(max(stats.tokens, 1))
    before, after = stats.sums  # [K] or [B, K], float64
    gram = stats.gram - (after[..., :, None] * after[..., None, :] / count).to(stats.gram.dtype)
    cross = stats.cross - (before[..., :, None] * after[..., None, :] / count).to(stats.gram.dtype)
    # A constant input: what is left is rounding of the sums.
    constant = gram.diagonal(dim1=-2, dim2=-1) <= CONSTANT * stats.gram.diagonal(dim1=-2, dim2=-1)
    gram = gram.masked_fill(constant[..., :, None] | constant[..., None, :], 0.0)
    cross = cross.masked_fill(constant[..., None, :], 0.0)
    of_means = per_block(weight.double(), before).square() / count  # [N]
    energy = (stats.energy - of_means).clamp(min=0.0)
    return replace(stats, gram=gram, cross=cross, energy=energy, sums=None, mean_energy=float(of_means.sum()))


def per_block(weight: Tensor, vector: Tensor) -> Tensor:
    """``weight @ vector``; with ``[B, K]`` each block of N / B rows meets its own."""
    if vector.dim() == 1:
        return weight @ vector
    return (weight.view(vector.shape[0], -1, weight.shape[1]) @ vector[:, :, None]).flatten()


def best_bias(bias: Tensor, original: Tensor, weight: Tensor, stats: Stats) -> Tensor:
    """The bias with which ``weight``, on the quantized inputs, has the float layer's mean output."""
    assert stats.sums is not None
    before, after = stats.sums / float(max(stats.tokens, 1))
    change = per_block(original.double(), before) - per_block(weight.double(), after)
    return (bias.double() + change).to(bias.dtype)


def correct(weight: Tensor, bias: Tensor | None, stats: Stats, ridge: float) -> tuple[Tensor, Tensor | None]:
    """Float weight and bias that answer for the quantization of the inputs (the first half of ERQ, 2407.06794).

    ``min || X W^T - X~ V^T - 1 b ||^2 + ridge mean(diag H) || V - W ||^2``, in closed form from the Grams.
    """
    weight = weight.float().contiguous()
    if stats.cross is None:
        return weight, bias
    free = bias is not None and stats.sums is not None
    around = centred(stats, weight) if free else stats
    assert around.cross is not None
    changed = ridge_update(weight, around.gram, around.cross.mT.contiguous(), ridge=ridge)
    return changed, best_bias(bias, weight, changed, stats) if free else bias  # type: ignore[arg-type]


def solve(
    weight: Tensor,
    stats: Stats | None,
    scheme: Scheme,
    steps: Sequence[Step],
    ridge: float = 0.0,
    original: Tensor | None = None,
    bias: Tensor | None = None,
) -> Solution:
    """Quantize ``weight`` ``[N, K]``. Without statistics only rounding is possible, and no error is known.

    ``original``: the weight whose outputs are the target, where ``weight`` was corrected for its quantized inputs.
    ``bias``: of the original layer; with quantized inputs the solution has a new one.
    """
    weight = weight.float().contiguous()
    if stats is None:
        step = steps[-1]
        shrink = step.shrink if isinstance(step, RTN) else (1.0,)
        codes, scale, zero_point = rtn_quantize(
            weight,
            bits=scheme.weight_bits,
            group_size=scheme.group_size,
            grid=grid_of(step, scheme, False),
            shrink=shrink,
        )
        return Solution(*with_integer_scales((codes, scale, zero_point), weight, scheme))
    target = weight if original is None else original.float().contiguous()
    free = bias is not None and stats.sums is not None
    problem = Problem.of(weight, centred(stats, target) if free else stats, ridge, original=original)
    solution = run_auto(problem, scheme, steps[0]) if isinstance(steps[0], Auto) else run_steps(problem, scheme, steps)
    rounded = rtn_quantize(target, bits=scheme.weight_bits, group_size=scheme.group_size, grid=scheme.grid)
    solution.error_rtn = problem.relative_error(Candidate("rtn", *rounded), scheme.group_size)
    found = Candidate("result", solution.codes, solution.scale, solution.zero_point)
    solution.error = problem.relative_error(found, scheme.group_size)
    if free:
        values = dequantize(found.codes, found.scale, found.zero_point, group_size=scheme.group_size)
        solution.bias = best_bias(bias, target, values, stats)  # type: ignore[arg-type]
    solution.dead_channels = int((stats.gram.diagonal(dim1=-2, dim2=-1) == 0).sum())
    return solution


def run_auto(problem: Problem, scheme: Scheme, step: Auto) -> Solution:
    best = portfolio_quantize(
        problem.weight,
        problem.gram,
        bits=scheme.weight_bits,
        group_size=scheme.group_size,
        grid=scheme.grid,
        linear=problem.linear,
        effort=step.effort,
        midrise=not scheme.integer_scales,
    )
    info = best.info.tolist()
    found = with_integer_scales((best.codes, best.scale, best.zero_point), problem.weight, scheme, problem)
    return Solution(
        *found,
        STATUS[info[0]],
        info[2],
        winners=best.winners(),
        largest=best.largest,
    )


def run_steps(problem: Problem, scheme: Scheme, steps: Sequence[Step]) -> Solution:
    """[MagR, then] one solver, or GPTQ and then COMQ from its codes. The target stays the original weight's outputs."""
    start, linear = problem.weight, problem.linear
    after_magr = isinstance(steps[0], MagR)
    largest = None
    if isinstance(steps[0], MagR):
        start = run_magr(problem, scheme, steps[0])
        linear = times_gram(problem.weight, problem.gram) if linear is None else linear
        largest = (mean_largest(problem.weight), mean_largest(start))
    elif linear is not None and isinstance(steps[0], GPTQ):
        start = corrected(problem, steps[0].damp)
    found: tuple[Tensor, Tensor, Tensor] | None = None
    status, damping = 0, 0
    for step in steps[int(after_magr) :]:
        *found, info = run_step(step, start, problem.gram, linear, scheme, grid_of(step, scheme, after_magr), found)  # type: ignore
        status, damping = max(status, int(info[0])), max(damping, int(info[2]))
    assert found is not None
    rounds = isinstance(steps[-1], RTN)
    found = with_integer_scales(found, start if rounds else problem.weight, scheme, None if rounds else problem)
    winners = {method_name(steps): problem.weight.shape[0]}
    return Solution(*found, STATUS[status], damping, winners=winners, largest=largest)


def with_integer_scales(
    found: tuple[Tensor, Tensor, Tensor], weight: Tensor, scheme: Scheme, problem: Problem | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point with the scales that ``scheme.integer_scales`` asks for.

    The codes are found again, for ``problem`` by COMQ's sweeps from those there were, else by rounding ``weight``.
    """
    bits, group_size = scheme.weight_bits, scheme.group_size
    if not scheme.integer_scales or bits > 4:
        return found
    codes, scale, zero_point = found
    scale = integer_group_scales(codes, scale, zero_point, bits=bits, group_size=group_size)
    if problem is None:
        return uniform_quantize(weight, scale, zero_point, bits=bits, group_size=group_size), scale, zero_point
    codes, scale, zero_point, _ = comq_quantize(
        weight,
        problem.gram,
        bits=bits,
        group_size=group_size,
        linear=problem.linear,
        update_scale=False,
        codes=codes,
        scale=scale,
        zero_point=zero_point,
    )
    return codes, scale, zero_point


def run_step(
    step: Step,
    weight: Tensor,
    gram: Tensor,
    linear: Tensor | None,
    scheme: Scheme,
    grid: str,
    start: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, ...]:
    """One solver's (codes, scale, zero_point, info); ``start``: the codes of the solver before it."""
    bits, group_size = scheme.weight_bits, scheme.group_size
    if isinstance(step, COMQ):
        codes, scale, zero_point = start if start is not None else (None, None, None)
        return comq_quantize(
            weight,
            gram,
            bits=bits,
            group_size=group_size,
            grid=grid,
            linear=linear,
            sweeps=step.sweeps,
            order=step.order,
            update_scale=step.update_scale,
            shrink=step.shrink,
            init=step.init,
            codes=codes,
            scale=scale,
            zero_point=zero_point,
        )
    if isinstance(step, GPTQ):
        return gptq_quantize(
            weight,
            gram,
            bits=bits,
            group_size=group_size,
            grid=grid,
            shrink=step.shrink,
            damp=step.damp,
            block_size=step.block_size,
            order=step.order,
        )
    assert isinstance(step, RTN)
    rounded = rtn_quantize(weight, bits=bits, group_size=group_size, grid=grid, shrink=step.shrink)
    return *rounded, torch.zeros(3, dtype=torch.int64)


def run_magr(problem: Problem, scheme: Scheme, step: MagR) -> Tensor:
    mild = scheme.group_size > 0 or scheme.weight_bits > 3
    alpha = step.alpha if step.alpha is not None else (1e-4 if mild else 1e-3)
    return magr_preprocess(
        problem.weight, problem.gram, alpha=alpha, iters=step.iters, group_size=scheme.group_size, solver=step.solver
    )


def grid_of(step: Step, scheme: Scheme, after_magr: bool) -> str:
    """The step's own grid, else the scheme's; after MagR at 2 and 3 bits mid-rise, whose scales cannot be integers.

    MagR makes min = -max in nearly every row: an integral zero point puts each plateau entry half a step off the grid.
    """
    own = getattr(step, "grid", None)
    if own is not None:
        return str(own)
    integral = scheme.symmetric or scheme.integer_scales
    return "midrise" if after_magr and scheme.weight_bits <= 3 and not integral else scheme.grid


def mean_largest(weight: Tensor) -> float:
    return float(weight.float().abs().amax(1).mean())


def corrected(problem: Problem, damp: float) -> Tensor:
    """The weight whose outputs on the quantized inputs come nearest to the float outputs, with a ridge.

    ``W + (P - W H) (H + damp mean(diag H) I)^-1``. GPTQ, which has no linear term, quantizes this one instead.
    """
    weight, gram = problem.weight, problem.gram if problem.gram.dim() == 3 else problem.gram[None]
    assert problem.linear is not None
    missing = problem.linear - times_gram(weight, problem.gram)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    ridge = max(damp, 1e-6) * diagonal.mean(-1) + torch.finfo(torch.float32).tiny
    damped = gram.double() + torch.diag_embed(ridge[:, None].expand_as(diagonal).double())
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed.any()):
        return weight  # rank-deficient beyond the ridge: GPTQ's own damping deals with it
    blocks = missing.double().view(gram.shape[0], -1, weight.shape[1]).transpose(1, 2)
    change = torch.cholesky_solve(blocks, factor).transpose(1, 2).reshape_as(weight)
    return (weight + change.float()).contiguous()


def weight_histogram(weight: Tensor, found: Solution, scheme: Scheme) -> dict[str, Any]:
    """Of the float weights in units of their own grid: code k lies at k, whatever the row's scale."""
    levels = 2**scheme.weight_bits
    group = scheme.group_size or weight.shape[1]
    scale, zero_point = (
        t.to(weight.device).repeat_interleave(group, dim=1)[:, : weight.shape[1]]
        for t in (found.scale, found.zero_point)
    )
    low, high = -1.0, float(levels)
    position = (weight.float() / scale + zero_point).clamp(low, high)
    return {"low": low, "high": high, "levels": levels, "counts": torch.histc(position, BINS, low, high).int().tolist()}
