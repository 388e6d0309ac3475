"""What a quantization run did, layer by layer: a table for the terminal, and data for JSON, HTML and plots."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OK = "ok"


@dataclass
class LayerReport:
    """One layer. Errors are relative output errors on the calibration data: || X (W - Q)^T || / || X W^T ||."""

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


@dataclass
class Report:
    """The layers of one run, in the order of the model's modules."""

    layers: list[LayerReport] = field(default_factory=list)
    seconds: float = 0.0
    scheme: str = ""
    method: str = ""
    seed: int = 0
    details: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> LayerReport:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"report: no layer named {name!r}")

    def __str__(self) -> str:
        lines = [f"{'layer':<40} {'scheme':<14} {'method':<12} {'rtn':>8} {'error':>8}  status"]
        for layer in self.layers:
            head = f"{layer.name:<40} {layer.scheme:<14} {layer.method:<12}"
            lines.append(f"{head} {layer.error_rtn:8.4f} {layer.error:8.4f}  {layer.status}")
        wrong = sum(layer.status != OK for layer in self.layers)
        lines.append(f"{len(self.layers)} layers in {self.seconds:.1f} s, {wrong} not ok")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=1))
