"""A packed low-bit linear layer with integer activations against everything that can be installed beside it.

Shapes: M tokens, K inputs, N outputs. Ours and its peers take turns; the ratios are those of the best times.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchquant import _C, dequantize, kernels, rtn_quantize

from . import probe, race
from .harness import CheckFailed, Result, Run, check
from .layers import make_weight
from .linear_peers import FLOAT32, PEERS, Unavailable
from .race import Outcome, Race, Runner

GemmShape = tuple[int, int, int]  # M, K, N
SHAPES: tuple[GemmShape, ...] = (
    (1, 4096, 4096), (1, 4096, 14336), (16, 4096, 4096),  # a token, and 16 of them, of a language model
    (197, 384, 1536), (197, 1536, 384), (197, 768, 3072), (197, 3072, 768),  # a picture in DeiT-S and in DeiT-B
    (1576, 384, 1536),  # eight pictures in DeiT-S
)  # fmt: skip
PEER_BITS = 7  # of the activations of peers: some take one less, so that their products cannot saturate
CHECKED_OUTPUTS = 1024


@dataclass(frozen=True)
class Variant:
    bits: int
    group_size: int = 0
    levels: str = ""  # "", "tensor" or "row": what has a table of its own
    input_bits: int = 8
    zero_points: bool = False  # else in the middle of the codes, as the peers have it
    integer_scales: bool = False  # of groups: integers times one scale for each row
    goals: bool = False

    @property
    def name(self) -> str:
        group = f" g{self.group_size}" if self.group_size else ""
        group += ", integer scales" if self.integer_scales else ""
        table = {"": "", "tensor": ", 16 levels up to 32", "row": ", 16 levels up to 127 per row"}[self.levels]
        zero = ", zero points" if self.zero_points else ""
        return f"W{self.bits}A{self.input_bits}{group}{table}{zero}"


VARIANTS = (
    Variant(2), Variant(3), Variant(4, goals=True), Variant(8),
    Variant(4, 128, goals=True), Variant(4, 128, integer_scales=True, goals=True),
    Variant(4, zero_points=True), Variant(4, levels="tensor"), Variant(4, levels="row"),
    Variant(4, input_bits=16), Variant(4, 128, input_bits=16),
)  # fmt: skip

# Wanted of W4A8 on one thread, by M: against float32, the fastest int8, the fastest 4 bit.
Goals = dict[int, tuple[float | None, float | None, float | None]]
GOALS: Goals = {1: (None, 1.0, 1.0), 16: (None, 1.0, 1.0), 197: (3.2, 1.0, 1.0), 1576: (3.2, 1.0, 1.0)}
GOALS_WITHOUT_VNNI: Goals = {1: (5.5, None, 1.5), 16: (5.0, 1.2, None), 197: (2.6, 1.3, 2.3), 1576: (2.6, 1.3, 2.3)}


# --- ours ---


def level_table(weight: Tensor, per_row: bool) -> Tensor:
    """Int8 levels, denser near zero as quantiles of a normal are: [16], or [N, 16] all different."""
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.03, 0.97, 16))
    table = quantiles / quantiles.max()
    if not per_row:
        return (table * 32).round().to(torch.int8)
    power = torch.linspace(0.9, 1.1, weight.shape[0])[:, None]
    return (127 * table.sign() * table.abs() ** power).round().to(torch.int8)


def to_levels(weight: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the nearest levels, scale [N, 1], values."""
    rows = table.float().expand(weight.shape[0], -1)
    scale = weight.abs().amax(1, keepdim=True) / rows.amax(1, keepdim=True)
    middle = (rows[:, 1:] + rows[:, :-1]) / 2
    codes = torch.searchsorted(middle.contiguous(), weight / scale)
    return codes.to(torch.uint8), scale, rows.gather(1, codes) * scale


def prepare(x: Tensor, weight: Tensor, variant: Variant) -> tuple[Run, Tensor, int]:
    """A call of the operator, the weight's values, and the bytes that the packed weight has."""
    layout: dict[str, Any] = {"bits": variant.bits, "group_size": variant.group_size}
    table, zero = None, None
    if variant.levels:
        table = level_table(weight, variant.levels == "row").to(weight.device)
        codes, scale, values = to_levels(weight, table)
    else:
        grid = "asymmetric" if variant.zero_points else "symmetric"
        codes, scale, zero = rtn_quantize(weight, grid=grid, **layout)
        if variant.integer_scales:
            scale = kernels.integer_group_scales(codes, scale, zero, **layout)
        values = dequantize(codes, scale, zero, group_size=variant.group_size)
    zero = zero if variant.zero_points else None
    packed, numbers, levels = kernels.linear_prepack(codes, scale, zero, levels=table, **layout)
    layout |= {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    layout |= {"levels": levels if variant.levels else None, "input_bits": variant.input_bits}
    size = packed.numel() + 4 * numbers.numel() + levels.numel()
    return lambda: kernels.quantized_linear(x, packed, numbers, **layout), values, size


# --- checks ---


def relative_error(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """Against float64, of about CHECKED_OUTPUTS outputs."""
    some = slice(None, None, max(1, weight.shape[0] // CHECKED_OUTPUTS))
    wanted = x.double() @ weight[some].double().T
    return float((y[:, some].double() - wanted).norm() / wanted.norm())


def rounding_error(x: Tensor, bits: int, per_token: bool = True) -> float:
    """Relative, of integers with a scale for each token or one for all; twice the expectation, as the data are few."""
    top = x.abs().amax(1) if per_token else x.abs().max()
    step = 2 * top / (2**bits - 2)
    return 2 * float((step.square().mean() / 12).sqrt() / x.square().mean().sqrt()) + 1e-5


def our_runner(x: Tensor, weight: Tensor, variant: Variant) -> Runner:
    run, values, size = prepare(x, weight, variant)
    error, allowed = relative_error(run(), x, values), rounding_error(x, variant.input_bits)  # type: ignore[arg-type]
    check(error <= allowed, f"linear: {variant.name} is {error:.2g} off, rounded inputs explain {allowed:.2g}")
    return Runner(variant.name, run, "ours", bytes=size)


def peer_runner(x: Tensor, weight: Tensor, name: str) -> Runner:
    group, make = PEERS[name]
    peer = make(x, weight)
    error, allowed = relative_error(peer.run(), x, peer.weight), rounding_error(x, PEER_BITS, per_token=False)  # type: ignore[arg-type]
    check(error <= allowed, f"linear: {name} is {error:.2g} off, rounded inputs explain {allowed:.2g}")
    return Runner(name, peer.run, group)


# --- races ---


def make_inputs(shape: GemmShape) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens, columns, _ = shape
    spread = torch.exp(0.5 * torch.randn(columns, generator=generator))
    return torch.randn(tokens, columns, generator=generator) * spread


def variants_of(columns: int, variants: Sequence[Variant] = VARIANTS) -> list[Variant]:
    return [variant for variant in variants if columns % max(variant.group_size, 1) == 0]


def races(shape: GemmShape, threads: int) -> Iterator[Race]:
    """One, and for single tokens one more whose weights come from memory."""
    x, weight = make_inputs(shape), make_weight(shape[2], shape[1])
    runners = [our_runner(x, weight, variant) for variant in variants_of(shape[1])]
    four_bit = next(runner.bytes for runner in runners if runner.name == Variant(4).name)
    absent = {} if probe.peaks(64) else {"hardware floors": str(probe.library())}
    for name in PEERS:
        try:
            runners.append(peer_runner(x, weight, name))
        except (Unavailable, CheckFailed) as reason:
            absent[name] = str(reason)
    runners += [Runner(p.name, p.run, "floor", p.amount, p.unit, registers=p.registers) for p in probe.peaks(four_bit)]
    label, operations = "x".join(map(str, shape)), 2.0 * shape[0] * shape[1] * shape[2]
    if shape[0] == 1:
        yield Race("linear", f"{label} cold", runners, threads, operations, race.evict(), absent)
    yield Race("linear", label + (" hot" if shape[0] == 1 else ""), runners, threads, operations, None, absent)


def run(
    shapes: Sequence[GemmShape], rounds: int, threads: int | None, show: Callable[[str], None]
) -> tuple[list[Result], str]:
    """All results, and the tables as Markdown. ``show`` gets every table line as it comes."""
    outcomes: list[Outcome] = []
    show(race.table(HEADER, []).rstrip())
    with race.threads(threads or 1):
        for shape in shapes or SHAPES:
            for one in races(shape, threads or 1):
                outcomes.append(race.run_race(one, rounds))
                show("\n".join(race.row(cells) for cells in our_rows(outcomes[-1])))
    ours = race.table(HEADER, (cells for outcome in outcomes for cells in our_rows(outcome)))
    shapes_run = [outcome.race.shape for outcome in outcomes]
    peers = f"{PEERS_ABOUT}\n\n{race.table(['', *shapes_run], peer_rows(outcomes))}{race.absentees(outcomes)}"
    show(f"\n{peers}")
    return [result for outcome in outcomes for result in race.results(outcome)], f"{ours}\n{peers}"


# --- tables ---

HEADER = (
    "M x K x N", "ours", "ms: best / median", "GOP/s", "to torch float32", "to the fastest int8",
    "to MatMulNBits (2 bit for W2, else 4)",
    "of the integer peak", "of the read rate",
)  # fmt: skip
PEERS_ABOUT = "The peers in the same rounds, GOP/s at best (ratio to torch float32), and the floors of this machine:"


def share_cells(outcome: Outcome, runner: Runner) -> tuple[str, str]:
    """Fractions of what the hardware can do; single tokens are bound by the bytes of the weight."""
    floors = outcome.runners("floor")
    if not floors:
        return "", ""
    peak, read = outcome.rate(floors[0].name), outcome.rate(floors[-1].name)
    bound = outcome.race.shape.startswith("1x")
    by_bytes = f"{runner.bytes / outcome.best(runner.name) / read:.2f}" if bound else ""
    return f"{outcome.rate(runner.name) / peak / outcome.race.threads:.2f}", by_bytes


def our_rows(outcome: Outcome) -> Iterator[list[str]]:
    wanted = {variant.name for variant in VARIANTS if variant.goals and outcome.race.threads == 1}
    tokens = int(outcome.race.shape.split("x")[0])
    all_goals = GOALS_WITHOUT_VNNI if _C.cpu_tier() in ("avx2", "avx512") else GOALS
    for runner in outcome.runners("ours"):
        goals = all_goals.get(tokens, (None,) * 3) if runner.name in wanted else (None,) * 3
        groups = ("float32", "int8", "2 bit" if runner.name.startswith("W2") else "4 bit")
        ratios = [race.ratio_cell(outcome, runner.name, group, goal) for group, goal in zip(groups, goals, strict=True)]
        yield [
            outcome.race.shape, runner.name, race.time_cell(outcome, runner.name),
            f"{outcome.rate(runner.name) / 1e9:.0f}", *ratios, *share_cells(outcome, runner),
        ]  # fmt: skip


def peer_rows(outcomes: Sequence[Outcome]) -> Iterator[list[str]]:
    for name in PEERS:
        yield [name, *(peer_cell(outcome, name) for outcome in outcomes)]
    floors = {runner.name: runner.unit for runner in outcomes[0].runners("floor")}
    for name, unit in floors.items():
        yield [f"{name}, {unit}", *(floor_cell(outcome, name) for outcome in outcomes)]


def peer_cell(outcome: Outcome, name: str) -> str:
    if name in outcome.race.absent:
        return "-"
    ratio = outcome.best(FLOAT32) / outcome.best(name)
    return f"{outcome.rate(name) / 1e9:.3g} ({ratio:.2g})"


def floor_cell(outcome: Outcome, name: str) -> str:
    """The nops' spread over the rounds tells of other load on the core."""
    best = outcome.rate(name) / 1e9
    if name != "nop":
        return f"{best:.3g}"
    return f"{best * outcome.best(name) / max(outcome.times[name]):.3g} .. {best:.3g}"
