"""One layer: run the steps of a method on its weight and statistics, and say how well that went."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .collect import Stats
from .config import COMQ, GPTQ, RTN, Auto, MagR, Scheme, Step, method_name
from .solvers import comq_quantize, gptq_quantize, magr_preprocess, rtn_quantize
from .solvers.portfolio import Candidate, portfolio_quantize, row_objective, times_gram

STATUS = ("ok", "damped", "rounded")  # by the operators' info[0]
NAN = float("nan")


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
    def of(cls, weight: Tensor, stats: Stats, ridge: float = 0.0) -> "Problem":
        added = ridge * stats.gram.diagonal(dim1=-2, dim2=-1).mean(-1)  # [] or [B]
        gram = plus_diagonal(stats.gram, added)
        own = times_gram(weight, gram)
        energy = float((own.double() * weight.double()).sum())
        if stats.cross is None or stats.energy is None:
            return cls(weight, gram, None, 0.0, energy)
        linear = times_gram(weight, plus_diagonal(stats.cross, added))
        squares = weight.double().square().view(added.numel(), -1).sum(1)  # [B]
        floats = float(stats.energy.sum()) + float((squares * added.double()).sum())
        constant = floats - 2 * float((linear.double() * weight.double()).sum()) + energy
        return cls(weight, gram, linear, constant, floats)

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


def solve(weight: Tensor, stats: Stats | None, scheme: Scheme, steps: Sequence[Step], ridge: float = 0.0) -> Solution:
    """Quantize ``weight`` ``[N, K]``. Without statistics only rounding is possible, and no error is known."""
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
        return Solution(codes, scale, zero_point)
    problem = Problem.of(weight, stats, ridge)
    solution = run_auto(problem, scheme, steps[0]) if isinstance(steps[0], Auto) else run_steps(problem, scheme, steps)
    rounded = rtn_quantize(weight, bits=scheme.weight_bits, group_size=scheme.group_size, grid=scheme.grid)
    solution.error_rtn = problem.relative_error(Candidate("rtn", *rounded), scheme.group_size)
    found = Candidate("result", solution.codes, solution.scale, solution.zero_point)
    solution.error = problem.relative_error(found, scheme.group_size)
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
    )
    info = best.info.tolist()
    return Solution(
        best.codes,
        best.scale,
        best.zero_point,
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
    winners = {method_name(steps): problem.weight.shape[0]}
    return Solution(*found, STATUS[status], damping, winners=winners, largest=largest)


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
    """The step's own grid, else the scheme's; after MagR at 2 and 3 bits mid-rise.

    MagR makes min = -max in nearly every row: an integral zero point puts each plateau entry half a step off the grid.
    """
    own = getattr(step, "grid", None)
    if own is not None:
        return str(own)
    return "midrise" if after_magr and scheme.weight_bits <= 3 and not scheme.symmetric else scheme.grid


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
