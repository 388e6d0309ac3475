"""Resume: one file per finished layer, written atomically, and a fingerprint of everything the results depend on."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from .calibrate import tensor_bytes
from .report import LayerReport
from .solve import Solution

FINGERPRINT = "fingerprint.json"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` to a temporary file beside ``path``, flush, rename: there is never half a file under its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def weights_fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


class Checkpoint:
    """The folder of a run. ``fingerprint``: part -> value; a folder that was begun with other values is refused."""

    def __init__(self, folder: str | Path, fingerprint: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / FINGERPRINT
        wanted = json.loads(json.dumps(fingerprint))
        if path.exists():
            try:
                found = json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"checkpoint_dir: {path} cannot be read: {error}") from None
            changed = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
            if changed:
                raise ValueError(
                    f"checkpoint_dir: {self.folder} belongs to another run: {', '.join(changed)} changed; "
                    "pass an empty folder or repeat that run exactly"
                )
        else:
            text = json.dumps(wanted, indent=1)
            write_atomically(path, lambda temporary: temporary.write_text(text))

    def path(self, name: str) -> Path:
        """Readable, and distinct even where names differ only in what a file name cannot hold."""
        safe = re.sub(r"[^\w.-]", "_", name)[-80:]
        return self.folder / f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.safetensors"

    def save(self, layer: LayerReport, solution: Solution) -> None:
        tensors = {key: getattr(solution, key) for key in ("codes", "scale", "zero_point", "bias")}
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items() if tensor is not None}
        metadata = {"layer": json.dumps(asdict(layer)), "largest": json.dumps(solution.largest)}
        write_atomically(
            self.path(layer.name), lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        )

    def load(self, name: str) -> tuple[LayerReport, Solution] | None:
        """A finished layer, None when there is none."""
        path = self.path(name)
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dictionary)
                metadata = file.metadata()
            layer = json.loads(metadata["layer"])
            largest = json.loads(metadata["largest"])
        except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"checkpoint_dir: {path} cannot be read: {error}") from None
        layer["shape"] = tuple(layer["shape"])
        report = LayerReport(**layer)
        return report, Solution(**tensors, status=report.status, largest=None if largest is None else tuple(largest))
