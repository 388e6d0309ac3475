"""python -m benchmarks [case ...]: see --help."""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import bench_conv, bench_linear, bench_linear_cuda, bench_networks, cpu_mask, race, report
from .bench_solvers import CASES, contests
from .harness import Result, machine, measure

# Cases with tables of their own: (shapes, rounds, threads, show) -> results, Markdown (empty: what there was stays).
SECTIONS: dict[str, Callable[..., tuple[list[Result], str]]] = {
    "linear": bench_linear.run,
    "linear-cuda": bench_linear_cuda.run,
    "conv": bench_conv.run,
    "networks": bench_networks.run,
}
ACTIVATIONS = ("dynamic", "erq", "histogram", "sulq", "subset")  # of CASES: in a table behind that of the weights
TABLES = {"results": [name for name in CASES if name not in ACTIVATIONS], "activations": list(ACTIVATIONS)}
CHOICES = (*CASES, *SECTIONS)
ROUNDS = 7


def parse_shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split("x"))
    if len(sizes) not in (2, 3):
        raise ValueError(text)
    return sizes


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Operators against peers and floors.")
    parser.add_argument("case", nargs="*", help=f"one of {', '.join(CHOICES)}; all when left out")
    parser.add_argument(
        "--shape", type=parse_shape, action="append",
        help="NxK, of linear MxKxN (tokens, inputs, outputs); may be repeated; default: the tables'",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, help=f"at most; default {ROUNDS}, of {' and '.join(SECTIONS)} {race.ROUNDS}"
    )
    parser.add_argument("--threads", type=int, help="default 1, of networks 1 and 2")
    parser.add_argument("--cpu", choices=cpu_mask.TIERS, help="hide what this CPU has above a tier, from the peers too")
    parser.add_argument("--write", type=Path, help="a Markdown file whose marked tables are replaced")
    parser.add_argument("--json", type=Path, help="a file for the results as JSON")
    options = parser.parse_args(arguments)
    unknown = set(options.case) - set(CHOICES)
    if unknown:
        parser.error(f"unknown case {', '.join(sorted(unknown))}: choose from {', '.join(CHOICES)}")
    return options


def show(text: str) -> None:
    print(text, flush=True)


def run_cases(names: Sequence[str], options: argparse.Namespace, threads: int) -> list[Result]:
    """Operators, one line for each peer."""
    results: list[Result] = []
    shapes = [shape for shape in options.shape or () if len(shape) == 2]
    show(report.HEADER)
    for name in names:
        for contest in contests(name, shapes):
            for result in measure(contest, options.rounds or ROUNDS, threads):
                results.append(result)
                show(report.line(result))
    return results


def section_of(table: str, options: argparse.Namespace) -> str:
    return f"{table} {options.cpu}" if options.cpu else table


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if options.cpu and not cpu_mask.is_on(options.cpu):
        cpu_mask.start_again(options.cpu, arguments)
    threads, chosen = options.threads or 1, options.case or CHOICES
    tables = [table for table, cases in TABLES.items() if set(cases) & set(chosen)]
    for name in [*tables, *(set(SECTIONS) & set(chosen))] if options.write else []:
        report.split_at_section(options.write, section_of(name, options))
    torch.set_num_threads(threads)
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    facts = machine(threads)
    show("\n".join(f"{name}: {value}" for name, value in facts.items()))
    results: list[Result] = []
    for table, cases in TABLES.items():
        begin = time.perf_counter()
        names = [name for name in chosen if name in cases]
        if names:
            made = run_cases(names, options, threads)
            results += made
            facts["whole run"] = f"{time.perf_counter() - begin:.0f} s"
            if options.write:
                report.insert_section(options.write, section_of(table, options), report.markdown(made, facts, command))
    for name in [name for name in chosen if name in SECTIONS]:
        begin = time.perf_counter()
        shapes = [shape for shape in options.shape or () if len(shape) == 3]
        made, text = SECTIONS[name](shapes, options.rounds or race.ROUNDS, options.threads, show)
        results += made
        facts["whole run"] = f"{time.perf_counter() - begin:.0f} s"
        if options.write and text:
            report.insert_section(
                options.write, section_of(name, options), f"{report.preamble(facts, command)}\n{text}"
            )
    if options.json:
        report.write_json(options.json, results, facts, command)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
