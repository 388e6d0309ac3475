"""Files: one module per format."""

from pathlib import Path
from typing import Any

from torch import nn

from .native import load, save
from .onnx import export_onnx

EXPORTERS = {"onnx": export_onnx}


def export(model: nn.Module, path: str | Path, format: str, **options: Any) -> None:
    """Write a quantized model for other software; the model itself stays as it is.

    Args:
        path: a file or a folder, as the format has it.
        format: ``"onnx"``: see :func:`torchquant.formats.onnx.export_onnx`, for its options too.

    Raises:
        ValueError: an unknown format, and what the format cannot hold. TypeError: an option that the format has not.
    """
    if format not in EXPORTERS:
        raise ValueError(f"export: format must be one of {', '.join(EXPORTERS)}, got {format!r}")
    EXPORTERS[format](model, path, **options)


__all__ = ["export", "load", "save"]
