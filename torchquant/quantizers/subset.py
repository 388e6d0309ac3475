"""Subset quantization: the levels are the best few elements of a universal set (SQ, ECCV 2022; DFSQ, 2305.05888)."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

SELECTORS = ("exact", "kmeans")
UNIVERSES = ("dfsq", "subsetq", "subsetq_signed")
# What a shift of each of DFSQ's four, SQ's two shifters can give: 0 and powers of two.
DFSQ_EXPONENTS = ((0, 1, 5), (0, 2, 6), (0, 3, 7), (0, 4, 8))
SUBSETQ_EXPONENTS = ((0, 1, 3), (0, 2, 4))
# The published k-means form.
RESTARTS, ITERATIONS, SMALLEST_MOVE = 5, 100, 1e-3
NEAREST_BLOCK = 1 << 14  # values whose distances to all centres are held at once


def subset_universe(name: str) -> Tensor:
    """The published universal sets, rising, float32.

    ``"dfsq"``: ``+-(a + b + c + d) / 4`` with a from {1, 2**-1, 2**-5, 0}, b from {1, 2**-2, 2**-6, 0}, c from
    {1, 2**-3, 2**-7, 0}, d from {1, 2**-4, 2**-8, 0}: 377 values, multiples of 2**-10 in [-1, 1].
    ``"subsetq"``: SQ's magnitudes ``(p + q) / 2``, p from {1, 2**-1, 2**-3, 0}, q from {1, 2**-2, 2**-4, 0}: 15 values,
    multiples of 2**-5 in [0, 1], for a quantizer that keeps the sign apart. ``"subsetq_signed"``: both signs, 29.
    """
    if name not in UNIVERSES:
        raise ValueError(f"subset_universe: name must be one of {', '.join(UNIVERSES)}, got {name!r}")
    exponents = DFSQ_EXPONENTS if name == "dfsq" else SUBSETQ_EXPONENTS
    terms = [[0.0, *(2.0**-e for e in shifter)] for shifter in exponents]
    magnitudes = {sum(choice) / len(terms) for choice in itertools.product(*terms)}
    values = magnitudes if name == "subsetq" else magnitudes | {-m for m in magnitudes}
    return torch.tensor(sorted(values))


def subset_select(
    x: Tensor, universe: Tensor, *, levels: int, axis: int | None = None, keep_zero: bool = True
) -> tuple[Tensor, Tensor]:
    """Choose the ``levels`` elements of a universe with the least squared error when each x goes to the nearest one.

    Exact: a shortest path of ``levels`` elements over the universe, where the cost of two neighbours follows from the
    number and the sum of the values below their midpoint. One pass over x when the elements are multiples of 2**-s,
    s <= 16, else a sort; then ``O(levels U log U)``, whatever the number of values.

    Args:
        x: float32, float16 or bfloat16, any shape; or its histogram, float64 ``[3, B]`` or ``[C, 3, B]``
            (`torchquant.statistics.new_histogram`), whose bins then go as a whole to the level nearest to their mean.
        universe: float32 ``[U]``, rising.
        levels: 1 .. min(U, 256).
        axis: choose for each of the C channels along it; None: for all values together.
        keep_zero: zero is one of the levels if the universe has it.

    Returns:
        levels float32 ``[L]``, rising, and their squared error float64 ``[]``; with channels ``[C, L]`` and ``[C]``.

    Raises:
        ValueError: a universe that does not rise, wrong levels, axis, shapes or device, a NaN or Inf, an empty
            histogram. TypeError: wrong dtype.
    """
    return torch.ops.torchquant.subset_select(x, universe, levels=levels, axis=axis, keep_zero=keep_zero)


def subset_quantize(x: Tensor, levels: Tensor, *, axis: int = -1) -> Tensor:
    """Index of the nearest level, the lower one in a tie; codes uint8 in x's shape.

    Exact for any rising levels: up to 16 by comparisons, more by a table of 4096 entries over ``ceil(2048 x)`` when
    they are multiples of 2**-10 in [-1, 1], else by bisection.

    Args:
        x: float32, float16 or bfloat16, any shape.
        levels: float32 ``[L]``, or ``[C, L]`` for C channels along ``axis``, rising (looked at on the CPU only), equal
            neighbours allowed; L = 1 .. 256.
        axis: the channels of x; only for ``[C, L]``.

    Raises:
        ValueError: wrong shapes, device or axis, levels that fall, a NaN or Inf. TypeError: wrong dtype.
    """
    return torch.ops.torchquant.subset_quantize(x, levels, axis=axis)


def subset_dequantize(codes: Tensor, levels: Tensor, *, axis: int = -1) -> Tensor:
    """``levels[codes]``, float32; a code without a level gives NaN. Arguments as for `subset_quantize`."""
    return torch.ops.torchquant.subset_dequantize(codes, levels, axis=axis)


# --- what the levels are compared with ---


def subset_select_kmeans(
    x: Tensor, universe: Tensor, *, levels: int, restarts: int = RESTARTS, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """The published selection, for comparison: 5 times k-means from random samples (at most 100 steps, one centre kept
    at zero, an empty cluster starts again at a random sample), centres moved to the nearest element of the universe.

    Two centres may end at one element, and the result is a local optimum. Arguments and results as for `subset_select`;
    ``restarts``: the best of so many runs; ``generator`` (on the CPU): of the samples, None = seeded with 0.
    """
    values = x.detach().float().flatten()
    if not values.numel():
        raise ValueError("subset_select_kmeans: x must hold at least one value, got none")
    generator = generator or torch.Generator().manual_seed(0)
    best, least = values.new_empty(0), values.new_tensor(torch.inf, dtype=torch.float64)
    for _ in range(restarts):
        centres = _lloyd(values, levels - 1, generator)
        snapped = universe[_nearest(centres, universe)].sort().values
        error = _squared_error(values, snapped)
        if error < least:
            best, least = snapped, error
    return best, least


def _lloyd(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` centres that move and one at zero, which is the last."""

    def samples(number: int) -> Tensor:
        return values[torch.randint(len(values), (number,), generator=generator).to(values.device)]

    centres = torch.cat([samples(count), values.new_zeros(1)])
    for _ in range(ITERATIONS):
        nearest = torch.cat([_nearest(part, centres) for part in values.split(NEAREST_BLOCK)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, values)
        counts = torch.bincount(nearest, minlength=count + 1)
        moved = torch.where(counts > 0, sums / counts.clamp_min(1), samples(count + 1))
        moved[-1] = 0
        move = (moved - centres).abs().amax()
        centres = moved
        if move < SMALLEST_MOVE:
            break
    return centres


def _nearest(values: Tensor, centres: Tensor) -> Tensor:
    return (values[:, None] - centres).abs().argmin(1)


def _squared_error(x: Tensor, levels: Tensor, axis: int | None = None) -> Tensor:
    along = -1 if axis is None else axis
    values = subset_dequantize(subset_quantize(x, levels, axis=along), levels, axis=along)
    errors = (values.double() - x.double()).square()
    return errors.sum() if axis is None else errors.movedim(axis, 0).flatten(1).sum(1)


def uniform_levels(x: Tensor, bits: int, *, axis: int | None = None) -> Tensor:
    """``2**bits`` levels at equal distances over the range of x, zero among them: ``[L]``, or ``[C, L]`` for the
    channels along ``axis``."""
    rows = x.float().reshape(1, -1) if axis is None else x.float().movedim(axis, 0).flatten(1)
    low, high = rows.amin(1, keepdim=True).clamp(max=0.0), rows.amax(1, keepdim=True).clamp(min=0.0)
    steps = 2**bits - 1
    scale = (high - low) / steps
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    levels = (torch.arange(steps + 1, device=x.device) - torch.round(-low / scale)) * scale
    return levels[0] if axis is None else levels


@dataclass(frozen=True)
class SubsetChoice:
    """The levels that serve x best, and what else was tried; with channels, one entry for each."""

    levels: Tensor  # [L] or [C, L], rising
    uniform: Tensor  # bool [] or [C]: uniform levels were better than the subset's
    subset_error: Tensor  # squared, float64 [] or [C]
    uniform_error: Tensor

    @property
    def error(self) -> Tensor:
        """Squared, of the levels."""
        return torch.where(self.uniform, self.uniform_error, self.subset_error)

    @property
    def name(self) -> str:
        """ "subset" or "uniform", or how many channels are uniform."""
        count = int(self.uniform.sum())
        if count in (0, self.uniform.numel()):
            return "uniform" if count else "subset"
        return f"subset, {count} of {self.uniform.numel()} uniform"


def choose_subset(
    x: Tensor,
    *,
    bits: int,
    universe: Tensor | None = None,
    axis: int | None = None,
    selector: str = "exact",
    fallback: bool = True,
    generator: torch.Generator | None = None,
) -> SubsetChoice:
    """Select ``2**bits`` levels, or take uniform ones where their squared error is lower (often from 6 bits on).

    Args:
        x: normalized to [-1, 1]; float32, float16 or bfloat16.
        bits: 2..8.
        universe: at least ``2**bits`` elements; None: ``subset_universe("dfsq")``.
        axis: choose for each channel along it; None: for all values together.
        selector: ``"exact"`` or the published ``"kmeans"``.
        fallback: False: the subset's levels in any case.
        generator: of k-means.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"choose_subset: bits must be 2..8, got {bits}")
    if selector not in SELECTORS:
        raise ValueError(f"choose_subset: selector must be one of {', '.join(SELECTORS)}, got {selector!r}")
    if not x.numel():
        raise ValueError("choose_subset: x must hold at least one value, got none")
    elements = (subset_universe("dfsq") if universe is None else universe).to(x.device)
    if selector == "exact":
        levels, error = subset_select(x, elements, levels=2**bits, axis=axis)
    else:
        rows = [x] if axis is None else list(x.unbind(axis))
        found = [subset_select_kmeans(row, elements, levels=2**bits, generator=generator) for row in rows]
        levels, error = (torch.stack(parts) for parts in zip(*found, strict=True))
        if axis is None:
            levels, error = levels[0], error[0]
    even = uniform_levels(x, bits, axis=axis)
    even_error = _squared_error(x, even, axis)
    uniform = (even_error < error) & fallback
    return SubsetChoice(torch.where(uniform[..., None], even, levels), uniform, error, even_error)


def subset_fit_scale(
    x: Tensor, universe: Tensor, *, levels: int, iters: int = 100, keep_zero: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """SQ's alternation: levels for a scale, then the scale ``<q, x> / <q, q>`` for the quantized values q, from
    ``scale = max|x| / max|universe|`` until the squared error stops falling. It never rises.

    Args:
        x: as for `subset_select`; SQ takes magnitudes, with ``subset_universe("subsetq")`` and the sign apart.
        universe, levels, keep_zero: as for `subset_select`.
        iters: alternations at most.

    Returns:
        scale float32 ``[]``, levels ``[L]`` (x is near ``scale * levels``) and the squared error, float64 ``[]``.
    """
    values = x.float()
    if not values.numel():
        raise ValueError("subset_fit_scale: x must hold at least one value, got none")
    scale = values.abs().amax() / universe.abs().amax()
    if not scale > 0:  # all zero: any scale is exact
        scale = torch.ones_like(scale)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for _ in range(iters):
        normal = values / scale
        chosen, _ = subset_select(normal, universe, levels=levels, keep_zero=keep_zero)
        q = subset_dequantize(subset_quantize(normal, chosen), chosen).double()
        energy = q.square().sum()
        if energy > 0:  # else no scale makes a difference
            scale = ((q * values.double()).sum() / energy).float()
        error = (q * scale.double() - values.double()).square().sum()
        if best is not None and not error < best[2]:
            break
        best = scale, chosen, error
        if not scale > 0:
            break
    assert best is not None
    return best


@torch.library.register_fake("torchquant::subset_select")
def _(x, universe, *, levels, axis=None, keep_zero=True):  # type: ignore[no-untyped-def]
    channels = [x.shape[0]] if x.dtype == torch.float64 and x.dim() == 3 else []
    if x.dtype != torch.float64 and axis is not None:
        channels = [x.shape[axis]]
    chosen = x.new_empty((*channels, levels), dtype=torch.float32)
    return chosen, x.new_empty(channels, dtype=torch.float64)


@torch.library.register_fake("torchquant::subset_quantize")
def _(x, levels, *, axis=-1):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=torch.uint8)


@torch.library.register_fake("torchquant::subset_dequantize")
def _(codes, levels, *, axis=-1):  # type: ignore[no-untyped-def]
    return codes.new_empty(codes.shape, dtype=torch.float32)
