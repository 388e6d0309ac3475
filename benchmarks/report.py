"""Results as a Markdown table, as JSON, and between the markers of a file."""

import json
from dataclasses import asdict
from pathlib import Path

from .harness import Result

BEGIN, END = "<!-- results: written by make bench -->", "<!-- end of results -->"
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


def markdown(results: list[Result], facts: dict[str, str], command: str) -> str:
    about = "; ".join(f"{name}: {value}" for name, value in facts.items())
    rule = "|" + "---|" * HEADER.count(" | ") + "---|"
    return "\n".join([f"Made by `{command}`. {about}.", "", HEADER, rule, *(line(result) for result in results)])


def insert(path: Path, text: str) -> None:
    """Puts text between the markers of the file."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path}: needs the lines {BEGIN!r} and {END!r}")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def write_json(path: Path, results: list[Result], facts: dict[str, str], command: str) -> None:
    content = {"command": command, "machine": facts, "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(content, indent=1) + "\n")
