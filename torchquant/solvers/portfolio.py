"""The portfolio behind ``method="auto"``: several pipelines, and row by row the one with the lowest output error.

Rows are independent once the Gram is given, so choosing among finished candidates per row is never worse than its best
member. What pays differs from layer to layer: MagR at 2 and 3 bits with a mid-rise grid often, at 4 bits hardly ever.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .comq import comq_quantize
from .dequantize import dequantize, quantization_error
from .gptq import gptq_quantize
from .magr import magr_preprocess
from .rtn import rtn_quantize

# FISTA steps of each MagR run. 40 reach the objective of 200 ISTA steps (the published setting); more pay at 2 bits,
# and at 4 bits a mild MagR (alpha 1e-4) wins some rows. A step costs 2 N K^2 operations.
ITERS: dict[str, dict[int, tuple[int, ...]]] = {
    "fast": {2: (40,), 3: (40,)},
    "standard": {2: (40, 120), 3: (40,), 4: (20,)},
    "high": {2: (40, 150, 300), 3: (40, 150, 300), 4: (20, 40)},
}
SWEEPS = {"fast": 3, "standard": 3, "high": 6}


class Candidate(NamedTuple):
    """One finished quantization of all rows."""

    name: str
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    info: Tensor | None = None


@dataclass
class Best:
    """The best rows so far, and what they came from."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    error: Tensor  # [N] row objectives
    winner: Tensor  # [N] index into names
    names: list[str]
    infos: dict[str, Tensor] = field(default_factory=dict)
    largest: tuple[float, float] | None = None  # mean over rows of max |w|, before and after the longest MagR run

    def take(self, candidate: Candidate, error: Tensor) -> None:
        """Take the rows in which ``candidate`` is strictly better; a tie goes to the earlier, simpler one."""
        better = error < self.error
        self.codes[better] = candidate.codes[better]
        self.scale[better] = candidate.scale[better]
        self.zero_point[better] = candidate.zero_point[better]
        self.error = torch.where(better, error, self.error)
        self.winner[better] = len(self.names)
        self.add_name(candidate)

    def add_name(self, candidate: Candidate) -> None:
        self.names.append(candidate.name)
        if candidate.info is not None:
            self.infos[candidate.name] = candidate.info

    def winners(self) -> dict[str, int]:
        """Rows that each candidate won; those without a row are left out."""
        counts = self.winner.bincount(minlength=len(self.names)).tolist()
        return {name: count for name, count in zip(self.names, counts, strict=True) if count}

    @property
    def info(self) -> Tensor:
        """Of the candidates that won rows, the one in most trouble."""
        reports = [self.infos[name] for name in self.winners() if name in self.infos]
        return max(reports, key=lambda info: int(info[0])) if reports else torch.zeros(3, dtype=torch.int64)


def times_gram(weight: Tensor, gram: Tensor) -> Tensor:
    """``weight @ gram``; with a ``[B, K, K]`` Gram each block of N / B rows meets its own."""
    if gram.dim() == 2:
        return weight.to(gram.dtype) @ gram
    blocks = weight.to(gram.dtype).view(gram.shape[0], -1, weight.shape[1])
    return torch.bmm(blocks, gram).view_as(weight)


def row_objective(
    weight: Tensor, gram: Tensor, linear: Tensor | None, candidate: Candidate, group_size: int = 0
) -> Tensor:
    """``[N]`` output errors up to a constant of the row: ``D H D^T`` with ``D = Q - W``, plus ``2 D (W H - P)^T``.

    The second term is zero unless ``linear`` P is given. Written around W, both terms are small, so nothing cancels.
    """
    _, codes, scale, zero_point, _ = candidate
    error = quantization_error(weight, gram, codes, scale, zero_point, group_size=group_size)
    if linear is None:
        return error
    change = dequantize(codes, scale, zero_point, group_size=group_size) - weight
    return error + 2 * (change * (times_gram(weight.float(), gram) - linear)).sum(1)


def candidates(
    weight: Tensor,
    gram: Tensor,
    linear: Tensor,
    *,
    bits: int,
    group_size: int,
    grid: str,
    effort: str,
    midrise: bool,
    largest: list[float],
) -> Iterator[Candidate]:
    """Every member, simple ones first. ``linear`` is the target of all; ``largest`` receives MagR's effect."""
    same: dict[str, Any] = {"bits": bits, "group_size": group_size}
    sweeps = SWEEPS[effort]
    yield Candidate("rtn", *rtn_quantize(weight, grid=grid, **same))
    yield from gptq_then_comq("", weight, gram, linear, grid, sweeps, same)
    if effort != "fast":
        yield Candidate("comq", *comq_quantize(weight, gram, grid=grid, linear=linear, sweeps=sweeps, **same))
    low = bits <= 3
    alpha = 1e-3 if low and group_size == 0 else 1e-4
    grids = [grid] if grid == "symmetric" or not midrise else ["midrise", grid] if effort == "high" else ["midrise"]
    runs = ITERS[effort].get(bits, ())
    for iters in runs:
        small = magr_preprocess(weight, gram, alpha=alpha, iters=iters, group_size=group_size, solver="fista")
        largest[:] = [float(w.float().abs().amax(1).mean()) for w in (weight, small)]
        for after in grids:
            label = f"magr{iters}+" if after == grids[0] else f"magr{iters}/{after}+"
            yield from gptq_then_comq(label, small, gram, linear, after, sweeps, same)
            # Another start than GPTQ's, worth its search over scales only where rows differ most.
            if effort == "high" or (effort == "standard" and low and iters == runs[-1]):
                swept = comq_quantize(small, gram, grid=after, linear=linear, sweeps=sweeps, **same)
                yield Candidate(f"{label}comq", *swept[:3])


def gptq_then_comq(
    label: str, weight: Tensor, gram: Tensor, linear: Tensor, grid: str, sweeps: int, same: dict[str, Any]
) -> Iterator[Candidate]:
    codes, scale, zero_point, info = gptq_quantize(weight, gram, grid=grid, **same)
    yield Candidate(f"{label}gptq", codes, scale, zero_point, info)
    start: dict[str, Any] = {"codes": codes, "scale": scale, "zero_point": zero_point}
    swept = comq_quantize(weight, gram, grid=grid, linear=linear, sweeps=sweeps, **same, **start)
    yield Candidate(f"{label}gptq+comq", *swept[:3], info)


def portfolio_quantize(
    weight: Tensor,
    gram: Tensor,
    *,
    bits: int,
    group_size: int = 0,
    grid: str = "asymmetric",
    linear: Tensor | None = None,
    effort: str = "standard",
    midrise: bool = True,
) -> Best:
    """The best of several pipelines, row by row, judged by the output error against the original weight.

    Members: rtn, gptq (shrink searched), gptq+comq, comq (from "standard" on), and up to 4 bits the same after
    MagR, on a mid-rise grid (``grid="symmetric"``: on that one). "high" adds longer MagR runs and both grids.

    Args:
        weight: ``[N, K]`` float32, float16 or bfloat16.
        gram: ``[K, K]``, or ``[B, K, K]``: B problems of N / B consecutive rows each.
        bits, group_size: as for :func:`rtn_quantize`.
        grid: ``"asymmetric"`` or ``"symmetric"``.
        linear: target P ``[N, K]``, default ``weight @ gram``.
        effort: ``"fast"``, ``"standard"`` or ``"high"``.
        midrise: False: ``grid`` after MagR too.
    """
    weight = weight.float().contiguous()
    target = times_gram(weight, gram).float() if linear is None else linear
    largest: list[float] = []
    best: Best | None = None
    same: dict[str, Any] = {"bits": bits, "group_size": group_size, "grid": grid, "effort": effort}
    for member in candidates(weight, gram, target, **same, midrise=midrise, largest=largest):
        error = row_objective(weight, gram, linear, member, group_size)
        if best is None:
            first = torch.zeros(weight.shape[0], dtype=torch.int64, device=weight.device)
            best = Best(member.codes, member.scale, member.zero_point, error, first, [])
            best.add_name(member)
        else:
            best.take(member, error)
    assert best is not None
    best.largest = (largest[0], largest[1]) if largest else None
    return best
