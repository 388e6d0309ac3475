"""The peers: plain float32 PyTorch, written from the papers' descriptions of their algorithms.

Shapes: N outputs, K inputs, T samples. value = (code - zero) * scale with scale and zero [N].
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    scale: Tensor  # [N]
    zero: Tensor  # [N]
    top: int  # largest code


def minmax_grid(weight: Tensor, bits: int, shrink: float = 1.0) -> Grid:
    top = 2**bits - 1
    low, high = weight.amin(1), weight.amax(1)
    scale = (high - low) / top
    return Grid(scale * shrink, torch.round(-low / scale), top)


def to_codes(x: Tensor, grid: Grid) -> Tensor:
    """Nearest codes of x: [N], or [N, K] with the rows first."""
    shape = (-1,) + (1,) * (x.dim() - 1)
    return torch.round(x / grid.scale.view(shape) + grid.zero.view(shape)).clamp(0, grid.top)


# --- COMQ (arXiv 2403.07134) ---


def shared_order(weight: Tensor, gram: Tensor) -> Tensor:  # [N, K]
    return gram.diagonal().argsort(descending=True, stable=True).expand_as(weight)


def greedy_order(weight: Tensor, gram: Tensor) -> Tensor:  # [N, K]
    return (weight.abs() * gram.diagonal().sqrt()).argsort(dim=1, descending=True, stable=True)


def comq_data_space(
    weight: Tensor,  # [N, K]
    x: Tensor,  # [T, K]
    grid: Grid,
    order: Tensor,  # [N, K] order of the coordinates of each row
    coordinates: int,
    forced: Tensor | None = None,  # [N, K] codes to follow, so that each single decision can be judged
) -> tuple[Tensor, Tensor]:
    """One sweep over the first `coordinates` of each row's order, as published: the residual of every sample is carried
    along, each row gathers its own input channel, the level is the nearest of all. Codes, unrounded codes [N, K]."""
    levels = torch.arange(grid.top + 1, dtype=weight.dtype)
    table = (levels - grid.zero[:, None]) * grid.scale[:, None]  # [N, L]
    values, codes, position = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    residual = torch.zeros(x.shape[0], weight.shape[0], dtype=weight.dtype)  # [T, N] X W^T - X Q^T; starts from Q = W
    row = torch.arange(weight.shape[0])
    for t in range(coordinates):
        j = order[:, t]
        channel = x[:, j]  # [T, N]
        without = residual + channel * values[row, j]
        u = (channel * without).sum(0) / (channel * channel).sum(0)
        position[row, j] = u / grid.scale + grid.zero
        code = (u[:, None] - table).abs().argmin(1) if forced is None else forced[row, j].long()
        codes[row, j] = code.to(weight.dtype)
        values[row, j] = table[row, code]
        residual = without - channel * values[row, j]
    return codes, position


def comq_shared(weight: Tensor, gram: Tensor, grid: Grid, tuned: bool) -> Tensor:
    """One sweep in Gram space, one order for all rows. Transposed, so that a step touches contiguous memory, and only
    what lies behind the coordinate is updated: by addr_ or, tuned, by the faster addcmul_. Codes [N, K]."""
    order = gram.diagonal().argsort(descending=True, stable=True)
    h = gram[order][:, order].contiguous()
    q = weight.T[order].contiguous()  # [K, N]
    g = torch.zeros_like(q)
    codes = torch.empty_like(q)
    for j in range(h.shape[0]):
        code = to_codes(q[j] + g[j] / h[j, j], grid)
        change = (code - grid.zero) * grid.scale - q[j]
        codes[j] = code
        if tuned:
            g[j + 1 :].addcmul_(h[j, j + 1 :, None], change, value=-1)
        else:
            g[j + 1 :].addr_(h[j, j + 1 :], change, alpha=-1)
    return torch.empty_like(codes).index_copy_(0, order, codes).T


def comq_greedy(weight: Tensor, gram: Tensor, grid: Grid, coordinates: int) -> Tensor:
    """One sweep in Gram space over the first `coordinates` of each row's own order. Codes [N, K]."""
    order, diagonal = greedy_order(weight, gram), gram.diagonal()
    q, g, codes = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    row = torch.arange(weight.shape[0])
    for t in range(coordinates):
        j = order[:, t]
        code = to_codes(q[row, j] + g[row, j] / diagonal[j], grid)
        value = (code - grid.zero) * grid.scale
        g.addcmul_((value - q[row, j])[:, None], gram[j], value=-1)
        q[row, j], codes[row, j] = value, code
    return codes


def comq_search(weight: Tensor, gram: Tensor, bits: int, factors: Sequence[float], sweeps: int) -> Tensor:
    """Several shrink factors, each with several sweeps in the shared order and a scale step after each; the best per
    row by the objective, which is returned: [N]."""
    order = gram.diagonal().argsort(descending=True, stable=True)
    h, w = gram[order][:, order].contiguous(), weight.T[order].contiguous()  # w [K, N]
    best_codes, best_scale = torch.zeros_like(w), torch.ones(weight.shape[0])
    best = torch.full((weight.shape[0],), torch.inf)
    for factor in factors:
        grid = minmax_grid(weight, bits, factor)
        codes, scale = sweep_with_scale(w, h, grid, sweeps)
        error = (codes - grid.zero) * scale - w
        objective = (error * (h @ error)).sum(0)
        better = objective < best
        best_codes, best_scale = torch.where(better, codes, best_codes), torch.where(better, scale, best_scale)
        best = torch.minimum(objective, best)
    return best


def sweep_with_scale(w: Tensor, h: Tensor, grid: Grid, sweeps: int) -> tuple[Tensor, Tensor]:
    """Transposed (w [K, N]) and in visiting order. Codes [K, N], scale [N]."""
    target, q, codes = h @ w, w.clone(), torch.empty_like(w)
    for sweep in range(sweeps):
        g = target - h @ q
        for j in range(h.shape[0]):
            codes[j] = to_codes(q[j] + g[j] / h[j, j], grid)
            value = (codes[j] - grid.zero) * grid.scale
            behind = j + 1 if sweep == 0 else 0
            g[behind:].addcmul_(h[j, behind:, None], value - q[j], value=-1)
            q[j] = value
        centred = codes - grid.zero
        grid = grid._replace(scale=(centred * target).sum(0) / (centred * (h @ centred)).sum(0))
        q = centred * grid.scale
    return codes, grid.scale


# --- GPTQ (arXiv 2210.17323) ---


def gptq(weight: Tensor, gram: Tensor, grid: Grid, damp: float = 0.01, block: int = 128) -> Tensor:
    """The column loop with lazy blocks. Codes [N, K]."""
    columns = weight.shape[1]
    damped = gram + damp * gram.diagonal().mean() * torch.eye(columns)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    w, codes = weight.clone(), torch.empty_like(weight)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        here, u = w[:, first:last].clone(), upper[first:last, first:last]
        errors = torch.empty_like(here)
        for j in range(last - first):
            code = to_codes(here[:, j], grid)
            codes[:, first + j] = code
            errors[:, j] = (here[:, j] - (code - grid.zero) * grid.scale) / u[j, j]
            here[:, j:] -= errors[:, j, None] * u[j, j:]
        w[:, last:] -= errors @ upper[first:last, last:]
    return codes


# --- MagR (arXiv 2406.00800) ---


def prox_by_sort(z: Tensor, radius: float) -> Tensor:
    """prox of radius * max|z| per row, by Moreau: z minus its projection on the l1 ball, found by a sort."""
    size = z.abs()
    falling = size.sort(dim=1, descending=True).values
    count = torch.arange(1, z.shape[1] + 1, dtype=z.dtype)
    threshold = (falling.cumsum(1) - radius) / count
    active = (falling > threshold).sum(1, keepdim=True).clamp_min(1)
    level = threshold.gather(1, active - 1).clamp_min(0)
    outside = size.sum(1, keepdim=True) > radius
    projection = torch.where(outside, z.sign() * (size - level).clamp_min(0), z)
    return z - projection


def largest_eigenvalue(gram: Tensor, steps: int = 50) -> Tensor:
    vector = torch.ones(gram.shape[0], dtype=gram.dtype)
    for _ in range(steps):
        vector = gram @ (vector / vector.norm())
    return vector.norm()


def largest_by_svd(x: Tensor) -> Tensor:
    """What the released code computes the whole decomposition for."""
    return torch.linalg.svd(x, full_matrices=True).S[0].square()


def magr_ista(weight: Tensor, gram: Tensor, largest: Tensor, alpha: float, iters: int) -> Tensor:
    normal = gram / largest
    v = weight.clone()
    for _ in range(iters):
        v = prox_by_sort(v - (v - weight) @ normal, alpha)
    return v
