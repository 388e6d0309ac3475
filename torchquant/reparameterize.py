"""LayerNorm reparameterization: one scale for all channels where each channel needs its own (RepQ-ViT, 2212.08254).

The channels of a LayerNorm's output differ in range by factors. Its affine part and the layers that follow can absorb
the differences: with per-channel scale s and zero point z of the quantizer, ``s' = mean(s)``, ``z' = round(mean(z))``,
``r = s / s'`` and ``d = s (z - z')``,

    gamma' = gamma / r,  beta' = (beta + d) / r,  W' = W diag(r),  b' = b - W d

leave the float function as it is, and one quantizer (s', z') of the new output gives the codes that the per-channel one
gave of the old.

Note [rounded zero points]: z' is rounded. With the mean itself, as published (``round(x / s') + z'``, clamped), the
codes are no integers, the clamp cuts elsewhere, and 4 bits have 17 levels.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from .calibrate import tensors_of
from .nn import layout
from .nn.quantizers import ActivationQuantizer, UniformQuantizer

# What may move a LayerNorm's output, or average it over tokens, before it reaches a layer: the channels must come out
# as they went in, in their order, along the last dimension. A trial decides (see NormTrace.still_channels).
MOVES: set[Callable[..., Any]] = {
    torch.Tensor.view, torch.Tensor.reshape, torch.reshape, torch.Tensor.permute, torch.permute,
    torch.Tensor.transpose, torch.transpose, torch.Tensor.contiguous, torch.Tensor.clone, torch.Tensor.flatten,
    torch.flatten, torch.Tensor.unflatten, torch.Tensor.squeeze, torch.Tensor.unsqueeze, torch.unsqueeze, torch.roll,
    torch.Tensor.roll, torch.Tensor.__getitem__, torch.Tensor.select, torch.Tensor.expand, torch.Tensor.repeat,
    torch.Tensor.chunk, torch.chunk, torch.Tensor.split, torch.split, torch.Tensor.unbind, torch.Tensor.mean,
    torch.mean, torch.Tensor.to, torch.Tensor.float, torch.Tensor.detach, torch.Tensor.type_as, F.dropout, F.pad,
}  # fmt: skip


@dataclass
class Norm:
    """A LayerNorm and what receives its output."""

    name: str
    module: nn.LayerNorm
    layers: dict[str, nn.Module] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)  # functions, or "the model's output"

    @property
    def reason(self) -> str:
        """Why it cannot be reparameterized; empty when it can."""
        if not isinstance(self.module.weight, nn.Parameter) or not isinstance(self.module.bias, nn.Parameter):
            return "it has no weight or no bias"
        if self.module.weight.dim() != 1:
            return "it normalizes several dimensions"
        if self.others:
            return f"its output{' also' if self.layers else ''} goes to {', '.join(sorted(self.others))}"
        return "" if self.layers else "its output reaches no quantized layer"


class NormTrace(TorchFunctionMode):
    """Follows the outputs of LayerNorms through a forward to the functions that consume them."""

    def __init__(self, norms: Mapping[str, nn.LayerNorm], layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.norms = {name: Norm(name, module) for name, module in norms.items()}
        self.layers = dict(layers)
        self.weights = {id(module.weight): name for name, module in layers.items()}
        self.tracked = WeakIdKeyDictionary()  # tensor -> name of the LayerNorm whose channels it holds
        self.origins: dict[str, set[str | None]] = {}  # layer -> the LayerNorms that its inputs came from

    def origin(self, x: Tensor) -> str | None:
        return self.tracked.get(x)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = list(tensors_of((*args, *kwargs.values())))
        layer = next((self.weights[id(t)] for t in inputs if id(t) in self.weights), None)
        sources = {self.tracked.get(t) for t in inputs} - {None}
        if layer is not None:
            self.origins.setdefault(layer, set()).update(sources or {None})
        elif sources and any(True for _ in tensors_of(result)):
            self.follow(func, args, kwargs, result, sources)
        return result

    def follow(self, func: Any, args: Any, kwargs: Any, result: Any, sources: set[str]) -> None:
        if len(sources) == 1 and func in MOVES and self.still_channels(func, args, kwargs):
            for tensor in tensors_of(result):
                self.tracked[tensor] = next(iter(sources))
            return
        for source in sources:
            self.norms[source].others.add(getattr(func, "__name__", str(func)))

    def still_channels(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Does ``func`` give a tensor of channel numbers when it gets one?"""

        def numbered(value: Any) -> Any:
            if isinstance(value, Tensor) and self.tracked.get(value) is not None:
                numbers = torch.arange(value.shape[-1], dtype=torch.float32, device=value.device)
                return numbers.expand(value.shape).contiguous()
            return value

        found = func(*map(numbered, args), **{key: numbered(value) for key, value in kwargs.items()})
        width = next(t.shape[-1] for t in tensors_of((*args, *kwargs.values())) if self.tracked.get(t) is not None)
        wanted = torch.arange(width, dtype=torch.float32)
        return all(t.shape[-1:] == (width,) and bool((t.cpu().float() == wanted).all()) for t in tensors_of(found))

    def finish(self) -> dict[str, Norm]:
        """Layers go to their LayerNorm; one that also sees other inputs spoils it."""
        for layer, sources in self.origins.items():
            for source in sources - {None}:
                assert source is not None
                self.norms[source].layers[layer] = self.layers[layer]
                if len(sources) > 1:
                    self.norms[source].others.add(f"{layer}, which also gets other inputs")
                if not (isinstance(self.layers[layer], nn.Linear) or layout.is_hf_conv1d(self.layers[layer])):
                    self.norms[source].others.add(f"{layer}, which is no linear layer")
        return self.norms


@contextmanager
def tracing_norms(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[NormTrace]:
    """Trace every forward inside the with block; ``finish()`` of the trace then says who feeds whom."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    trace = NormTrace(norms, layers)

    def remember(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            trace.tracked[output] = name

    def returned(output: Any) -> None:
        for tensor in tensors_of(output):
            source = trace.origin(tensor)
            if source is not None:
                trace.norms[source].others.add("the model's output")

    with ExitStack() as stack:
        for name, module in norms.items():
            handle = module.register_forward_hook(lambda m, a, output, name=name: remember(name, output))
            stack.callback(handle.remove)
        stack.callback(model.register_forward_hook(lambda m, a, output: returned(output)).remove)
        with trace:
            yield trace


def trace_norms(
    model: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[nn.Module], object]
) -> dict[str, Norm]:
    """Which LayerNorms of ``model`` feed which of ``layers``, seen while ``run(model)`` runs it."""
    with tracing_norms(model, layers) as trace:
        run(model)
    return trace.finish()


def reparameterize(norm: Norm, quantizer: UniformQuantizer) -> UniformQuantizer:
    """Give ``norm`` and its layers new parameters; returns the one quantizer (s', z') for the layers' input.

    ``quantizer``: per channel, of the LayerNorm's output. The tensors that were parameters before are not written into.
    """
    scale, zero_point = quantizer.scale.double(), quantizer.zero_point.double()
    common_scale, common_zero = scale.mean(), zero_point.mean().round()  # see Note [rounded zero points]
    ratio, shift = scale / common_scale, scale * (zero_point - common_zero)
    module = norm.module
    module.weight = like(module.weight, module.weight.double() / ratio)
    module.bias = like(module.bias, (module.bias.double() + shift) / ratio)
    for layer in norm.layers.values():
        absorb(layer, ratio, shift)
    return UniformQuantizer(quantizer.bits, common_scale.float(), common_zero.float())


def absorb(layer: Any, ratio: Tensor, shift: Tensor) -> None:
    """``W' = W diag(ratio)``, ``b' = b - W shift``; a layer without bias gets one."""
    matrix = layout.to_matrix(layer).double()  # [N, K]
    offset = matrix @ shift
    bias = -offset if layer.bias is None else layer.bias.double() - offset
    scaled = matrix * ratio
    old = layer.weight
    layer.weight = like(old, scaled.t() if layout.is_hf_conv1d(layer) else scaled)
    layer.bias = like(old if layer.bias is None else layer.bias, bias)


def like(parameter: Tensor, values: Tensor) -> nn.Parameter:
    values = values.detach().to(parameter.dtype).contiguous()
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


def reparameterize_all(norms: Mapping[str, Norm], quantizers: dict[str, ActivationQuantizer]) -> dict[str, list[str]]:
    """Every LayerNorm whose quantized layers share one per-channel quantizer; they are replaced in ``quantizers``.

    Layers without a quantizer take part with their weights. Returns the layers by LayerNorm.
    """
    done: dict[str, list[str]] = {}
    for name, norm in norms.items():
        own = {layer: quantizers[layer] for layer in norm.layers if layer in quantizers}
        first = next(iter(own.values()), None)
        if norm.reason or not isinstance(first, UniformQuantizer) or first.scale.dim() != 1:
            continue
        if not all(first.same_as(other) for other in own.values()):
            continue
        shared = reparameterize(norm, first)
        done[name] = list(norm.layers)
        quantizers.update({layer: shared.copy() for layer in own})
    return done
