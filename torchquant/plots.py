"""The figures of the HTML report, as data URIs. Needs matplotlib (the extra ``report``)."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from .report import Chart, Report

STYLE = {
    "font.size": 9.0,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a94a3",
    "axes.labelcolor": "#3b4654",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ee",
    "xtick.color": "#3b4654",
    "ytick.color": "#3b4654",
    "legend.frameon": False,
    "svg.hashsalt": "torchquant",  # the same report gives the same file
}
ROUNDING, RESULT, GRID_LINE = "#c3553b", "#2266aa", "#d58b1c"
COLORS = ("#8a94a3", "#d58b1c", "#3a8f5f", "#c3553b", "#7a5ea8", "#2266aa")
MOST_LAYERS = 60  # drawn in one figure; a longer list would be unreadable


@dataclass
class Drawing:
    """A figure with its heading and the sentence that says how to read it."""

    title: str
    about: str
    uri: str


def as_uri(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


def figures_of(report: Report) -> list[Drawing]:
    """Every figure that the report has data for."""
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        made = [errors(report), histogram(report), largest(report), winners(report)]
    return [drawing for drawing in made if drawing is not None]


def errors(report: Report) -> Drawing | None:
    """Relative output error of every layer: rounding and result, joined by a line."""
    layers = [layer for layer in report.layers if layer.error > 0 and layer.error_rtn > 0]
    shown = sorted(sorted(layers, key=lambda layer: -layer.error)[:MOST_LAYERS], key=layers.index)
    if not shown:
        return None
    figure = Figure(figsize=(9, 1.1 + 0.17 * len(shown)))
    axes = figure.subplots()
    places = range(len(shown))
    before, after = [layer.error_rtn for layer in shown], [layer.error for layer in shown]
    axes.hlines(places, after, before, color="#c9d0d9", linewidth=2)
    axes.scatter(before, places, color=ROUNDING, s=16, label="rounded to nearest", zorder=3)
    axes.scatter(after, places, color=RESULT, s=16, label="result", zorder=3)
    axes.set_yticks(places, [layer.name for layer in shown], fontsize=7)
    axes.set_ylim(len(shown) - 0.3, -0.7)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))
    axes.set_xlabel("relative output error")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    worst = "" if len(shown) == len(layers) else f" The {len(shown)} layers with the largest error of {len(layers)}."
    about = f"Relative output error on the calibration data, log scale.{worst}"
    return Drawing("Error per layer", about, as_uri(figure))


def histogram(report: Report) -> Drawing | None:
    """The worst layer's float weights, each row in units of its own grid, and the levels."""
    found: Mapping[str, Mapping[str, Any]] = report.details.get("histograms", {})
    known = [layer for layer in report.layers if layer.name in found and not math.isnan(layer.error)]
    if not known:
        return None
    layer = max(known, key=lambda item: item.error)
    data = found[layer.name]
    low, high, counts = data["low"], data["high"], data["counts"]
    step = (high - low) / len(counts)
    figure = Figure(figsize=(9, 2.6))
    axes = figure.subplots()
    share = [100 * count / max(sum(counts), 1) for count in counts]
    axes.bar([low + step * (i + 0.5) for i in range(len(counts))], share, width=step, color=RESULT, alpha=0.6)
    for code in range(data["levels"]):
        axes.axvline(code, color=GRID_LINE, linewidth=1.2, zorder=0.5, label="grid level" if code == 0 else None)
    axes.set_xlim(low, high)
    axes.set_xlabel("weight / scale + zero point of its own row: a level's place is its code")
    axes.set_ylabel("% of weights")
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper right")
    about = (
        f"{layer.name}, the layer with the largest error ({layer.error:.4f}), {layer.bits} bits. Weights beyond the "
        "first or last level are clipped; those beyond the axis are counted in its end bars."
    )
    return Drawing("Weights and grid", about, as_uri(figure))


def largest(report: Report) -> Drawing | None:
    """MagR's effect: mean over rows of the largest magnitude, after / before."""
    found: Mapping[str, Sequence[float]] = report.details.get("magr", {})
    names = [layer.name for layer in report.layers if layer.name in found and found[layer.name][0] > 0][:MOST_LAYERS]
    if not names:
        return None
    ratios = [found[name][1] / found[name][0] for name in names]
    figure = Figure(figsize=(9, 2.6))
    axes = figure.subplots()
    axes.bar(range(len(names)), ratios, color=RESULT, alpha=0.75, width=0.7)
    axes.axhline(1, color=ROUNDING, linewidth=1)
    axes.set_xticks(range(len(names)), names, fontsize=6, rotation=60, ha="right", rotation_mode="anchor")
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("max |w| after / before")
    about = (
        "Mean over rows of the largest magnitude after MagR, relative to before: the range that a grid has to cover."
    )
    return Drawing("MagR: largest magnitudes", about, as_uri(figure))


def winners(report: Report) -> Drawing | None:
    """Rows that each candidate of ``auto`` won."""
    totals: dict[str, int] = {}
    for layer in report.layers:
        for name, rows in layer.winners.items():
            totals[name] = totals.get(name, 0) + rows
    if len(totals) < 2:
        return None
    names = sorted(totals, key=lambda name: totals[name])
    figure = Figure(figsize=(9, 0.7 + 0.26 * len(names)))
    axes = figure.subplots()
    bars = axes.barh(range(len(names)), [totals[name] for name in names], color=RESULT, alpha=0.75, height=0.65)
    everything = sum(totals.values())
    axes.bar_label(bars, [f"{100 * totals[name] / everything:.1f} %" for name in names], padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("rows won")
    about = "Rows for which each candidate had the lowest output error, over all layers."
    return Drawing("Winners", about, as_uri(figure))


def quality(charts: Sequence[Chart]) -> list[Drawing]:
    """One panel a network, side by side: the whole network's quality by bits."""
    if not charts:
        return []
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        panels = figure.subplots(1, len(charts), squeeze=False)[0]
        for chart, axes in zip(charts, panels, strict=True):
            axes.axhline(chart.float_value, color="#111827", linestyle="--", linewidth=1, label="float")
            for color, (name, values) in zip(COLORS, chart.lines.items(), strict=False):
                axes.plot(range(len(values)), values, marker="o", markersize=4, color=color, label=name)
            axes.set_xticks(range(len(chart.bits)), [f"{bits} bits" for bits in chart.bits])
            axes.set_title(chart.title)
            axes.set_ylabel(chart.headline)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        return [Drawing("Quality", "Of the whole networks, by weight bits and method.", as_uri(figure))]
