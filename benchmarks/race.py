"""Several runs of ours against many peers, all in the same rounds; where harness.py times one of ours against a few."""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .harness import MAX_CALLS, MIN_SAMPLE, Result, Run, clock, threads

ROUNDS = 15  # at least; the best of them counts
RACE_SECONDS = 60.0  # of one race; no new round after this
SLOW = 10.0  # times float32: such a peer is timed in every third round
SLOW_ROUNDS = 3
LONG_CALL = 0.1  # seconds; is not repeated for a sample
COLD_CALLS = 3  # in a sample
EVICTED = 2  # as many bytes as the last level cache has are read this often between cold calls
LEAST_EVICTED, MOST_EVICTED = 128 << 20, 1 << 30
CACHE_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


@dataclass(frozen=True)
class Runner:
    """``group``: "ours", or what ours is compared with: "float32", "int8" ...; the fastest of a group counts."""

    name: str
    run: Run
    group: str
    amount: float = 0.0  # of work, where that is not the race's (floors)
    unit: str = "GOP/s"
    bytes: int = 0  # that a run has to read at least
    registers: bool = False  # reads nothing, so the caches are left alone before it
    calls: int = 1  # that a run makes; times are those of one


@dataclass(frozen=True)
class Race:
    case: str
    shape: str
    runners: Sequence[Runner]
    threads: int = 1
    amount: float = 0.0  # operations of a run
    before: Run | None = None  # ahead of every call, not timed
    absent: dict[str, str] = field(default_factory=dict)  # peer -> why it is not there
    cells: dict[str, list[str]] = field(default_factory=dict)  # runner -> what else its line of the table says
    clock: Callable[[], float] | None = None  # seconds; None: as harness.clock for that many threads


Times = list[float]  # seconds per round; NaN: not timed in that round


@dataclass(frozen=True)
class Outcome:
    race: Race
    times: dict[str, Times]

    def best(self, name: str) -> float:
        return min(t for t in self.times[name] if not math.isnan(t))

    def runners(self, *groups: str) -> list[Runner]:
        return [runner for runner in self.race.runners if runner.group in groups]

    def fastest(self, group: str) -> str | None:
        names = [runner.name for runner in self.runners(group)]
        return min(names, key=self.best) if names else None

    def rate(self, name: str) -> float:
        """Of the best run, a second."""
        runner = next(runner for runner in self.race.runners if runner.name == name)
        return (runner.amount or self.race.amount) / self.best(name)


def evict() -> Run:
    """Reads more than the caches hold."""
    try:
        last = int(CACHE_SIZE.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        last = 0
    size = min(max(EVICTED * last, LEAST_EVICTED), MOST_EVICTED)
    return torch.rand(size // 4).sum


def run_race(race: Race, rounds: int) -> Outcome:
    now, begin = race.clock or clock(race.threads), time.perf_counter()
    times: dict[str, Times] = {runner.name: [] for runner in race.runners}
    with threads(race.threads):
        before = {runner.name: None if runner.registers else race.before for runner in race.runners}
        lengths = {runner.name: warm_up(runner.run, before[runner.name], race.clock) for runner in race.runners}
        slow = SLOW * min(
            [lengths[runner.name] for runner in race.runners if runner.group == "float32"], default=math.inf
        )
        for turn in range(rounds):
            for runner in race.runners:
                name, length = runner.name, lengths[runner.name]
                skipped = length > slow and turn % SLOW_ROUNDS > 0
                seconds = math.nan if skipped else sample(runner.run, length, before[name], now)
                times[name].append(seconds / runner.calls)
            if time.perf_counter() - begin > RACE_SECONDS:
                break
    return Outcome(race, times)


def warm_up(run: Run, before: Run | None, own_clock: Callable[[], float] | None) -> float:
    """Seconds of a second call, or of a first one that is slow."""
    now, seconds = own_clock or time.perf_counter, 0.0
    for _ in range(2):
        if before:
            before()
        start = now()
        run()
        seconds = now() - start
        if seconds > LONG_CALL:
            break
    return seconds


def sample(run: Run, length: float, before: Run | None, now: Callable[[], float]) -> float:
    """Mean seconds of a call."""
    if before:
        return statistics.mean(one_call(run, before, now) for _ in range(COLD_CALLS if length < LONG_CALL else 1))
    if length < MIN_SAMPLE:
        run()  # another runner's data fill the caches
    calls = max(1, min(MAX_CALLS, round(MIN_SAMPLE / max(length, 1e-6))))
    start = now()
    for _ in range(calls):
        run()
    return (now() - start) / calls


def one_call(run: Run, before: Run, now: Callable[[], float]) -> float:
    before()
    start = now()
    run()
    return now() - start


def results(outcome: Outcome) -> list[Result]:
    """Each of ours against each peer."""
    race = outcome.race
    peers = [runner for runner in race.runners if runner.group not in ("ours", "floor")]
    return [
        against(outcome, ours.name, peer.name, f"{race.case}, {ours.name}")
        for ours in outcome.runners("ours")
        for peer in peers
    ]


def against(outcome: Outcome, ours: str, peer: str, case: str = "") -> Result:
    pairs = [(a, b) for a, b in zip(outcome.times[ours], outcome.times[peer], strict=True) if not math.isnan(a + b)]
    ratios = [b / a for a, b in pairs]
    return Result(
        case, outcome.race.shape, outcome.race.threads, len(pairs),
        outcome.best(ours), median(outcome.times[ours]), peer, outcome.best(peer), median(outcome.times[peer]),
        statistics.median(ratios), min(ratios), max(ratios), outcome.best(peer) / outcome.best(ours),
    )  # fmt: skip


def median(times: Times) -> float:
    return statistics.median(t for t in times if not math.isnan(t))


# --- tables ---


def ratio_cell(outcome: Outcome, ours: str, group: str, wanted: float | None = None) -> str:
    """Ratio of the best times [over the rounds], to the fastest of a group."""
    peer = outcome.fastest(group)
    if peer is None or peer == ours:
        return ""
    result = against(outcome, ours, peer)
    goal = f", wanted {wanted:g}" if wanted else ""
    return f"**{result.ratio_best:.3g}** [{result.ratio_low:.3g} .. {result.ratio_high:.3g}]{goal}"


def time_cell(outcome: Outcome, name: str) -> str:
    return f"{outcome.best(name) * 1e3:.4g} / {median(outcome.times[name]) * 1e3:.4g}"


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join([row(header), "|" + "---|" * len(header), *map(row, rows)]) + "\n"


def absentees(outcomes: Sequence[Outcome]) -> str:
    """Peers that were left out, and why."""
    reasons = {name: why for outcome in outcomes for name, why in outcome.race.absent.items()}
    return "".join(f"\nNot run: {name}: {why}.\n" for name, why in reasons.items())


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
