"""``torchquant demo --sr``: DFSQ against uniform activations on a super-resolution network, in dB."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Activations
from ..recipes.dfsq import dfsq, leave_rest
from ..report import Chart, Pictures, Report, Table, as_json, write_atomically, write_html
from ..steps import choose_quantizers, collect_inputs, observe, preparing, solve_weights
from . import super_resolution as sr

BITS = (8, 6, 4)
PERCENTILE = 0.999
KMEANS_VALUES = 1024  # of a channel: the published selection is slow
KMEANS_MOST_BITS = 6  # and with 256 centres slower still
SAME_VALUES: dict[str, Any] = {"fallback": False, "max_values": KMEANS_VALUES, "progress": False}
PUBLISHED = "DFSQ, published"
TOLERANCE = 1e-9
ZOOM = 64  # pixels of the small picture that the page shows


def uniform(model: nn.Module, calibration: Tensor, scheme: str, rule: str) -> Report:
    """One static range a layer from the calibration data; the same layers and the same weights as DFSQ."""
    options = Activations(range=rule, percentile=PERCENTILE)
    with preparing(
        model, calibration, scheme, activations=options, method="rtn", first_last_bits=None, progress=False
    ) as run:
        leave_rest(run, None)
        observe(run)
        choose_quantizers(run)
        collect_inputs(run)
        solve_weights(run)
    return run.report


Method = Callable[[nn.Module, Tensor, str], Report]
METHODS: dict[str, Method] = {
    "min-max": lambda m, x, s: uniform(m, x, s, "minmax"),
    "percentile": lambda m, x, s: uniform(m, x, s, "percentile"),
    PUBLISHED: lambda m, x, s: dfsq(m, x, s, selector="kmeans", **SAME_VALUES),
    "DFSQ, static": lambda m, x, s: dfsq(m, x, s, norm="static", progress=False),
    "DFSQ": lambda m, x, s: dfsq(m, x, s, progress=False),
    "DFSQ, gptq+comq": lambda m, x, s: dfsq(m, x, s, method="gptq+comq", progress=False),
}
ABOUT = {
    "min-max": "uniform activations, the least and the largest value of each layer",
    "percentile": f"uniform activations, quantiles {1 - PERCENTILE:.1%} and {PERCENTILE:.1%} of each layer",
    PUBLISHED: f"levels by the published k-means, no uniform levels, {KMEANS_VALUES} values a channel, "
    f"up to {KMEANS_MOST_BITS} bits",
    "DFSQ, static": "normalization from the calibration data instead of each picture's own",
    "DFSQ": "the best levels by shortest path, uniform ones where they are better",
    "DFSQ, gptq+comq": "the same, weights by GPTQ and COMQ instead of rounding",
}


@dataclass
class Result:
    method: str
    bits: int
    figures: dict[str, float]
    seconds: float
    report: Report


@dataclass
class Check:
    """Whether the exact selection's squared error is at most the published one's, layer by layer."""

    bits: int
    ratios: dict[str, float] = field(default_factory=dict)  # published / exact

    @property
    def passed(self) -> bool:
        return all(ratio >= 1 - TOLERANCE for ratio in self.ratios.values())


def run(out: str | Path, *, bits: Sequence[int] = BITS, quick: bool = False) -> bool:
    """Trains (or finds) the network, prints the table, and writes ``sr.html`` and ``sr.json``.

    Returns whether the exact selection has the lower error on every layer.
    """
    began = time.perf_counter()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    size = {"steps": 10, "blocks": 1} if quick else {}
    model, calibration = sr.load(folder / "trained", **size)
    print(f"super-resolution network ready, {time.perf_counter() - began:.0f} s\n{sr.PROTOCOL}")
    tests = [sr.picture(name) for name in sr.UNSEEN]
    if quick:
        tests = [sr.middle(tests[1], ZOOM)]
    floats = {"float": sr.judge(model, tests), "bicubic": sr.judge(None, tests)}
    for name, figures in floats.items():
        print(f"  {name:<20} {figures['PSNR']:.3f} dB / {figures['SSIM']:.4f}")
    results, models = compare(model, calibration, tests, sorted(bits, reverse=True))
    checks = [selection_check(model, calibration, result) for result in results if result.method == PUBLISHED]
    tables = [quality_table(floats, results), check_table(checks)]
    for table in tables:
        print(f"\n{table}")
    write_results(folder, floats, results, checks, tables, side_by_side(model, models, tests[0]))
    print(f"\n{time.perf_counter() - began:.0f} s in all; wrote {folder / 'sr.html'} and sr.json")
    return all(check.passed for check in checks)


def compare(
    model: nn.Module, calibration: Tensor, tests: Sequence[sr.Picture], bits: Sequence[int]
) -> tuple[list[Result], dict[str, nn.Module]]:
    """All results, and the models at the lowest width."""
    results, models = [], {}
    for width in bits:
        for name, method in METHODS.items():
            if name == PUBLISHED and width > KMEANS_MOST_BITS:
                continue
            quantized, began = copy.deepcopy(model), time.perf_counter()
            report = method(quantized, calibration, f"W{width}A{width}")
            seconds = time.perf_counter() - began
            results.append(Result(name, width, sr.judge(quantized, tests), seconds, report))
            figures = results[-1].figures
            print(f"  W{width}A{width} {name:<20} {figures['PSNR']:.3f} dB / {figures['SSIM']:.4f}, {seconds:.1f} s")
            if width == bits[-1]:
                models[name] = quantized
    return results, models


def selection_check(model: nn.Module, calibration: Tensor, published: Result) -> Check:
    """The same values, the other selection."""
    scheme = f"W{published.bits}A{published.bits}"
    exact = dfsq(copy.deepcopy(model), calibration, scheme, **SAME_VALUES).details["subset"]
    rivals = published.report.details["subset"]
    return Check(published.bits, {name: rivals[name]["subset"] / found["subset"] for name, found in exact.items()})


# --- what is shown ---


def quality_table(floats: dict[str, dict[str, float]], results: Sequence[Result]) -> Table:
    columns = ["method", "bits", "PSNR dB", "below float", "SSIM", "seconds"]
    base = floats["float"]["PSNR"]
    rows = [
        [name, "32", f"{f['PSNR']:.3f}", f"{base - f['PSNR']:.3f}", f"{f['SSIM']:.4f}", ""]
        for name, f in floats.items()
    ]
    for r in results:
        figures = [f"{r.figures['PSNR']:.3f}", f"{base - r.figures['PSNR']:.3f}", f"{r.figures['SSIM']:.4f}"]
        rows.append([r.method, str(r.bits), *figures, f"{r.seconds:.1f}"])
    about = (
        f"{sr.PROTOCOL}. EDSR with {sr.CHANNELS} channels and {sr.BLOCKS} blocks; weights and inputs of the body's "
        "convolutions have the given bits, head, upsampler and tail are float; weights are rounded unless a row says "
        f"otherwise. {'. '.join(f'{name}: {text}' for name, text in ABOUT.items())}."
    )
    return Table("Super-resolution", columns, rows, about)


def check_table(checks: Sequence[Check]) -> Table:
    rows = []
    for check in checks:
        ratios = sorted(check.ratios.values())
        spread = [f"{ratios[0]:.3f}", f"{ratios[len(ratios) // 2]:.3f}", f"{ratios[-1]:.3f}"]
        rows.append([str(check.bits), str(len(ratios)), *spread, "PASS" if check.passed else "FAIL"])
    about = "Squared error of the published selection as a multiple of the exact one's, on the same values."
    return Table("Selection of levels", ["bits", "layers", "least", "median", "largest", "result"], rows, about)


@torch.no_grad()
def side_by_side(model: nn.Module, models: dict[str, nn.Module], whole: sr.Picture) -> Pictures:
    """The middle of one picture."""
    source = sr.middle(whole, ZOOM)
    versions = {"original": source.large, "bicubic": sr.bicubic(source.small), "float": model(source.small[None])[0]}
    versions |= {n: models[n](source.small[None])[0] for n in ("min-max", "percentile", "DFSQ")}
    about = "The middle of a picture that the network was not trained on, at the lowest width."
    rows = {source.name: [x.clamp(0, 1).permute(1, 2, 0).numpy() for x in versions.values()]}
    return Pictures("Pictures", about, list(versions), rows)


def write_results(
    folder: Path,
    floats: dict[str, dict[str, float]],
    results: Sequence[Result],
    checks: Sequence[Check],
    tables: Sequence[Table],
    pictures: Pictures,
) -> None:
    figures = [{"method": r.method, "bits": r.bits, "seconds": r.seconds, **r.figures} for r in results]
    found = [{"bits": c.bits, "passed": c.passed, "ratios": c.ratios} for c in checks]
    content = {"protocol": sr.PROTOCOL, "float": floats, "results": figures, "selection": found}
    write_atomically(folder / "sr.json", as_json(content))
    widths = sorted({r.bits for r in results}, reverse=True)
    by_method = {
        name: [r.figures["PSNR"] for r in results if r.method == name] for name in METHODS if name != PUBLISHED
    }
    shown = next(r for r in results if r.method == "DFSQ" and r.bits == widths[-1])
    write_html(
        folder / "sr.html",
        {f"DFSQ at {widths[-1]} bits, layer by layer": shown.report},
        title="torchquant demo: super-resolution",
        tables=tables,
        charts=[Chart("super-resolution", "PSNR dB", widths, by_method, floats["float"]["PSNR"])],
        pictures=[pictures],
    )
