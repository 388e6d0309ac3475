"""python -m benchmarks [case ...] [--shape NxK ...] [--rounds N] [--threads N] [--write FILE.md] [--json FILE]"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import report
from .bench_solvers import CASES, contests
from .harness import Result, machine, measure
from .layers import Shape


def parse_shape(text: str) -> Shape:
    rows, columns = text.split("x")
    return int(rows), int(columns)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Operators against peers and floors.")
    parser.add_argument("case", nargs="*", help=f"one of {', '.join(CASES)}; all when left out")
    parser.add_argument("--shape", type=parse_shape, action="append", help="NxK, may be repeated; default: the table's")
    parser.add_argument("--rounds", type=int, default=7, help="at most; long cases stop earlier")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="a Markdown file whose marked table is replaced")
    parser.add_argument("--json", type=Path, help="a file for the results as JSON")
    options = parser.parse_args(arguments)
    unknown = set(options.case) - set(CASES)
    if unknown:
        parser.error(f"unknown case {', '.join(sorted(unknown))}: choose from {', '.join(CASES)}")
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    begin = time.perf_counter()
    facts = machine(options.threads)
    print(*(f"{name}: {value}" for name, value in facts.items()), report.HEADER, sep="\n", flush=True)
    results: list[Result] = []
    for name in options.case or CASES:
        for contest in contests(name, options.shape):
            for result in measure(contest, options.rounds, options.threads):
                results.append(result)
                print(report.line(result), flush=True)
    facts["whole run"] = f"{time.perf_counter() - begin:.0f} s"
    if options.write:
        report.insert(options.write, report.markdown(results, facts, command))
    if options.json:
        report.write_json(options.json, results, facts, command)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
