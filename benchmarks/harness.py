"""The one harness: our code, its peers and the hardware floor take turns in one process (A B C A B C ...), after every
result has been checked.

One thread is timed in CPU seconds, which other load on the machine cannot stretch; several threads in wall seconds.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from torchquant import _C

Run = Callable[[], object]

MIN_SAMPLE = 0.02  # seconds; shorter calls are repeated within a sample
MAX_CALLS = 50
LONG_CALL = 1.0
CASE_SECONDS = 12.0  # a case starts no new round after this


class CheckFailed(AssertionError):
    """A result is wrong, so nothing is timed."""


def check(condition: object, what: str) -> None:
    if not bool(condition):
        raise CheckFailed(what)


@dataclass(frozen=True)
class Peer:
    """run() does `share` of the work (its time is divided by it; the name says so)."""

    name: str
    run: Run
    share: float = 1.0
    target: float | None = None  # wanted ratio of its time to ours
    timed_as: str = ""  # name of the peer whose run and time this one shares
    ours_plus: str = ""  # names in Contest.extra of what our side has to do besides for this comparison,
    plus: str = ""  # and of what the peer has to do besides


@dataclass(frozen=True)
class Floor:
    """run() moves or computes `amount`; `work` names amounts our code is charged with."""

    run: Run
    amount: float
    unit: str  # "GFLOP/s" or "GB/s"
    work: tuple[tuple[str, float], ...]
    target: float | None = None  # wanted fraction, of the first work


@dataclass(frozen=True)
class Contest:
    case: str
    shape: str
    ours: Run
    peers: Sequence[Peer]
    floor: Floor | None = None
    note: str = ""
    threads: int | None = None  # None: as the caller asks
    extra: dict[str, Run] = field(default_factory=dict)  # timed along; see Peer.plus
    times: int = 1  # our time stands for so many like it
    own_clock: Callable[[], float] | None = None  # seconds of the last call of ours, where it measures itself


@dataclass
class Result:
    """One line of the table: our code against one peer, or alone."""

    case: str
    shape: str
    threads: int
    rounds: int
    ours_best: float  # seconds
    ours_median: float
    peer: str = ""
    peer_best: float = 0.0
    peer_median: float = 0.0
    ratio: float = 0.0  # median over rounds
    ratio_low: float = 0.0
    ratio_high: float = 0.0
    ratio_best: float = 0.0  # of the best times
    target: float | None = None
    floor: str = ""
    note: str = ""


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def clock(thread_count: int) -> Callable[[], float]:
    return time.process_time if thread_count == 1 else time.perf_counter


def warm_up(run: Run, now: Callable[[], float]) -> tuple[int, float]:
    """Calls that fill a sample, and the seconds of the last call made for that."""
    for _ in range(2):
        start = now()
        run()
        seconds = now() - start
        if seconds > LONG_CALL:
            break
    return max(1, min(MAX_CALLS, round(MIN_SAMPLE / max(seconds, 1e-6)))), seconds


def interleave(
    runs: dict[str, Run], rounds: int, now: Callable[[], float], own_clock: Callable[[], float] | None = None
) -> list[dict[str, float]]:
    """Seconds of each by name, round by round. A long call's warm-up counts: the checks have made the same call."""
    begin = time.perf_counter()
    calls = {}
    table: list[dict[str, float]] = [{}]
    for name, run in runs.items():
        calls[name], seconds = warm_up(run, now)
        if seconds > LONG_CALL:
            table[0][name] = seconds
    while True:
        row = table[-1]
        for name, run in runs.items():
            if name not in row:
                start = now()
                for _ in range(calls[name]):
                    run()
                row[name] = (now() - start) / calls[name]
            if name == "ours" and own_clock:
                row[name] = own_clock()
        if len(table) >= rounds or time.perf_counter() - begin > CASE_SECONDS:
            return table
        table.append({})


def measure(contest: Contest, rounds: int, thread_count: int) -> list[Result]:
    """One result per peer; without peers, one."""
    thread_count = contest.threads or thread_count
    runs: dict[str, Run] = {"ours": contest.ours, **contest.extra}
    runs |= {peer.name: peer.run for peer in contest.peers if not peer.timed_as}
    if contest.floor:
        runs["floor"] = contest.floor.run
    with threads(thread_count):
        table = interleave(runs, rounds, clock(thread_count), contest.own_clock)
    for row in table:
        row["ours"] *= contest.times
    alone = [summary(contest, [row["ours"] for row in table])]
    results = [compare(contest, peer, table) for peer in contest.peers] or alone
    for result in results:
        result.threads = thread_count
        result.floor = floor_text(contest.floor, table) if contest.floor else ""
    return results


def summary(contest: Contest, ours: list[float]) -> Result:
    return Result(contest.case, contest.shape, 0, len(ours), min(ours), statistics.median(ours), note=contest.note)


def compare(contest: Contest, peer: Peer, table: list[dict[str, float]]) -> Result:
    ours = [row["ours"] + row.get(peer.ours_plus, 0.0) for row in table]
    theirs = [row[peer.timed_as or peer.name] / peer.share + row.get(peer.plus, 0.0) for row in table]
    ratios = [b / max(a, 1e-9) for a, b in zip(ours, theirs, strict=True)]
    result = summary(contest, ours)
    result.peer, result.target = peer.name, peer.target
    result.peer_best, result.peer_median = min(theirs), statistics.median(theirs)
    result.ratio, result.ratio_low, result.ratio_high = statistics.median(ratios), min(ratios), max(ratios)
    result.ratio_best = min(theirs) / max(min(ours), 1e-9)
    return result


def floor_text(floor: Floor, table: list[dict[str, float]]) -> str:
    """Fractions of the floor's rate, each the median over rounds."""
    rate = statistics.median(floor.amount / row["floor"] for row in table)
    parts = []
    for name, amount in floor.work:
        fraction = statistics.median(amount / row["ours"] / (floor.amount / row["floor"]) for row in table)
        parts.append(f"{fraction:.2f} ({name})")
    wanted = f", wanted {floor.target:g}" if floor.target else ""
    return f"{' / '.join(parts)}{wanted}; {rate / 1e9:.3g} {floor.unit}"


# --- the machine ---


def best_rate(run: Run, amount: float, now: Callable[[], float], samples: int = 5) -> float:
    calls, _ = warm_up(run, now)
    best = float("inf")
    for _ in range(samples):
        start = now()
        for _ in range(calls):
            run()
        best = min(best, (now() - start) / calls)
    return amount / best


def read_run(megabytes: float) -> tuple[Run, float]:
    """Reads a buffer once; and its bytes."""
    buffer = torch.rand(int(megabytes * 2**20 / 4))
    return buffer.sum, buffer.numel() * 4.0


def matmul_run(rows: int, inner: int, columns: int) -> tuple[Run, float]:
    """A float32 product; and its operations."""
    a, b, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
    return lambda: torch.mm(a, b, out=out), 2.0 * rows * inner * columns


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def machine(thread_count: int) -> dict[str, str]:
    """What the numbers depend on, with the ceilings measured now."""
    now = clock(thread_count)
    facts = {
        "CPU": cpu_model(),
        "tier": f"{_C.cpu_tier()} (of {', '.join(_C.cpu_tiers())})",
        "threads": str(thread_count),
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        "clock": "CPU seconds" if thread_count == 1 else "wall seconds",
    }
    with threads(thread_count):
        facts["float32 product 2048^3"] = f"{best_rate(*matmul_run(2048, 2048, 2048), now, 3) / 1e9:.0f} GFLOP/s"
        for label, megabytes in (("256 KB", 0.25), ("8 MB", 8), ("256 MB", 256)):
            facts[f"read {label}"] = f"{best_rate(*read_run(megabytes), now) / 1e9:.0f} GB/s"
    return facts
