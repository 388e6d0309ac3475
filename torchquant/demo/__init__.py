"""The main job: three real networks go in, low-bit ones come out, and every method is compared on them."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from ..report import Chart, Table, as_json, write_atomically, write_html
from .case import Case
from .compare import METHODS, Check, Comparison, check_table, checks, compare_methods, quality_table

SEEDS = 3  # of the digits' transformer, which trains in seconds


def digits_cases(quick: bool) -> Iterator[Case]:
    from . import digits_vit

    for seed in range(1 if quick else SEEDS):
        yield digits_vit.load(seed, steps=60 if quick else 800)


def efficientnet_cases(quick: bool) -> Iterator[Case]:
    from . import efficientnet

    yield efficientnet.load(*((1, 1) if quick else (6, 25)))


def llama_cases(quick: bool) -> Iterator[Case]:
    from . import byte_llama

    yield byte_llama.load(steps=40 if quick else byte_llama.STEPS)


NETWORKS = {"digits": digits_cases, "efficientnet": efficientnet_cases, "llama": llama_cases}


def run(out: str | Path, *, networks: Sequence[str], bits: Sequence[int], quick: bool = False) -> bool:
    """Prints every result as it comes and the tables at the end, and writes ``report.html`` and ``report.json``.

    Returns whether every layer's errors are in the promised order.
    """
    began = time.perf_counter()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    comparisons = [compare_methods(name, NETWORKS[name](quick), bits) for name in networks]
    found = [check for comparison in comparisons for check in checks(comparison)]
    tables = [*map(quality_table, comparisons), check_table(found)]
    for table in tables:
        print(f"\n{table}")
    write_results(folder, comparisons, found, tables)
    print(f"\n{time.perf_counter() - began:.0f} s in all; wrote {folder / 'report.html'} and report.json")
    return all(check.passed for check in found)


def write_results(
    folder: Path, comparisons: Sequence[Comparison], found: Sequence[Check], tables: Sequence[Table]
) -> None:
    networks = {c.name: {"float": c.floats, "results": [r.to_dict() for r in c.results]} for c in comparisons}
    write_atomically(folder / "report.json", as_json({"checks": [asdict(c) for c in found], "networks": networks}))
    # Of all runs the page shows one a network in detail: auto at the lowest width, where the choice matters most.
    shown = {c.name: c.of(c.bits[-1], "auto")[0] for c in comparisons}
    write_html(
        folder / "report.html",
        {f"{name}: auto at {result.bits} bits, layer by layer": result.report for name, result in shown.items()},
        title="torchquant demo: three networks, every method",
        tables=tables,
        charts=[quality_chart(c) for c in comparisons],
    )


def quality_chart(comparison: Comparison) -> Chart:
    headline = next(iter(comparison.floats[0]))
    lines = {
        method: [mean(r.figures[headline] for r in comparison.of(bits, method)) for bits in comparison.bits]
        for method in METHODS
    }
    return Chart(comparison.name, headline, comparison.bits, lines, mean(f[headline] for f in comparison.floats))
