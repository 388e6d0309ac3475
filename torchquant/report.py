"""What a quantization run did, layer by layer: a table for the terminal, JSON, and one self-contained HTML page."""

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OK = "ok"


@dataclass
class LayerReport:
    """One layer. Errors are relative output errors on the calibration data: ``|| X W^T - X Q^T || / || X W^T ||``."""

    name: str
    type: str
    method: str = ""
    scheme: str = ""
    bits: int = 0
    group_size: int = 0
    shape: tuple[int, int] = (0, 0)  # (N outputs, K inputs) of the matrix that was quantized
    error_rtn: float = float("nan")
    error: float = float("nan")
    dead_channels: int = 0
    damping: int = 0  # times the Gram's damping was raised
    tokens: int = 0
    status: str = OK  # "ok" | "damped" | "rounded" | "skipped: <reason>"
    seconds: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0
    winners: dict[str, int] = field(default_factory=dict)  # candidate -> rows it won

    @property
    def skipped(self) -> bool:
        return self.status.startswith("skipped")

    @property
    def ratio(self) -> float:
        """Error relative to rounding; NaN where rounding is exact or either is unknown."""
        return self.error / self.error_rtn if self.error_rtn > 0 else float("nan")


@dataclass
class ActivationReport:
    """One quantized activation. The error is ``|| x~ - x || / || x ||`` on the calibration data."""

    name: str  # of the layer whose input it is, or of the attention's operand
    kind: str  # "input", "query", "key", "value" or "softmax"
    quantizer: str
    bits: int
    low: float = float("nan")  # lowest and highest value of the quantizer; unknown where it adapts to each input
    high: float = float("nan")
    error: float = float("nan")


@dataclass
class Table:
    """A further table of the page: rows of text, and what a reader must know of them."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    about: str = ""

    def __str__(self) -> str:
        return "\n".join([self.title, *([self.about] if self.about else []), *aligned([self.columns, *self.rows])])


@dataclass
class Chart:
    """A quality figure of one network: a line a method over the bit widths, and the float model's value."""

    title: str
    headline: str
    bits: list[int]
    lines: dict[str, list[float]]
    float_value: float


@dataclass
class Pictures:
    """Pictures side by side: ``[H, W]`` or ``[H, W, 3]`` in 0..1, a row each picture, a column each version."""

    title: str
    about: str
    columns: list[str]
    rows: dict[str, list[Any]]


@dataclass
class Report:
    """The layers of one run, in the order of the model's modules.

    ``details`` holds what is only drawn: ``"histograms"``, layer -> ``{"low", "high", "levels", "counts"}`` (float
    weights in units of their row's grid, where code k lies at k), and ``"magr"``, layer -> mean over rows of max
    ``|w|``, before and after MagR. Where activations are quantized, also what :mod:`torchquant.views` measures:
    ``"activations"``, ``"attention"`` and ``"sensitivity"``.
    """

    layers: list[LayerReport] = field(default_factory=list)
    seconds: float = 0.0
    scheme: str = ""
    method: str = ""
    seed: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    activations: list[ActivationReport] = field(default_factory=list)

    def activation(self, name: str) -> ActivationReport:
        """Of a layer's input, or of an attention's operand."""
        for found in self.activations:
            if found.name == name:
                return found
        raise KeyError(f"report: no quantized activation named {name!r}")

    def __getitem__(self, name: str) -> LayerReport:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"report: no layer named {name!r}")

    @property
    def not_ok(self) -> int:
        return sum(layer.status != OK for layer in self.layers)

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    def mean_ratio(self) -> float:
        """Geometric mean, over layers, of the error relative to rounding."""
        return geometric_mean([layer.ratio for layer in self.layers])

    def __str__(self) -> str:
        rows = [["layer", "type", "scheme", "method", "rtn error", "error", "of rtn", "kB", "s", "status"]]
        for layer in self.layers:
            kilobytes = f"{layer.bytes_before / 1e3:.1f} > {layer.bytes_after / 1e3:.1f}"
            figures = [f"{layer.error_rtn:.4f}", f"{layer.error:.4f}", f"{layer.ratio:.3f}", kilobytes]
            head = [layer.name, layer.type, layer.scheme, layer.method]
            rows.append([*head, *figures, f"{layer.seconds:.2f}", layer.status])
        return "\n".join([*aligned(rows, text_columns=(0, 1, 2, 3, 9)), *self.activation_lines(), self.summary()])

    def activation_lines(self) -> list[str]:
        """The table of quantized activations; nothing where there are none."""
        if not self.activations:
            return []
        rows = [["activation", "kind", "quantizer", "bits", "low", "high", "error"]]
        for found in self.activations:
            figures = [f"{value:.4f}" for value in (found.low, found.high, found.error)]
            rows.append([found.name, found.kind, found.quantizer, str(found.bits), *figures])
        return ["", *aligned(rows, text_columns=(0, 1, 2)), ""]

    def summary(self) -> str:
        """The last line of the table: what a reader must not miss."""
        size = f"{self.bytes_before / 1e6:.2f} MB > {self.bytes_after / 1e6:.2f} MB"
        ratio = f"error {self.mean_ratio():.3f} of rounding (geometric mean)"
        return f"{len(self.layers)} layers in {self.seconds:.1f} s, {size}, {ratio}, {self.not_ok} not ok"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Report":
        """The inverse of to_dict, also of what to_json wrote (there an unknown error is null)."""
        layers = [{**layer, "shape": tuple(layer["shape"])} for layer in values["layers"]]
        for layer in layers:
            layer.update({key: float("nan") for key in ("error_rtn", "error") if layer[key] is None})
        activations = [ActivationReport(**known(found)) for found in values.get("activations", ())]
        return cls(**{**values, "layers": [LayerReport(**layer) for layer in layers], "activations": activations})

    def to_json(self, path: str | Path) -> None:
        write_atomically(path, as_json(self.to_dict()))

    @classmethod
    def from_json(cls, path: str | Path) -> "Report":
        """Raises ValueError when the file is not a report."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"report: {path} is not a report written by to_json ({error})") from None

    def to_html(self, path: str | Path) -> None:
        """One file without outside resources. Needs the extra ``report``: jinja2 and matplotlib."""
        write_html(path, {"": self})


def known(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's null is NaN."""
    return {key: float("nan") if value is None else value for key, value in values.items()}


def geometric_mean(values: Sequence[float]) -> float:
    """Of the known ones; 0 when one is 0, NaN when there is none."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return float("nan")
    return 0.0 if min(known) == 0 else math.exp(sum(map(math.log, known)) / len(known))


def aligned(rows: Sequence[Sequence[str]], text_columns: Sequence[int] = (0,)) -> list[str]:
    """Rows as lines, every column as wide as its widest cell; numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = enumerate(zip(row, widths, strict=True))
        return "  ".join(c.ljust(w) if i in text_columns else c.rjust(w) for i, (c, w) in cells).rstrip()

    return [line(rows[0]), "  ".join("-" * width for width in widths), *map(line, rows[1:])]


def as_json(value: Any) -> str:
    """Strict JSON: NaN and infinity become null."""

    def clean(part: Any) -> Any:
        if isinstance(part, float) and not math.isfinite(part):
            return None
        if isinstance(part, Mapping):
            return {str(key): clean(inner) for key, inner in part.items()}
        return [clean(inner) for inner in part] if isinstance(part, (list, tuple)) else part

    return json.dumps(clean(value), indent=1, allow_nan=False) + "\n"


def write_atomically(path: str | Path, text: str) -> None:
    """The file is there as a whole or not at all."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's own mode would keep everybody else from reading a report
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_html(
    path: str | Path,
    reports: Mapping[str, Report],
    *,
    title: str = "Quantization report",
    tables: Sequence[Table] = (),
    charts: Sequence[Chart] = (),
    pictures: Sequence[Pictures] = (),
) -> None:
    """One page of several reports (heading -> report), with further tables, charts and pictures before them."""
    try:
        import jinja2

        from . import plots
    except ImportError as error:
        raise ImportError(
            f"torchquant: an HTML report needs {error.name}; install it with `pip install torchquant[report]`"
        ) from None
    source = (Path(__file__).parent / "templates" / "report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    drawn = {heading: plots.figures_of(report) for heading, report in reports.items()}
    page = environment.from_string(source).render(
        title=title, reports=reports, tables=tables, drawn=drawn, isnan=math.isnan,
        charts=[*plots.quality(charts), *map(plots.pictures, pictures)],
    )  # fmt: skip
    write_atomically(path, page)
