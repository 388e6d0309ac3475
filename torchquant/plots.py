"""The figures of the HTML report, as data URIs. Needs matplotlib (the extra ``report``)."""

import base64
import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from .report import ActivationReport, Chart, Pictures, Report

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
NOTEBOOK_DPI = 72
SENSITIVITY_COLORS = ("#2266aa", "#c3553b", "#3a8f5f", "#7a5ea8", "#8a94a3", "#d58b1c")
MOST_LAYERS = 60  # drawn in one figure; a longer list would be unreadable

P = ParamSpec("P")


@dataclass
class Drawing:
    """A figure with its heading and the sentence that says how to read it. Notebooks show it as a picture."""

    title: str
    about: str
    figure: Figure

    @property
    def uri(self) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(self.written("svg", metadata={"Date": None})).decode()

    def written(self, kind: str, **options: Any) -> bytes:
        stream = io.BytesIO()
        with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
            self.figure.savefig(stream, format=kind, bbox_inches="tight", **options)
        return stream.getvalue()

    def _repr_png_(self) -> bytes:
        return self.written("png", dpi=NOTEBOOK_DPI)


def styled(draw: Callable[P, Drawing | None]) -> Callable[P, Drawing | None]:
    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Drawing | None:
        with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
            return draw(*args, **kwargs)

    return drawn


def figures_of(report: Report) -> list[Drawing]:
    """Every figure that the report has data for."""
    figures = (errors, sensitivity, activations, attention, histogram, largest, winners)
    return [drawing for draw in figures if (drawing := draw(report)) is not None]


@styled
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
    return Drawing("Error per layer", about, figure)


@styled
def activations(report: Report, names: Sequence[str] | None = None) -> Drawing | None:
    """Activations with the levels that were chosen for them: by default the worst input, operand and softmax."""
    known: Mapping[str, Mapping[str, Any]] = report.details.get("activations", {})
    shown = worst_activations(report, known) if names is None else [report.activation(name) for name in names]
    if not shown:
        return None
    figure = Figure(figsize=(9, 2.2 * len(shown)), layout="constrained")
    for found, axes in zip(shown, figure.subplots(len(shown), squeeze=False)[:, 0], strict=True):
        draw_levels(axes, known[found.name])
        error = "" if math.isnan(found.error) else f", error {found.error:.4f}"
        axes.set_title(f"{found.name} ({found.kind}): {found.quantizer}, {found.bits} bits{error}", fontsize=8)
    chosen = "With the largest error of each kind. " if names is None else ""
    about = f"{chosen}Values on a few calibration samples and the levels; those beyond the axis are in its end bars."
    return Drawing("Activations and their levels", about, figure)


def worst_activations(report: Report, known: Mapping[str, Any]) -> list[ActivationReport]:
    """The layer input, the query, key or value, and the softmax with the largest errors."""
    kinds: dict[str, list[ActivationReport]] = {}
    for found in report.activations:
        if found.name in known:
            kinds.setdefault(found.kind if found.kind in ("input", "softmax") else "operand", []).append(found)
    return [max(group, key=lambda item: -1 if math.isnan(item.error) else item.error) for group in kinds.values()]


def draw_levels(axes: Axes, data: Mapping[str, Any]) -> None:
    low, high, counts = data["low"], data["high"], data["counts"]
    step = (high - low) / len(counts)
    share = [100 * count / max(sum(counts), 1) for count in counts]
    axes.bar([low + step * (i + 0.5) for i in range(len(counts))], share, width=step, color=RESULT, alpha=0.6)
    for index, level in enumerate(data["levels"]):
        axes.axvline(level, color=GRID_LINE, linewidth=0.9, zorder=0.5, label=None if index else "level")
    if data["log2"]:
        axes.xaxis.set_major_formatter(lambda value, position: f"$2^{{{value:g}}}$")
    axes.set_xlim(low, high)
    axes.set_xlabel(data["unit"])
    axes.set_ylabel("% of values")
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper right")


@styled
def attention(report: Report) -> Drawing | None:
    """The attention head that changed most, before and after, on one scale."""
    found: Mapping[str, Any] = report.details.get("attention", {})
    if not found:
        return None
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    panels = figure.subplots(1, 2)
    top = max(max(map(max, found["before"])), max(map(max, found["after"])))
    for axes, when in zip(panels, ("before", "after"), strict=True):
        image = axes.imshow(found[when], vmin=0, vmax=top, cmap="magma", interpolation="nearest")
        axes.set_title(when)
        axes.grid(visible=False)
        axes.set_xlabel("attends to token")
    panels[0].set_ylabel("token")
    figure.colorbar(image, ax=panels, shrink=0.8)
    about = (
        f"{found['name']}, head {found['head']}, on one calibration sample: of all heads the one that quantization "
        f"changed most (by {100 * found['change']:.0f} %). At most {len(found['before'])} tokens are drawn."
    )
    return Drawing("Attention before and after", about, figure)


@styled
def sensitivity(report: Report) -> Drawing | None:
    """How much the network's output changes when one thing alone is quantized."""
    found: Mapping[str, Mapping[str, float | None]] = report.details.get("sensitivity", {})
    largest = {name: max((v for v in parts.values() if v), default=0.0) for name, parts in found.items()}
    shown = sorted((name for name in found if largest[name] > 0), key=lambda name: -largest[name])[:MOST_LAYERS]
    shown = [name for name in found if name in shown]
    if not shown:
        return None
    figure = Figure(figsize=(9, 1.1 + 0.17 * len(shown)))
    axes = figure.subplots()
    for what, color in zip(("weights", "input", "query", "key", "value", "softmax"), SENSITIVITY_COLORS, strict=True):
        places = [place for place, name in enumerate(shown) if found[name].get(what)]
        values = [found[shown[place]][what] for place in places]
        if places:
            axes.scatter(values, places, color=color, s=18, label=what, zorder=3)  # type: ignore[arg-type]
    axes.set_yticks(range(len(shown)), shown, fontsize=7)
    axes.set_ylim(len(shown) - 0.3, -0.7)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.2, 0.4)))
    axes.set_xlabel("relative change of the network's output")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=6)
    less = "" if len(shown) == len(found) else f" The {len(shown)} most sensitive of {len(found)}."
    about = f"The network's output when this alone is quantized, on a few calibration samples, log scale.{less}"
    return Drawing("Sensitivity", about, figure)


@styled
def pictures(shown: Pictures) -> Drawing:
    """Rows of pictures, a column each version."""
    rows, columns = len(shown.rows), len(shown.columns)
    figure = Figure(figsize=(9, 0.3 + 9 / columns * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for row, (name, versions) in enumerate(shown.rows.items()):
        for column, version in enumerate(versions):
            axes = panels[row][column]
            axes.imshow(version, vmin=0, vmax=1, cmap="gray", interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(shown.columns[column], fontsize=9)
        panels[row][0].set_ylabel(name, fontsize=8)
    return Drawing(shown.title, shown.about, figure)


@styled
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
    return Drawing("Weights and grid", about, figure)


@styled
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
    return Drawing("MagR: largest magnitudes", about, figure)


@styled
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
    return Drawing("Winners", about, figure)


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
        return [Drawing("Quality", "Of the whole networks, by weight bits and method.", figure)]
