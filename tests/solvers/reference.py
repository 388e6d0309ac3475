"""The weight solvers in float64 PyTorch, written from the papers and sharing no code with the operators. Loops over
coordinates are plain; rows are a batch dimension.

Every loop takes `forced` codes: then it follows the operator's decisions instead of its own and only reports the
position x of the unconstrained minimiser on the code axis, so that each single decision can be checked (see
`assert_nearest`)."""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32_EPS = 2.0**-24
SMALLEST_NORMAL = 2.0**-126


@dataclass
class Problem:
    """A row problem min (w - q) H (w - q)^T, or min q H q^T - 2 P q^T when a linear term P is given."""

    weight: Tensor  # [N, K]
    gram: Tensor  # [K, K]
    bits: int
    group_size: int = 0
    grid: str = "asymmetric"
    linear: Tensor | None = None  # [N, K]

    def __post_init__(self) -> None:
        self.weight, self.gram = self.weight.double().cpu(), self.gram.double().cpu()
        self.linear = self.weight @ self.gram if self.linear is None else self.linear.double().cpu()

    @property
    def top(self) -> int:
        return 2**self.bits - 1

    @property
    def dead(self) -> Tensor:
        return self.gram.diagonal() == 0

    def expand(self, per_group: Tensor) -> Tensor:
        return expand(per_group, self.weight.shape[1], self.group_size)

    def values(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return dequantize(codes, scale, zero_point, self.group_size)

    def objective(self, values: Tensor) -> Tensor:  # [N]
        if torch.equal(self.linear, self.weight @ self.gram):
            return objective(self.weight, self.gram, values)
        return ((values @ self.gram - 2 * self.linear) * values).sum(1)


def expand(per_group: Tensor, columns: int, group_size: int) -> Tensor:
    """[N, G] -> [N, K]: each column's own scale or zero point."""
    group = torch.arange(columns) // (group_size or max(columns, 1))
    return per_group.double().cpu()[:, group]


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, group_size: int = 0) -> Tensor:
    columns = codes.shape[1]
    return (codes.double().cpu() - expand(zero_point, columns, group_size)) * expand(scale, columns, group_size)


def objective(weight: Tensor, gram: Tensor, values: Tensor) -> Tensor:  # [N]
    error = weight.double().cpu() - values
    return ((error @ gram.double().cpu()) * error).sum(1)


def grid_of(weight: Tensor, bits: int, group_size: int, grid: str) -> tuple[Tensor, Tensor]:
    """scale and zero_point [N, G] that span min..max of each group; a group of one value v represents it exactly."""
    top, half = 2**bits - 1, 2 ** (bits - 1)
    scales, zeros = [], []
    for part in weight.double().cpu().split(group_size or weight.shape[1], dim=1):
        low, high = part.amin(1), part.amax(1)
        largest = part.abs().amax(1)
        if grid == "asymmetric":
            scale = (high - low) / top
            zero = torch.round(-low / torch.where(scale > 0, scale, 1))
        else:
            scale = largest / (top / 2)
            zero = torch.full_like(scale, half if grid == "symmetric" else top / 2)
        constant, nothing = low == high, largest < SMALLEST_NORMAL * top
        exact_zero = {"asymmetric": (low < 0).double(), "symmetric": zero, "midrise": zero}[grid]
        scale = torch.where(constant, largest * (2 if grid == "midrise" else 1), scale)
        zero = torch.where(constant, exact_zero, zero)
        scales.append(torch.where(nothing, 1.0, scale))
        zeros.append(torch.where(nothing, 0.0 if grid == "asymmetric" else float(half), zero))
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def position(values: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
    """Where values lie on the code axis, clamped to the codes that exist; the nearest code is this, rounded."""
    return (values / scale + zero_point).clamp(0, top)


def rtn(weight: Tensor, bits: int, group_size: int, grid: str) -> tuple[Tensor, Tensor, Tensor]:
    scale, zero = grid_of(weight, bits, group_size, grid)
    delta, offset = (expand(t, weight.shape[1], group_size) for t in (scale, zero))
    return torch.round(position(weight.double().cpu(), delta, offset, 2**bits - 1)), scale, zero


def visiting_order(problem: Problem, order: str, block: int = 128) -> Tensor:  # [N, K]
    """shared: diag(H) falling. greedy: |w_ij| sqrt(H_jj) falling, per row. semi: shared blocks, greedy inside each."""
    rows, columns = problem.weight.shape
    diagonal = problem.gram.diagonal()
    shared = torch.argsort(diagonal, descending=True, stable=True).expand(rows, columns)
    importance = problem.weight.abs() * diagonal.sqrt()
    if order == "cyclic":
        return torch.arange(columns).expand(rows, columns)
    if order == "shared":
        return shared
    if order == "greedy":
        return torch.argsort(importance, dim=1, descending=True, stable=True)
    parts = shared.split(block, dim=1)
    inside = [torch.argsort(importance.gather(1, part), dim=1, descending=True, stable=True) for part in parts]
    return torch.cat([part.gather(1, rank) for part, rank in zip(parts, inside, strict=True)], dim=1)


@dataclass
class Sweep:
    values: Tensor  # [N, K] after the sweep
    codes: Tensor  # [N, K]
    x: Tensor  # [N, K] position of each coordinate's minimiser when it was visited, clamped
    gain: Tensor  # [N, K] by how much that step lowered the row's objective


def comq_sweep(
    problem: Problem, values: Tensor, scale: Tensor, zero_point: Tensor, order: Tensor, forced: Tensor | None = None
) -> Sweep:
    """One pass over all coordinates in Gram form: u = q + g / H_jj, q <- nearest level, g -= change * H_j."""
    gram, values = problem.gram, values.clone()
    g = problem.linear - values @ gram
    delta, zero = problem.expand(scale), problem.expand(zero_point)
    diagonal = gram.diagonal()
    x = position(problem.weight, delta, zero, problem.top)  # what dead channels keep
    codes, gain = torch.round(x) if forced is None else forced.double().cpu().clone(), torch.zeros_like(x)
    row = torch.arange(values.shape[0])
    for j in order.T:
        live = diagonal[j] > 0
        u = values[row, j] + g[row, j] / torch.where(live, diagonal[j], 1)
        here = position(u, delta[row, j], zero[row, j], problem.top)
        x[row, j] = torch.where(live, here, x[row, j])
        if forced is None:
            codes[row, j] = torch.where(live, torch.round(here), codes[row, j])
        new = torch.where(live, (codes[row, j] - zero[row, j]) * delta[row, j], values[row, j])
        change = new - values[row, j]
        gain[row, j] = 2 * change * g[row, j] - change.square() * diagonal[j]
        g -= change[:, None] * gram[j]
        values[row, j] = new
    return Sweep(values, codes, x, gain)


def scale_step(problem: Problem, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The exact minimiser over each scale in turn, the others held: <c_g, P - Q_rest H> / (c_g H_gg c_g)."""
    scale = scale.double().cpu().clone()
    for index in range(scale.shape[1]):
        c = codes.double().cpu() - problem.expand(zero_point)
        group = torch.arange(c.shape[1]) // (problem.group_size or c.shape[1]) == index
        mine = torch.where(group, c, 0.0)
        rest = torch.where(group, 0.0, c) * problem.expand(scale)
        numerator = (mine * (problem.linear - rest @ problem.gram)).sum(1)
        denominator = ((mine @ problem.gram) * mine).sum(1)
        usable = (numerator > 0) & (denominator > 0)
        scale[:, index] = torch.where(usable, numerator / torch.where(usable, denominator, 1), scale[:, index])
    return scale


def finish(problem: Problem, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Dead channels are rounded on the final scale."""
    x = position(problem.weight, problem.expand(scale), problem.expand(zero_point), problem.top)
    return torch.where(problem.dead, torch.round(x), codes)


def comq(
    problem: Problem, *, sweeps: int = 3, order: str = "shared", update_scale: bool = True, shrink: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    scale, zero = grid_of(problem.weight, problem.bits, problem.group_size, problem.grid)
    scale, visited, values = scale * shrink, visiting_order(problem, order), problem.weight
    for _ in range(sweeps):
        step = comq_sweep(problem, values, scale, zero, visited)
        if update_scale:
            scale = scale_step(problem, step.codes, scale, zero)
        values = torch.where(problem.dead, problem.weight, problem.values(step.codes, scale, zero))
    return finish(problem, step.codes, scale, zero), scale, zero


def comq_search(problem: Problem, factors: list[float], **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """Per row the shrink factor with the lowest objective."""
    tried = [comq(problem, shrink=factor, **options) for factor in factors]
    errors = torch.stack([problem.objective(problem.values(*one)) for one in tried])
    winner = errors.argmin(0)
    row = torch.arange(winner.numel())
    return tuple(torch.stack(parts)[winner, row] for parts in zip(*tried, strict=True))


def comq_in_data_space(
    problem: Problem, x: Tensor, *, sweeps: int, order: str, shrink: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """As published, with a fixed scale: the residual of all samples is carried along and no Gram is ever formed."""
    scale, zero = grid_of(problem.weight, problem.bits, problem.group_size, problem.grid)
    scale = scale * shrink
    delta, offset, visited = problem.expand(scale), problem.expand(zero), visiting_order(problem, order)
    values, codes = problem.weight.clone(), torch.zeros_like(problem.weight)
    residual = torch.zeros(values.shape[0], x.shape[0], dtype=torch.float64)  # (W - Q) X^T
    row = torch.arange(values.shape[0])
    for _ in range(sweeps):
        for j in visited.T:
            columns = x.T[j]  # [N, tokens]: each row's own input channel
            u = values[row, j] + (residual * columns).sum(1) / columns.square().sum(1)
            codes[row, j] = torch.round(position(u, delta[row, j], offset[row, j], problem.top))
            new = (codes[row, j] - offset[row, j]) * delta[row, j]
            residual -= (new - values[row, j])[:, None] * columns
            values[row, j] = new
    return codes, scale, zero


def gptq(
    problem: Problem,
    scale: Tensor,
    zero_point: Tensor,
    *,
    damp: float = 0.01,
    order: str = "natural",
    forced: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Textbook column loop: codes and the positions x that were rounded. Dead channels are rounded and take no part."""
    delta, zero = problem.expand(scale), problem.expand(zero_point)
    x = position(problem.weight, delta, zero, problem.top)
    codes = torch.round(x) if forced is None else forced.double().cpu().clone()
    live = torch.nonzero(~problem.dead).flatten()
    diagonal = problem.gram.diagonal()[live]
    if order == "activation":
        live = live[torch.argsort(diagonal, descending=True, stable=True)]
    gram = problem.gram[live][:, live]
    gram = gram + damp * problem.gram.diagonal().mean() * torch.eye(live.numel(), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    work = problem.weight[:, live].clone()
    for i, j in enumerate(live.tolist()):
        x[:, j] = position(work[:, i], delta[:, j], zero[:, j], problem.top)
        if forced is None:
            codes[:, j] = torch.round(x[:, j])
        error = (work[:, i] - (codes[:, j] - zero[:, j]) * delta[:, j]) / upper[i, i]
        work[:, i:] -= error[:, None] * upper[i, i:]
    return codes, x


def tie_band(problem: Problem, scale: Tensor, floor: float = 1e-4) -> Tensor:  # [N, K]
    """How far float32 sums of w_k H_kj, divided by H_jj and the scale, may be off on the code axis in a few sweeps."""
    noise = 8 * FLOAT32_EPS * (problem.weight.abs() @ problem.gram.abs())
    reach = torch.where(problem.dead, 1.0, problem.gram.diagonal()) * problem.expand(scale)
    return floor + noise / reach


def assert_nearest(codes: Tensor, x: Tensor, band: Tensor | float, allowed: float = 0.03) -> None:
    """Each code is the one nearest to x outside the tie band; few codes lie inside it, on the other side of a tie."""
    distance = (codes.double().cpu() - x).abs()
    over = distance - 0.5 - band
    assert over.max() <= 0, (
        f"{int((over > 0).sum())} codes are not the nearest, the worst by {float(over.max())} of a step"
    )
    flips = (distance > 0.5).double().mean().item()
    assert flips <= allowed, f"{flips:.1%} of the codes lie on the other side of a tie"


def equal_rows(codes: Tensor, wanted: Tensor) -> float:
    return (codes.double().cpu() == wanted.double().cpu()).all(1).double().mean().item()
