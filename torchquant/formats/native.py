"""torchquant's own format: ``model.safetensors`` and ``config.json`` with a ``quantization_config``.

Holds everything that ``quantize_`` makes, convolutions and half-integral zero points included. Both files are written
atomically, read back and compared bit for bit before they take their names; the configuration carries the tensors'
checksum, so a damaged file or a mixed-up pair is noticed.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..checkpoint import write_atomically
from ..nn import QuantizedLayer, rewrite_attention, swap_modules
from ..nn.attention_product import POINTS
from ..nn.block import fuse_modules
from ..nn.quantizers import ActivationQuantizer, quantizer_from
from ..nn.rewrite import REWRITTEN
from ..nn.swap import quantized_class, unchanged_on_error

TENSORS, CONFIG = "model.safetensors", "config.json"
METHOD, VERSION = "torchquant", 1
GRID = ("weight_packed", "weight_scale", "weight_zero_point")
CHUNK = 1 << 22  # bytes hashed at a time


def save(model: nn.Module, folder: str | Path) -> None:
    """Write ``model`` to ``folder``, which is made if need be.

    Raises:
        ValueError: the model's state holds something else than tensors, or the files do not read back as written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, tied = separate(model)
    layers = {name: describe(module) for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    attention = {name: describe_attention(m) for name, m in model.named_modules() if isinstance(m, REWRITTEN)}
    config = model.config.to_dict() if hasattr(getattr(model, "config", None), "to_dict") else {}  # type: ignore[union-attr,operator]
    own: dict[str, Any] = {"quant_method": METHOD, "version": VERSION, "layers": layers, "tied": tied}
    if attention:
        own["attention"] = attention
    config["quantization_config"] = own

    def write_tensors(path: Path) -> None:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "producer": METHOD})
        check_written(model, tensors, path)
        own["sha256"] = checksum(path)

    write_atomically(folder / TENSORS, write_tensors)
    write_atomically(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2, default=str)))


def separate(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state, each tensor once, and for every further name of a tensor the first one."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"save: {name} is no tensor but {type(value).__name__}: the model's state cannot be saved")
        place = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() > 0 and place in first:
            tied[name] = first[place]
        else:
            first[place] = name
            tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors, tied


def describe(layer: QuantizedLayer) -> dict[str, Any]:
    dtype = str(layer.float_like.dtype).removeprefix("torch.")
    found = {"class": type(layer).__name__, "bits": layer.bits, "group_size": layer.group_size, "dtype": dtype}
    if layer.input_quantizer is not None:
        # Reparameterizing a LayerNorm gives a bias to layers that had none.
        found |= {"input_quantizer": layer.input_quantizer.describe(), "bias": layer.bias is not None}
    return found


def describe_attention(module: nn.Module) -> dict[str, Any]:
    """The quantizers of a rewritten attention module by point; a point that is float is left out."""
    product: nn.Module = module.product  # type: ignore[assignment]
    points = {point: getattr(product, point) for point in POINTS}
    return {point: q.describe() for point, q in points.items() if isinstance(q, ActivationQuantizer)}


def check_written(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Read the file back: equal tensors, and equal numbers out of every quantized layer."""
    found = safetensors.torch.load_file(path)
    wrong = [name for name, tensor in tensors.items() if not same_bits(found.get(name), tensor)]
    if wrong:
        raise ValueError(f"save: {path} does not read back as written: {', '.join(wrong[:5])}")
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and f"{name}.weight_packed" in found:
            again = module.matrix_of(*(found[f"{name}.{key}"] for key in GRID))
            if not torch.equal(again, module.matrix().cpu()):
                raise ValueError(f"save: {path}: layer {name!r} does not dequantize to the same numbers")


def same_bits(found: Tensor | None, wanted: Tensor) -> bool:
    if found is None or found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    return torch.equal(found.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))


def checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def load(folder: str | Path, model_or_factory: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Fill a model of the saved architecture, swapping in its quantized layers, and return it.

    Args:
        folder: written by :func:`save`.
        model_or_factory: the float model (its weights do not matter, it may be on the meta device), or a function that
            makes it.

    Raises:
        ValueError: a file is missing, damaged, of another format or does not fit the model, which is then unchanged.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    tensors = read_tensors(folder / TENSORS, config)
    model = model_or_factory if isinstance(model_or_factory, nn.Module) else model_or_factory()
    with unchanged_on_error(model):
        rewrite_as_saved(folder, model, config.get("attention", {}))
        layers = new_layers(folder, model, config["layers"])
        places = match(folder, model, layers, tensors, config["tied"])
        swap_modules(model, {model.get_submodule(name): layer for name, layer in layers.items()})
        for place in places:
            place.fill()
    for name, layer in layers.items():
        layer.float_like = layer.weight_scale.new_empty(0, dtype=getattr(torch, config["layers"][name]["dtype"]))
        layer.prepack()
    fuse_modules(model)
    return model


def read_config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"load: {path} cannot be read: {error}") from None
    config = found.get("quantization_config") if isinstance(found, dict) else None
    if not isinstance(config, dict) or config.get("quant_method") != METHOD:
        raise ValueError(f"load: {path} has no quantization_config of quant_method {METHOD!r}")
    if config.get("version") != VERSION:
        raise ValueError(f"load: {path} has version {config.get('version')!r}, this release reads version {VERSION}")
    missing = [key for key in ("layers", "tied", "sha256") if key not in config]
    if missing:
        raise ValueError(f"load: {path}: quantization_config lacks {', '.join(missing)}")
    return config


def read_tensors(path: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        if checksum(path) != config["sha256"]:
            # The reader's own words (truncated, no header ...) say more where it refuses the file too.
            safetensors.torch.load_file(path)
            raise ValueError("its checksum is not the one in config.json: damaged, or of another save")
        return safetensors.torch.load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"load: {path} cannot be used: {error}") from None


def rewrite_as_saved(folder: Path, model: nn.Module, wanted: Mapping[str, Any]) -> None:
    """The saved attention modules, with their quantizers in place."""
    others = [name for name, _ in model.named_modules() if name not in wanted]
    rewrite_attention(model, skip=others)
    for name, points in wanted.items():
        try:
            module = model.get_submodule(name)
            if not isinstance(module, REWRITTEN):
                raise TypeError(f"{type(module).__name__} cannot be rewritten")
            for point, description in points.items():
                device = next(iter(module.state_dict().values())).device
                quantizer = quantizer_from(description).to("cpu" if device.type == "meta" else device)
                setattr(module.product, point, quantizer.train(module.training))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"load: {folder / CONFIG} does not fit the model: attention {name!r}: {error}") from None


def new_layers(folder: Path, model: nn.Module, wanted: Mapping[str, Any]) -> dict[str, QuantizedLayer]:
    """Empty quantized layers for the float (or already quantized) ones of ``model``."""
    layers: dict[str, QuantizedLayer] = {}
    for name, entry in wanted.items():
        try:
            module = model.get_submodule(name)
            if isinstance(module, QuantizedLayer):
                if (type(module).__name__, module.bits, module.group_size) != (
                    entry["class"],
                    entry["bits"],
                    entry["group_size"],
                ):
                    raise TypeError(f"the model holds {module}")
                continue
            cls = quantized_class(module)
            if cls.__name__ != entry["class"]:
                raise TypeError(f"the model holds {type(module).__name__}, the file {entry['class']}")
            device = cast(Tensor, module.weight).device
            with torch.device("cpu" if device.type == "meta" else device):
                layers[name] = empty_layer(module, entry).train(module.training)
        except (AttributeError, TypeError, KeyError) as error:
            raise ValueError(f"load: {folder / CONFIG} does not fit the model: layer {name!r}: {error}") from None
    return layers


def empty_layer(module: nn.Module, entry: Mapping[str, Any]) -> QuantizedLayer:
    layer = quantized_class(module).empty_like(module, entry["bits"], entry["group_size"])
    if "input_quantizer" in entry:
        layer.input_quantizer = quantizer_from(entry["input_quantizer"])
        if entry["bias"] and layer.bias is None:
            layer.bias = torch.zeros(len(layer.weight_scale))
    return layer


@dataclass
class Place:
    """A slot of the model's state, all its names included, and what goes there."""

    owners: list[tuple[nn.Module, str]]
    old: Tensor
    new: Tensor

    def fill(self) -> None:
        device = torch.device("cpu") if self.old.is_meta else self.old.device
        value = self.new.to(device)
        if isinstance(self.old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=self.old.requires_grad and value.is_floating_point())
        for module, key in self.owners:
            setattr(module, key, value)


def match(
    folder: Path,
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    tensors: Mapping[str, Tensor],
    tied: Mapping[str, str],
) -> list[Place]:
    """Where every tensor goes; raises before anything is changed when one is missing, left over or of another shape."""
    places: dict[int, Place] = {}
    wrong: list[str] = []
    seen: set[str] = set()
    for name, module, key, old in slots(model, layers):
        new = tensors.get(tied.get(name, name))
        seen.add(name)
        if new is None:
            wrong.append(f"{name} is missing")
        elif tuple(new.shape) != tuple(old.shape):
            wrong.append(f"{name} has shape {list(new.shape)}, the model {list(old.shape)}")
        else:
            places.setdefault(id(old), Place([], old, new)).owners.append((module, key))
    wrong += [f"{name} is not in the model" for name in tensors if name not in seen]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"load: {folder / TENSORS} does not fit the model: {'; '.join(wrong[:3])}{more}")
    return list(places.values())


def slots(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> list[tuple[str, nn.Module, str, Tensor]]:
    """Every entry of the state that the model will have once ``layers`` are in it."""
    new = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    found: list[tuple[str, nn.Module, str, Tensor]] = []
    for name, module in model.named_modules(remove_duplicate=False):
        owner = cast(nn.Module, new.get(id(module), module))
        parts = owner.named_modules(prefix=name) if owner is not module else [(name, owner)]  # its quantizer too
        for part_name, part in parts:
            state: dict[str, Tensor | None] = {**part._parameters, **part._buffers}
            for key, old in state.items():
                if old is not None and key not in part._non_persistent_buffers_set:
                    found.append((f"{part_name}.{key}" if part_name else key, part, key, old))
    return found
