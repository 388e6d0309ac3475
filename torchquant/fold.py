"""BatchNorm folded into the layer ahead of it.

In evaluation ``BN(y) = (y - mean) g + beta`` with ``g = gamma / sqrt(variance + eps)`` is one scale and one shift a
channel, which the layer's own weight and bias absorb: ``W' = g W``, ``b' = g (b - mean) + beta`` (2.4 of Jacob et al.,
1712.05877).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .calibrate import tensors_of
from .nn.swap import swap_modules, unchanged_on_error

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TOLERANCE = 1e-3  # of the largest output, before and after


def fold_batch_norm_(model: nn.Module, example: Any) -> list[str]:
    """Fold every BatchNorm whose input is the output of one linear or convolution layer, and nobody else's, in place.

    Before :func:`quantize_`: the quantized network then computes no BatchNorm at all. The folded ones become
    nn.Identity. Which layer a BatchNorm follows is seen in one run of the model on ``example``.

    Args:
        model: in evaluation mode, with float weights.
        example: one input, or a tuple of arguments, or a dict of them.

    Returns:
        The names of the folded BatchNorms, in the order in which they run.

    Raises:
        ValueError: the model is in training mode, or computes something else without them: then it is unchanged.
    """
    if model.training:
        raise ValueError("fold_batch_norm_: the model must be in evaluation mode, got training mode")
    names = {module: name for name, module in model.named_modules()}

    def call() -> list[Tensor]:
        if isinstance(example, dict):
            return list(tensors_of(model(**example)))
        return list(tensors_of(model(*example) if isinstance(example, tuple) else model(example)))

    with torch.no_grad(), unchanged_on_error(model):
        pairs, before = followed(model, call)
        for layer, norm in pairs:
            fold(layer, norm)
        swap_modules(model, {norm: nn.Identity() for _, norm in pairs})
        for wanted, got in zip(before, call(), strict=True):
            if wanted.numel() > 0 and (got - wanted).abs().max() > TOLERANCE * wanted.abs().max():
                raise ValueError("fold_batch_norm_: the model computes something else when its BatchNorms are folded")
    return [names[norm] for _, norm in pairs]


def followed(model: nn.Module, call: Callable[[], list[Tensor]]) -> tuple[list[tuple[Any, Any]], list[Tensor]]:
    """Layers and the BatchNorms that alone read their outputs, and the model's outputs."""
    owners = [id(parameter) for module in model.modules() for parameter in module._parameters.values()]
    layers = [m for m in model.modules() if type(m) in LAYERS and owners.count(id(m.weight)) == 1]
    norms = [m for m in model.modules() if type(m) in NORMS and m.running_mean is not None]
    watch = Watch()
    with watch.on(layers, norms), watch:
        outputs = call()
    pairs = []
    for norm, inputs in watch.inputs.items():
        found = [layer for layer, made in watch.outputs.items() if any(x is inputs[0] for x in made)]
        if (
            len(inputs) == 1
            and len(found) == 1
            and len(watch.outputs[found[0]]) == 1
            and id(inputs[0]) not in watch.used
        ):
            pairs.append((found[0], norm))
    return pairs, outputs


class Watch(TorchFunctionMode):
    """Outputs of layers, inputs of BatchNorms, and which of these tensors something else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[nn.Module, list[Tensor]] = {}
        self.inputs: dict[nn.Module, list[Tensor]] = {}
        self.made: set[int] = set()  # of outputs, which are kept: nothing else can have their ids
        self.used: set[int] = set()
        self.inside = 0

    @contextmanager
    def on(self, layers: list[nn.Module], norms: list[nn.Module]) -> Iterator[None]:
        def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.inputs.setdefault(module, []).append(args[0])
            self.inside += 1

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.inside -= 1

        def made(module: nn.Module, args: Any, output: Tensor) -> None:
            self.outputs.setdefault(module, []).append(output)
            self.made.add(id(output))

        handles = [layer.register_forward_hook(made) for layer in layers]
        for norm in norms:
            handles += [norm.register_forward_pre_hook(enter), norm.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.inside == 0 and getattr(func, "__name__", "") not in ("__get__", "size", "dim"):
            self.used |= self.made & {id(x) for x in tensors_of((args, kwargs))}
        return func(*args, **(kwargs or {}))


def fold(layer: Any, norm: Any) -> None:
    """By new parameters: those that were there stay as they are."""
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.double()
    bias = -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean.double()
    bias = bias * gain if norm.bias is None else bias * gain + norm.bias.double()
    weight: Tensor = layer.weight
    scaled = weight.double() * gain.view(-1, *[1] * (weight.dim() - 1))
    layer.weight = nn.Parameter(scaled.to(weight.dtype), requires_grad=weight.requires_grad)
    layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=weight.requires_grad)
