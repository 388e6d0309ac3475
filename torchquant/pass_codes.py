"""Layers that hand each other codes, so that what lies between them is never floats in memory.

A layer whose input quantizer has one grid reads nothing of its input but the codes ``clamp(round(x / scale +
zero_point))``. Where it alone reads what a layer ahead makes, that layer can give those codes itself: a quarter of the
bytes, written and read once (integer-only inference, section 2 of Jacob et al., 1712.05877).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .dataflow import Call, Dataflow, outputs_of, watch
from .nn.attention import QSelfAttention
from .nn.base import QuantizedLayer
from .nn.conv import QConv2d
from .nn.layer_norm import QLayerNorm
from .nn.linear import QLinear
from .nn.mlp import QMlp, QSequentialMlp, activation_name
from .nn.swap import swap_modules, unchanged_on_error

MAKERS = (QConv2d, QLinear, QLayerNorm, nn.LayerNorm)
READERS = (QConv2d, QLinear, QMlp, QSequentialMlp, QSelfAttention)
CLIPPING = {nn.ReLU: float("inf"), nn.ReLU6: 6.0}  # [0, end]
UNCHANGED = (nn.Identity, nn.Dropout, nn.Dropout2d)
TOLERANCE = 0.02  # of the outputs' norm: a code may flip where an activation function rounds in another way


def pass_codes_(model: nn.Module, example: Any) -> list[str]:
    """Let quantized layers and LayerNorms give the codes that the next layer's input quantizer would make of their
    outputs, in place.

    For inference, after :func:`quantize_` or :func:`torchquant.load`. Between two layers may stand ReLU, ReLU6, GELU,
    SiLU and what does nothing in evaluation; a ``ZeroPad2d`` becomes padding of the convolution behind it. In training,
    where a gradient is wanted and on devices without packed kernels, all layers give floats as before. Hooks see the
    codes. Files of the model are the same as without: nothing that is saved changes.

    Who reads what is seen in one run of the model on ``example``.

    Args:
        model: in evaluation mode.
        example: one input, or a tuple of arguments, or a dict of them.

    Returns:
        The names of the layers that give codes.

    Raises:
        ValueError: the model is in training mode, or computes something else with codes: then it is unchanged.
    """
    if model.training:
        raise ValueError("pass_codes_: the model must be in evaluation mode, got training mode")
    names = {module: name for name, module in model.named_modules()}
    with torch.no_grad(), unchanged_on_error(model):
        before = absorb_padding(model, example)
        flow = watch([m for m in model.modules() if is_part(m)], lambda: outputs_of(model, example))
        links = list(found(flow))
        replacements: dict[nn.Module, nn.Module] = {}
        for link in links:
            replacements |= {module: PassingCodes(module).eval() for module in link.between if is_activation(module)}
            if type(link.maker) is nn.LayerNorm:
                replacements[link.maker] = QLayerNorm(link.maker, *link.grid)
            else:
                link.maker.output_scale, link.maker.output_zero_point, link.maker.output_bits = link.grid
                link.maker.output_activation = link.activation
        swap_modules(model, replacements)
        for wanted, got in zip(before, outputs_of(model, example), strict=True):
            if not (got.float() - wanted.float()).norm() <= TOLERANCE * wanted.float().norm():
                raise ValueError("pass_codes_: the model computes something else when its layers give codes")
    return [names[link.maker] for link in links]


class PassingCodes(nn.Module):
    """An activation function that the layer ahead applies before it gives codes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return x if x.dtype == torch.uint8 else self.module(x)


Grid = tuple[Tensor, Tensor, int]  # scale, zero point, bits


@dataclass(frozen=True)
class Link:
    maker: Any
    between: tuple[nn.Module, ...]
    grid: Grid
    activation: str  # of the maker's kernel


def is_part(module: nn.Module) -> bool:
    return isinstance(module, (*MAKERS, *READERS, *UNCHANGED, PassingCodes)) or is_activation(module)


def is_activation(module: nn.Module) -> bool:
    return type(module) in CLIPPING or activation_name(module) != ""


def found(flow: Dataflow) -> Iterator[Link]:
    for call in flow.calls:
        if type(call.module) in MAKERS and len(flow.calls_of(call.module)) == 1:
            link = link_of(flow, call)
            if link is not None:
                yield link


def link_of(flow: Dataflow, call: Call) -> Link | None:
    """What ``call`` can hand on as codes: everything behind it, up to layers that all want the same."""
    maker: Any = call.module
    norm = isinstance(maker, nn.LayerNorm)
    if not (len(maker.normalized_shape) == 1 if norm else maker.kernel_runs(call.input)):
        return None
    between: list[nn.Module] = []
    reader = flow.only_reader(call)
    while reader is not None and not isinstance(reader.module, READERS):
        between.append(reader.module)
        call, reader = reader, flow.only_reader(reader)
    grid = common_grid([None if reader is None else reader.module for reader in flow.readers(call)])
    if grid is None:
        return None
    functions = [module.module if isinstance(module, PassingCodes) else module for module in between]
    activation = activation_of([function for function in functions if is_activation(function)], grid)
    if activation is None or (norm and activation != "none"):
        return None
    return Link(maker, tuple(between), grid, activation)


def common_grid(modules: list[nn.Module | None]) -> Grid | None:
    """The grid of the codes that all of them take."""
    common: Grid | None = None
    for module in modules:
        grid = grid_of(module)
        if grid is None or (common is not None and not same(grid, common)):
            return None
        common = grid
    return common


def same(a: Grid, b: Grid) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]


def grid_of(module: Any) -> Grid | None:
    """Of the codes that ``module`` takes in place of its input."""
    layer = first_layer(module)
    if not isinstance(layer, QuantizedLayer) or layer.kernel_weight.numel() == 0:
        return None
    if isinstance(layer, QConv2d) and layer.prepad_mode not in ("none", "constant", "same"):
        return None  # codes are not padded with what they hold
    scale, zero_point, bits = layer.input_grid()
    return None if scale is None or zero_point is None else (scale.reshape([]), zero_point.reshape([]), bits)


def first_layer(module: Any) -> Any:
    """The layer that alone reads the input of ``module``."""
    if isinstance(module, QSelfAttention):
        return module.qkv if module.gate is None else None
    return module.fc1 if isinstance(module, QMlp) else module[0] if isinstance(module, QSequentialMlp) else module


def activation_of(modules: list[nn.Module], grid: Grid) -> str | None:
    """The kernel's name for what stands between; None where it has no such function.

    Codes say nothing beyond their grid's ends: a grid inside of [0, end] clips as ReLU and ReLU6 do.
    """
    scale, zero_point, bits = grid
    if not modules:
        return "none"
    if len(modules) > 1:
        return None
    if type(modules[0]) in CLIPPING:
        end = CLIPPING[type(modules[0])]
        return "none" if zero_point == 0 and end / scale > 2**bits - 1.5 else None
    return activation_name(modules[0])


def absorb_padding(model: nn.Module, example: Any) -> list[Tensor]:
    """Zeros of a ZeroPad2d to the convolution that alone reads them. Returns the model's outputs."""
    pads = [module for module in model.modules() if type(module) is nn.ZeroPad2d]
    convs = [module for module in model.modules() if type(module) is QConv2d]
    flow = watch([*pads, *convs], lambda: outputs_of(model, example))
    for call in flow.calls:
        reader = flow.only_reader(call)
        if call.module not in pads or reader is None or reader.module not in convs:
            continue
        pad, conv = call.module, reader.module
        alone = len(flow.calls_of(pad)) == len(flow.calls_of(conv)) == 1
        if alone and conv.prepad_mode in ("none", "constant") and pads_exactly(conv):
            own = conv.prepad if conv.prepad_mode == "constant" else [0] * 4
            conv.prepad = [a + b for a, b in zip(own, pad.padding, strict=True)]
            conv.prepad_mode = "constant"
            swap_modules(model, {pad: nn.Identity()})
    return flow.outputs


def pads_exactly(conv: Any) -> bool:
    """Whether zeros have a code of their own."""
    if conv.input_quantizer is None:
        return True
    _, zero_point, bits = conv.input_grid()
    return zero_point is not None and float(zero_point) in range(2**bits)
