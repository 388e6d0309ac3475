"""Quantize a network with every method at several widths, from one calibration, and put the results side by side."""

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..quantize import collect_statistics, quantize_
from ..report import Report, Table, geometric_mean
from .case import Case

METHODS = ("rtn", "gptq", "comq", "magr+comq", "gptq+comq", "auto")
TOLERANCE = 1e-4  # relative; errors are float32 sums over whole layers
# Per layer, at the same bits and seed: the left method's error is never above the right one's.
ORDER = (("auto", "gptq+comq"), ("gptq+comq", "gptq"), ("auto", "rtn"), ("gptq+comq", "rtn"))


@dataclass
class Result:
    """One network, quantized by one method."""

    bits: int
    method: str
    seed: int
    figures: dict[str, float]
    report: Report

    def to_dict(self) -> dict[str, Any]:
        report = {**self.report.to_dict(), "details": {}}  # the figures' data would make this file ten times as long
        return {"bits": self.bits, "method": self.method, "seed": self.seed, "figures": self.figures, "report": report}


@dataclass
class Comparison:
    """All results of one network, over the seeds it was trained with."""

    name: str
    about: str = ""
    floats: list[dict[str, float]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    calibration_seconds: float = 0.0

    def of(self, bits: int, method: str) -> list[Result]:
        return [r for r in self.results if r.bits == bits and r.method == method]

    @property
    def bits(self) -> list[int]:
        return sorted({r.bits for r in self.results}, reverse=True)


def compare_methods(
    name: str,
    cases: Iterable[Case],
    bits: Sequence[int],
    *,
    methods: Sequence[str] = METHODS,
    say: Callable[[str], None] = print,
) -> Comparison:
    """``cases``: the same network from several seeds; each is quantized with every method at every width."""
    comparison = Comparison(name)
    for seed, case in enumerate(cases):
        comparison.about = case.about
        with torch.no_grad():
            comparison.floats.append(case.judge(case.model))
        say(f"{case.name}, seed {seed}: float {figures_text(comparison.floats[-1])}")
        began = time.perf_counter()
        grams = collect_statistics(case.model, case.calibration, max_tokens=case.max_tokens, progress=False)
        comparison.calibration_seconds += time.perf_counter() - began
        for width in bits:
            for method in methods:
                result = quantize_and_judge(case, grams, width, method, seed)
                comparison.results.append(result)
                error = f"error {result.report.mean_ratio():.3f} of rounding, {result.report.seconds:.2f} s"
                say(f"  W{width} {method:<10} {figures_text(result.figures)}, {error}")
    return comparison


def quantize_and_judge(case: Case, grams: Any, bits: int, method: str, seed: int) -> Result:
    model = copy.deepcopy(case.model)
    report = quantize_(model, f"W{bits}A16", grams, method=method, progress=False, seed=seed)
    with torch.no_grad():
        return Result(bits, method, seed, case.judge(model), report)


def figures_text(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in figures.items())


def quality_table(comparison: Comparison) -> Table:
    """One row for the float model and one for every width and method."""
    names = list(comparison.floats[0])
    seeds = len(comparison.floats)
    columns = ["method", "bits", *names, "error of rtn", "layers > rtn", "seconds", "kB"]
    size = comparison.results[0].report.bytes_before / 1e3
    quality = [spread([figures[name] for figures in comparison.floats]) for name in names]
    rows = [["float", "32", *quality, "", "", "", f"{size:.0f}"]]
    for width in comparison.bits:
        for method in METHODS:
            found = comparison.of(width, method)
            if found:
                quality = [spread([r.figures[name] for r in found]) for name in names]
                rows.append([method, str(width), *quality, *costs(found)])
    about = (
        f"{comparison.about}. {f'Mean and deviation of {seeds} seeds. ' if seeds > 1 else ''}"
        "Error of rtn: geometric mean over layers of the relative output error, as a share of rounding's; layers > "
        "rtn: those made worse than by rounding. Seconds without the calibration, which is done once "
        f"({comparison.calibration_seconds / seeds:.1f} s)."
    )
    return Table(comparison.name, columns, rows, about)


def costs(results: Sequence[Result]) -> list[str]:
    """What a row says besides quality, over all seeds."""
    layers = [layer for r in results for layer in r.report.layers]
    ratio = geometric_mean([layer.ratio for layer in layers])
    worse = sum(layer.ratio > 1 + TOLERANCE for layer in layers)
    seconds = statistics.mean(r.report.seconds for r in results)
    return [f"{ratio:.3f}", f"{worse} of {len(layers)}", f"{seconds:.2f}", f"{results[0].report.bytes_after / 1e3:.0f}"]


def spread(values: Sequence[float], digits: int = 2) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


@dataclass
class Check:
    """How many layers break ``better <= worse``."""

    network: str
    better: str
    worse: str
    layers: int
    violations: list[str]

    @property
    def passed(self) -> bool:
        return not self.violations


def checks(comparison: Comparison) -> list[Check]:
    made = []
    for better, worse in ORDER:
        layers, violations = 0, []
        for result in (r for r in comparison.results if r.method == better):
            other = next((r for r in comparison.of(result.bits, worse) if r.seed == result.seed), None)
            for layer in result.report.layers if other is not None else ():
                layers += 1
                if layer.error > other.report[layer.name].error * (1 + TOLERANCE) + 1e-7:  # type: ignore[union-attr]
                    violations.append(f"W{result.bits} {layer.name}")
        made.append(Check(comparison.name, better, worse, layers, violations))
    return made


def check_table(found: Sequence[Check]) -> Table:
    """PASS or FAIL, and by name which layers break a rule."""
    rows = []
    for check in found:
        names = ", ".join([*check.violations[:3], *(["..."] if len(check.violations) > 3 else [])])
        broken = f"{len(check.violations)} ({names})" if names else "0"
        rule = f"{check.network}: {check.better} <= {check.worse}"
        rows.append([rule, str(check.layers), broken, "PASS" if check.passed else "FAIL"])
    about = "Relative output error of every single layer, at every width and seed; tolerance 1e-4 relative."
    return Table("Checks", ["rule", "layers", "violated by", "result"], rows, about)
