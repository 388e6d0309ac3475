"""BatchNorm folded into the layer ahead of it.

In evaluation ``BN(y) = (y - mean) g + beta`` with ``g = gamma / sqrt(variance + eps)`` is one scale and one shift a
channel, which the layer's own weight and bias absorb: ``W' = g W``, ``b' = g (b - mean) + beta`` (2.4 of Jacob et al.,
1712.05877).
"""

from typing import Any

import torch
from torch import Tensor, nn

from .dataflow import outputs_of, watch
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
    with torch.no_grad(), unchanged_on_error(model):
        pairs, before = followed(model, example)
        for layer, norm in pairs:
            fold(layer, norm)
        swap_modules(model, {norm: nn.Identity() for _, norm in pairs})
        for wanted, got in zip(before, outputs_of(model, example), strict=True):
            if wanted.numel() > 0 and (got - wanted).abs().max() > TOLERANCE * wanted.abs().max():
                raise ValueError("fold_batch_norm_: the model computes something else when its BatchNorms are folded")
    return [names[norm] for _, norm in pairs]


def followed(model: nn.Module, example: Any) -> tuple[list[tuple[Any, Any]], list[Tensor]]:
    """Layers and the BatchNorms that alone read their outputs, in the order of the BatchNorms, and the model's
    outputs."""
    owners = [id(parameter) for module in model.modules() for parameter in module._parameters.values()]
    layers = [m for m in model.modules() if type(m) in LAYERS and owners.count(id(m.weight)) == 1]
    norms = [m for m in model.modules() if type(m) in NORMS and m.running_mean is not None]
    flow = watch([*layers, *norms], lambda: outputs_of(model, example))
    pairs = []
    for call in flow.calls:
        reader = flow.only_reader(call)
        if call.module in layers and reader is not None and reader.module in norms:
            once = len(flow.calls_of(call.module)) == len(flow.calls_of(reader.module)) == 1
            pairs += [(call.module, reader.module)] if once else []
    return pairs, flow.outputs


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
