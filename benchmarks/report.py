"""Results as a Markdown table, as JSON, and between the markers of a file."""

import json
from dataclasses import asdict
from pathlib import Path

from .harness import Result

SECTION = ("<!-- {0}: written by make bench -->", "<!-- end of {0} -->")  # what a run of some cases replaces
HEADER = (
    "| case | (N, K) | threads | ours, ms: best / median | peer | peer, ms: best / median "
    "| ratio: median [min .. max], best | wanted | fraction of the floor; floor | note |"
)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def line(result: Result) -> str:
    ours = f"{milliseconds(result.ours_best)} / {milliseconds(result.ours_median)}"
    cells = [result.case, result.shape, str(result.threads), ours]
    if result.peer:
        cells += [
            result.peer,
            f"{milliseconds(result.peer_best)} / {milliseconds(result.peer_median)}",
            f"**{result.ratio:.3g}** [{result.ratio_low:.3g} .. {result.ratio_high:.3g}], {result.ratio_best:.3g}",
            f"{result.target:g}" if result.target else "",
        ]
    else:
        cells += [""] * 4
    return "| " + " | ".join([*cells, result.floor, result.note]) + " |"


def preamble(facts: dict[str, str], command: str) -> str:
    return f"Made by `{command}`. " + "; ".join(f"{name}: {value}" for name, value in facts.items()) + ".\n"


def markdown(results: list[Result], facts: dict[str, str], command: str) -> str:
    rule = "|" + "---|" * HEADER.count(" | ") + "---|"
    return "\n".join([preamble(facts, command), HEADER, rule, *(line(result) for result in results)])


def split_at_section(path: Path, name: str) -> tuple[str, str]:
    """What the file has up to the section's first marker, and from its last one on."""
    first, last = (marker.format(name) for marker in SECTION)
    before, begin, rest = path.read_text().partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"{path}: needs the lines {first!r} and {last!r}")
    return before + begin, end + after


def insert_section(path: Path, name: str, text: str) -> None:
    """Puts text between the section's markers in the file."""
    before, after = split_at_section(path, name)
    path.write_text(f"{before}\n{text}\n{after}")


def write_json(path: Path, results: list[Result], facts: dict[str, str], command: str) -> None:
    content = {"command": command, "machine": facts, "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(content, indent=1) + "\n")
