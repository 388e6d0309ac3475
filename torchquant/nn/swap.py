"""Find the layers of a model, and put others in their place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from .base import QuantizedLayer
from .conv import QConv1d, QConv2d, QConv3d, QConvTranspose2d, _QConv
from .layout import is_hf_conv1d
from .linear import QLinear

CLASSES: dict[type[nn.Module], type[QLinear] | type[_QConv]] = {
    nn.Linear: QLinear,
    nn.Conv1d: QConv1d,
    nn.Conv2d: QConv2d,
    nn.Conv3d: QConv3d,
    nn.ConvTranspose2d: QConvTranspose2d,
}


def quantized_class(module: nn.Module) -> type[QLinear] | type[_QConv]:
    """The class that takes the place of ``module``."""
    if is_hf_conv1d(module):
        return QLinear
    for float_class, quantized in CLASSES.items():
        if isinstance(module, float_class):
            return quantized
    raise TypeError(f"torchquant.nn: no quantized form of {type(module).__name__}; known: {', '.join(names())}")


def names() -> list[str]:
    return [*(float_class.__name__ for float_class in CLASSES), "Conv1D"]


def from_float(
    module: nn.Module, codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int = 0
) -> QuantizedLayer:
    """The quantized layer for any supported float layer."""
    return quantized_class(module).from_float(module, codes, scale, zero_point, bits, group_size)


def swap_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put ``replacements[module]`` wherever ``module`` is registered: a layer used in two places stays one layer."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])


@contextmanager
def swapped(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """``swap_modules`` for the length of a with block."""
    swap_modules(model, replacements)
    try:
        yield
    finally:
        swap_modules(model, {new: old for old, new in replacements.items()})


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """If the with block raises, every module, parameter, buffer and attribute is back in its place.

    By reference: what a step changes it replaces, and writes into no tensor that was there before.
    """
    owned = ("_modules", "_parameters", "_buffers")
    before = [
        (module, {key: dict(value) if key in owned else value for key, value in module.__dict__.items()})
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, parts in before:
            for key in owned:
                module.__dict__[key].clear()
                module.__dict__[key].update(parts.pop(key))
            module.__dict__.update(parts)
        raise
