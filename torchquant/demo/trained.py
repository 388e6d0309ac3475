"""Networks trained on the spot are kept, so that a table is quick to make again."""

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

log = logging.getLogger(__name__)


def content_key(settings: dict[str, Any], code: Sequence[Any], data: Sequence[Tensor] = ()) -> str:
    """Changes with the settings, the text of functions and classes, the training data and the version of torch."""
    digest = hashlib.sha256(json.dumps([settings, torch.__version__], sort_keys=True).encode())
    for part in code:
        digest.update(inspect.getsource(part).encode())
    for tensor in data:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def trained(
    name: str, key: str, make: Callable[[], nn.Module], train: Callable[[], nn.Module], cache: Path | None
) -> nn.Module:
    """``train()``, or ``make()`` with the weights that an earlier call with this ``key`` left in ``cache``."""
    path = None if cache is None else Path(cache) / f"{name}-{key}.safetensors"
    if path is not None and path.is_file():
        model = make()
        model.load_state_dict(load_file(path))
        log.info("%s: trained before, read from %s", name, path)
        return model.eval()
    model = train()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file(model.state_dict(), part)
        part.replace(path)
    return model
