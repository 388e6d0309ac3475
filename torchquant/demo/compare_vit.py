"""``torchquant demo --vit``: the recipes for vision transformers on a network that reads characters, at few bits."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from ..config import Activations
from ..quantize import quantize_
from ..recipes import erq, is_vit, repq_vit
from ..recipes.sos import Training
from ..report import Report, Table, as_json, write_atomically, write_html
from . import glyph_vit, text_recogniser
from .case import Case
from .compare import figures_text, spread

SEEDS = 3  # networks, each with calibration pictures of its own
SCHEMES = ("W3A3", "W4A4")
SPREAD_SCHEME = "W4A4"
# The published rate is for networks a hundred times as large; the published 1000 iterations gain little here.
SOS = Training(rate=1e-3, iterations=100, batch=32)
QUICK = Training(rate=1e-3, iterations=2, batch=32)
BASELINE, BEST = "RepQ-ViT", "best: I&S-ViT, measured softmax"
Method = Callable[[nn.Module, Any, str, Training], Report]


def without_reparameterization(rule: str, softmax: str) -> Activations:
    return Activations(range=rule, softmax=softmax, reparameterize=False)


MIN_MAX = without_reparameterization("minmax", "uniform")
PERCENTILE = without_reparameterization("percentile", "uniform")
CHANNELS_LEFT = without_reparameterization("percentile", "log_sqrt2")
METHODS: dict[str, Method] = {
    "min-max": lambda m, x, s, how: repq_vit(m, x, s, activations=MIN_MAX, progress=False),
    "percentile": lambda m, x, s, how: repq_vit(m, x, s, activations=PERCENTILE, progress=False),
    BASELINE: lambda m, x, s, how: repq_vit(m, x, s, progress=False),
    "ERQ, Aqer": lambda m, x, s, how: erq(m, x, s, wqer=False, softmax="measured", progress=False),
    "ERQ, Wqer": lambda m, x, s, how: erq(m, x, s, aqer=False, softmax="measured", progress=False),
    "ERQ": lambda m, x, s, how: erq(m, x, s, softmax="measured", progress=False),
    "ERQ, log sqrt 2": lambda m, x, s, how: erq(m, x, s, progress=False),
    "I&S-ViT, SULQ": lambda m, x, s, how: is_vit(m, x, s, sos=False, progress=False),
    "I&S-ViT, SOS": lambda m, x, s, how: is_vit(m, x, s, softmax="log_sqrt2", sos=how),
    "I&S-ViT": lambda m, x, s, how: is_vit(m, x, s, sos=how),
    BEST: lambda m, x, s, how: is_vit(m, x, s, softmax="measured", sos=how),
}
# Of the text recogniser, a convolutional network.
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "min-max, rounding": {"method": "rtn", "activations": Activations(range="minmax")},
    "least squared error, auto": {},
}
# On spread LayerNorm channels; the first three quantize them with one range that all must share.
SPREAD_METHODS: dict[str, Method] = {
    "RepQ-ViT, not reparameterized": lambda m, x, s, how: repq_vit(m, x, s, activations=CHANNELS_LEFT, progress=False),
    **{name: METHODS[name] for name in ("min-max", "percentile", BASELINE, "ERQ", "I&S-ViT, SULQ", "I&S-ViT")},
}
NOT_REPARAMETERIZED = ("RepQ-ViT, not reparameterized", "min-max", "percentile")
# Points of accuracy above the baseline at W3A3 that the recipes promise.
PROMISED = {"ERQ": 5.0, "I&S-ViT": 5.0, BEST: 7.0}


@dataclass
class Result:
    scheme: str
    method: str
    seed: int
    figures: dict[str, float]
    seconds: float
    softmax: str  # which quantizers its outputs got
    report: Report

    def to_dict(self) -> dict[str, Any]:
        keys = ("scheme", "method", "seed", "figures", "seconds", "softmax")
        return {key: getattr(self, key) for key in keys} | {"tried": self.report.details.get("softmax", {})}


def run(out: str | Path, *, schemes: Sequence[str] = SCHEMES, seeds: int = SEEDS, quick: bool = False) -> bool:
    """Trains (or finds) the networks, prints every result and the tables, and writes ``vit.html`` and ``vit.json``.

    Returns whether the promised differences were reached; always true after ``quick``.
    """
    began = time.perf_counter()
    folder, how = Path(out), QUICK if quick else SOS
    folder.mkdir(parents=True, exist_ok=True)
    results, uneven, floats = [], [], []
    for seed in range(1 if quick else seeds):
        case = load(seed, folder, quick)
        floats.append(judged(case, case.model))
        print(f"{case.name}, seed {seed}: float {figures_text(floats[-1])}; {time.perf_counter() - began:.0f} s")
        results += list(compare(case, METHODS, schemes, seed, how))
        if seed == 0:
            print("spread LayerNorm channels:")
            wide = copy.copy(case)
            wide.model = spread_channels(case.model, seed)
            uneven = list(compare(wide, SPREAD_METHODS, [SPREAD_SCHEME], seed, how))
    tables = [quality_table(case, floats, results), spread_table(results, uneven), softmax_table(results)]
    tables.append(recogniser_table(folder, quick))
    checks = promises(results, uneven)
    tables.append(check_table(checks))
    for table in tables:
        print(f"\n{table}")
    write_results(folder, floats, results, uneven, tables)
    print(f"\n{time.perf_counter() - began:.0f} s in all; wrote {folder / 'vit.html'} and vit.json")
    return quick or all(passed for *_, passed in checks)


def load(seed: int, folder: Path, quick: bool) -> Case:
    size = {"steps": 2, "judged": 250} if quick else {}
    case = glyph_vit.load(seed, cache=None if quick else folder / "trained", **size)
    if quick:
        case.calibration = case.calibration[:2]
    return case


def judged(case: Case, model: nn.Module) -> dict[str, float]:
    with torch.no_grad():
        return case.judge(model)


def compare(
    case: Case, methods: dict[str, Method], schemes: Sequence[str], seed: int, how: Training
) -> Iterator[Result]:
    for scheme in schemes:
        for name, method in methods.items():
            model, began = copy.deepcopy(case.model), time.perf_counter()
            report = method(model, case.calibration, scheme, how)
            seconds = time.perf_counter() - began
            softmax = ", ".join(sorted({a.quantizer for a in report.activations if a.kind == "softmax"}))
            result = Result(scheme, name, seed, judged(case, model), seconds, softmax, report)
            print(f"  {scheme} {name:<32} {figures_text(result.figures)}, softmax {softmax}, {seconds:.1f} s")
            yield result


def spread_channels(model: nn.Module, seed: int) -> nn.Module:
    """A copy that computes the same with LayerNorm channels as uneven as those of large transformers.

    Gamma and beta are multiplied by a log-normal factor (.5, three channels by 10 more), the next layer's columns
    divided by it.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.blocks:  # type: ignore[union-attr]
            for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.fc1)):
                factor = torch.exp(0.5 * torch.randn(len(norm.weight), generator=generator))
                factor[torch.randperm(len(factor), generator=generator)[:3]] *= 10
                norm.weight *= factor
                norm.bias *= factor
                layer.weight /= factor
    return model


# --- what is shown ---


def figures_of(results: Sequence[Result], scheme: str, method: str, key: str) -> list[float]:
    return [r.figures[key] for r in results if (r.scheme, r.method) == (scheme, method)]


def quality_table(case: Case, floats: Sequence[dict[str, float]], results: Sequence[Result]) -> Table:
    """Mean and deviation over the seeds."""
    schemes = list(dict.fromkeys(r.scheme for r in results))
    columns = ["method", *(f"{scheme} {key}" for scheme in schemes for key in ("accuracy %", "KL")), "seconds"]
    rows = [["float", *[spread([f["accuracy %"] for f in floats]), "0"] * len(schemes), ""]]
    for name in METHODS:
        row = [name]
        for scheme in schemes:
            row.append(spread(figures_of(results, scheme, name, "accuracy %")))
            row.append(spread(figures_of(results, scheme, name, "KL"), digits=3))
        rows.append([*row, f"{mean(r.seconds for r in results if r.method == name):.1f}"])
    about = (
        f"{case.about}. Accuracy and KL divergence to the float network, mean and deviation of {len(floats)} networks. "
        "First and last layer 8 bits. ERQ: softmax quantizer measured; log sqrt 2: the published one. "
        f"SOS: {SOS.iterations} iterations a unit and stage at rate {SOS.rate:g}."
    )
    return Table("Vision transformer", columns, rows, about)


def spread_table(results: Sequence[Result], uneven: Sequence[Result]) -> Table:
    rows = []
    for r in uneven:
        even = next((e for e in results if (e.scheme, e.method, e.seed) == (r.scheme, r.method, r.seed)), None)
        before = "" if even is None else f"{even.figures['accuracy %']:.2f}"
        rows.append([r.method, before, f"{r.figures['accuracy %']:.2f}", f"{r.figures['KL']:.3f}"])
    about = (
        f"The first network at {SPREAD_SCHEME}, and the same function with LayerNorm channels spread by a log-normal "
        "factor (.5) and three of them by 10 more, which the next layer divides out."
    )
    return Table("Spread channels", ["method", "even channels %", "spread channels %", "KL"], rows, about)


def recogniser_table(folder: Path, quick: bool) -> Table:
    """The same characters, read by convolutions, as quantize_ quantizes them."""
    size = {"steps": 2, "judged": 250} if quick else {}
    case = text_recogniser.load(cache=None if quick else folder / "trained", **size)
    rows = [["float", "", f"{judged(case, case.model)['accuracy %']:.2f}", "0"]]
    for scheme in ("W4A8", "W4A4"):
        for name, options in CONVOLUTIONS.items():
            model = copy.deepcopy(case.model)
            quantize_(model, scheme, case.calibration, progress=False, **options)
            figures = judged(case, model)
            rows.append([name, scheme, f"{figures['accuracy %']:.2f}", f"{figures['KL']:.4f}"])
    return Table("Text recogniser", ["method", "scheme", "accuracy %", "KL"], rows, case.about)


def softmax_table(results: Sequence[Result]) -> Table:
    """What was measured, and chosen, per bit width."""
    rows = []
    for scheme in dict.fromkeys(r.scheme for r in results):
        chosen = [r for r in results if r.scheme == scheme and r.method == BEST]
        tried = [r.report.details["softmax"] for r in chosen]
        errors = ", ".join(f"{name} {mean(errors[name] for errors in tried):.4f}" for name in tried[0])
        rows.append([scheme, "; ".join(r.softmax for r in chosen), errors])
    about = (
        "Relative squared error of the model's outputs with all activations quantized, weights float; mean of seeds."
    )
    return Table("Softmax quantizers", ["scheme", "chosen, by seed", "error"], rows, about)


Check = tuple[str, str, bool]  # rule, what was measured, whether it holds


def promises(results: Sequence[Result], uneven: Sequence[Result]) -> list[Check]:
    def average(scheme: str, method: str, key: str) -> float:
        return mean(figures_of(results, scheme, method, key))

    found: list[Check] = []
    schemes = {r.scheme for r in results}
    for name, least in PROMISED.items() if "W3A3" in schemes else ():
        gain = average("W3A3", name, "accuracy %") - average("W3A3", BASELINE, "accuracy %")
        found.append((f"W3A3: {name} {least:g} points above {BASELINE}", f"{gain:+.2f}", gain >= least))
    if "W4A4" in schemes:
        ours, theirs = (average("W4A4", name, "KL") for name in ("ERQ", BASELINE))
        found.append((f"W4A4: ERQ's KL below {BASELINE}'s", f"{ours:.4f} against {theirs:.4f}", ours < theirs))
    kept = [r.figures["accuracy %"] for r in uneven if r.method not in NOT_REPARAMETERIZED]
    lost = [r.figures["accuracy %"] for r in uneven if r.method in NOT_REPARAMETERIZED]
    if uneven:
        text = f"at least {min(kept):.1f} % against at most {max(lost):.1f} %"
        found.append(("spread channels: reparameterized recipes hold, others fall", text, min(kept) > 2 * max(lost)))
    return found


def check_table(checks: Sequence[Check]) -> Table:
    rows = [[rule, text, "PASS" if passed else "FAIL"] for rule, text, passed in checks]
    return Table("Checks", ["rule", "measured", "result"], rows, "Means over the seeds.")


def write_results(
    folder: Path,
    floats: Sequence[dict[str, float]],
    results: Sequence[Result],
    uneven: Sequence[Result],
    tables: Sequence[Table],
) -> None:
    content = {
        "float": list(floats),
        "results": [r.to_dict() for r in results],
        "spread": [r.to_dict() for r in uneven],
    }
    write_atomically(folder / "vit.json", as_json(content))
    shown = [r for r in results if r.seed == 0 and r.method in ("ERQ", BEST) and r.scheme == results[0].scheme]
    write_html(
        folder / "vit.html",
        {f"{r.method} at {r.scheme}, layer by layer": r.report for r in shown},
        title="torchquant demo: vision transformer",
        tables=tables,
    )
