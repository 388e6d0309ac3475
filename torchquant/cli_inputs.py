"""What the command line is given: models and calibration data, by name or by file."""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def load_model(source: str) -> nn.Module:
    """``module:factory`` (called without arguments) or a directory that Hugging Face's ``save_pretrained`` wrote."""
    if Path(source).is_dir():
        return from_directory(Path(source))
    module_name, colon, factory_name = source.partition(":")
    if not colon:
        raise ValueError(f"model: expected module:factory or a Hugging Face directory, got {source!r}")
    sys.path.insert(0, "")  # as `python -m` does: modules of the current directory are found
    made = getattr(importlib.import_module(module_name), factory_name)()
    if not isinstance(made, nn.Module):
        raise ValueError(f"model: {source} returned {type(made).__name__}, not a torch.nn.Module")
    return made


def from_directory(folder: Path) -> nn.Module:
    """The class is the one that the directory's configuration names; nothing is downloaded."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    names = config.architectures or []
    architecture = getattr(transformers, names[0], None) if names else None
    if architecture is None:
        raise ValueError(f"model: {folder / 'config.json'} names no architecture that transformers has ({names})")
    loaded: nn.Module = architecture.from_pretrained(folder, local_files_only=True)
    return loaded


def load_calibration(
    path: Path, model_source: str, *, byte_level: bool, length: int, samples: int, batch: int
) -> list[Any]:
    """Batches from a ``.pt``, ``.npy`` or ``.safetensors`` file of inputs; any other file is text to be tokenized."""
    if path.suffix == ".pt":
        data = torch.load(path, weights_only=True)
    elif path.suffix == ".npy":
        import numpy

        data = torch.from_numpy(numpy.load(path, allow_pickle=False))
    elif path.suffix == ".safetensors":
        from safetensors.torch import load_file

        data = load_file(path)
        data = next(iter(data.values())) if len(data) == 1 else data
    else:
        tokens = text_tokens(path, None if byte_level else Path(model_source))
        data = {"input_ids": excerpts(tokens, length, samples)}
    return in_batches(data, batch)


def in_batches(data: Any, size: int) -> list[Any]:
    """Tensors, and dictionaries of tensors, are cut along their first dimension; a list is already one of batches."""
    if isinstance(data, Tensor):
        return list(data.split(size))
    if isinstance(data, Mapping):
        parts = {key: tensor.split(size) for key, tensor in data.items()}
        lengths = {len(part) for part in parts.values()}
        if len(lengths) != 1:
            raise ValueError("calib: its tensors differ in their first dimension")
        return [{key: part[i] for key, part in parts.items()} for i in range(lengths.pop())]
    if isinstance(data, (list, tuple)):
        return list(data)
    raise ValueError(
        f"calib: expected a tensor, a dictionary of tensors or a list of batches, got {type(data).__name__}"
    )


def text_tokens(path: Path, model_folder: Path | None) -> Tensor:
    """All of a text file as token ids ``[T]``: the model's own tokenizer, or its bytes."""
    if model_folder is None:
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    if not (model_folder / "tokenizer.json").is_file():
        raise ValueError(
            f"calib: {path} is text, but {model_folder} has no tokenizer.json; use --byte-level or a file of inputs"
        )
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    return torch.tensor(tokenizer(path.read_text(encoding="utf-8"))["input_ids"])


def excerpts(tokens: Tensor, length: int, samples: int) -> Tensor:
    """At most ``samples`` pieces of ``length`` tokens, evenly spread and without overlap, ``[samples, length]``."""
    pieces = tokens[: len(tokens) // length * length].view(-1, length)
    if len(pieces) == 0:
        raise ValueError(f"calib: the text has {len(tokens)} tokens, fewer than --sequence-length {length}")
    count = min(samples, len(pieces))
    return pieces[torch.arange(count) * len(pieces) // count]
