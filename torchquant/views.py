"""What the report draws of quantized activations: values and levels, attention before and after, sensitivity.

Measured on a few samples of the calibration data. ``measure`` costs about as much as one pass of all of them.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn

from .activations import INPUT, Site
from .calibrate import Calibration, logger, tensors_of
from .collect import hooked, input_of
from .nn.quantizers import ActivationQuantizer, SubsetQuantizer, TableQuantizer, UniformQuantizer

P = ParamSpec("P")
SAMPLES = 8  # at most
BARS = 64  # of an activation's histogram
TOKENS = 64  # of an attention map a side: more would be too fine to see
OCTAVES = 4  # drawn below the smallest positive level, where values spread over powers of two

# Name -> the float layer, and what makes the quantized one.
Layers = Mapping[str, tuple[nn.Module, Callable[[], nn.Module]]]


def optional(measured: Callable[P, dict[str, Any]]) -> Callable[P, dict[str, Any]]:
    """A finished quantization must not be lost for want of a figure."""

    @functools.wraps(measured)
    def attempt(*args: P.args, **kwargs: P.kwargs) -> dict[str, Any]:
        try:
            return measured(*args, **kwargs)
        except Exception as error:
            logger.warning("report: no figures of activations: %s: %s", type(error).__name__, error)
            return {}

    return attempt


def few(data: Calibration, count: int) -> Calibration | None:
    """The first ``count`` samples; the first batch as a whole where it cannot be cut. None for a forward_loop."""
    batch = next(iter(data.batches), None)
    if batch is None or data.once:
        return None
    sizes = {tensor.shape[0] if tensor.dim() > 0 else 0 for tensor in tensors_of(batch)}
    part = Calibration([first(batch, count) if len(sizes) == 1 else batch])
    part.from_loader = data.from_loader
    return part


def first(value: Any, count: int) -> Any:
    if isinstance(value, Tensor):
        return value[:count]
    if isinstance(value, Mapping):
        return {key: first(part, count) for key, part in value.items()}
    return type(value)(first(part, count) for part in value) if type(value) in (tuple, list) else value


def samples_in(data: Calibration) -> int:
    return sum(next((t.shape[0] for t in tensors_of(batch) if t.dim() > 0), 0) for batch in data.batches)


def output_of(model: nn.Module, data: Calibration) -> Tensor:
    """Everything that the model returns for its last batch, as one float32 vector."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept[:] = [t.detach().float().flatten() for t in tensors_of(output) if t.is_floating_point()]

    handle = model.register_forward_hook(keep)
    try:
        data.run(model)
    finally:
        handle.remove()
    return torch.cat(kept) if kept else torch.zeros(0)


# --- attention ---


@optional
def attention_maps(model: nn.Module, data: Calibration, names: Mapping[str, Any]) -> dict[str, Tensor]:
    """The softmax's output in these (rewritten) attention modules for the first sample (window), ``[heads, L, S]``.

    At most TOKENS tokens a side.
    """
    maps: dict[str, Tensor] = {}
    part = few(data, 1)
    if part is None or not names:
        return maps

    def keep(name: str, output: Tensor) -> None:
        if name not in maps and output.numel() > 0:
            maps[name] = output[0].detach().float().cpu().reshape(-1, *output.shape[-2:])[:, :TOKENS, :TOKENS]

    handles = [
        model.get_submodule(f"{name}.product.softmax").register_forward_hook(
            lambda module, args, output, name=name: keep(name, output)
        )
        for name in names
    ]
    try:
        part.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return maps


def most_changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Any]:
    """The attention head that quantization changed most, as lists for the report."""
    found: dict[str, Any] = {}
    largest = -1.0
    for name in before.keys() & after.keys():
        change = (after[name] - before[name]).flatten(1).norm(dim=1)  # [heads]
        size = before[name].flatten(1).norm(dim=1).clamp(min=1e-12)
        change, head = (change / size).max(0)
        if float(change) > largest:
            largest = float(change)
            maps = {"before": rounded(before[name][head]), "after": rounded(after[name][head])}
            found = {"name": name, "head": int(head), "change": largest, **maps}
    return found


def rounded(table: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in table.tolist()]


# --- values and levels ---


def placed(quantizer: ActivationQuantizer, x: Tensor) -> tuple[Tensor, Tensor, str]:
    """Values and levels on one axis, and what the axis is: where each channel, token or sample has a range of its own,
    both are shown as the quantizer sees them."""
    x = x.float()
    if isinstance(quantizer, SubsetQuantizer):
        mean, magnitude = quantizer.normal(x)
        x, levels = (x - mean) / magnitude, quantizer.levels
        if levels.dim() == 2:
            x, levels = x.select(quantizer.axis, 0), levels[0]
        return x, levels, "normalized value" if quantizer.levels.dim() == 1 else "normalized value, first channel"
    if isinstance(quantizer, TableQuantizer):
        return x, torch.exp2(quantizer.exponents) - quantizer.eta, "value"
    codes = torch.arange(2.0**quantizer.bits)
    if isinstance(quantizer, UniformQuantizer) and quantizer.scale.dim() == 0:
        scale, zero_point = quantizer.scale, quantizer.zero_point
        return x, (codes.to(scale.device) - zero_point) * scale, "value"
    if isinstance(quantizer, UniformQuantizer):
        shape = [1] * x.dim()
        shape[quantizer.axis] = -1
        scale, zero_point = quantizer.scale.view(shape), quantizer.zero_point.view(shape)
    else:
        _, scale, zero_point = quantizer.for_kernel(x)
    return x / scale + zero_point, codes, "value / scale + zero point, each with its own"


def bars(quantizer: ActivationQuantizer, x: Tensor) -> dict[str, Any]:
    """A histogram of the values, and the levels. Powers of two are drawn by their exponents."""
    values, levels, unit = placed(quantizer, x)
    levels = levels.unique().cpu()
    exponents = isinstance(quantizer, TableQuantizer)
    if exponents:
        values = values.clamp(min=0).log2()
        levels = levels[levels > 1e-6 * levels.max()].log2()  # a code for zero has no place on this axis
        low, high = float(levels.min().floor()) - OCTAVES, max(float(levels.max()), float(values.max())) + 0.25
    else:
        margin = 0.25 * float(levels.max() - levels.min())
        low, high = float(levels.min()) - margin, float(levels.max()) + margin
    counts = torch.histc(values.clamp(low, high).cpu(), BARS, low, high).int().tolist()
    shown = [float(f"{level:.6g}") for level in levels.tolist()]
    return {"low": low, "high": high, "log2": exponents, "unit": unit, "levels": shown, "counts": counts}


# --- sensitivity ---


@contextmanager
def computing(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, ``module`` returns ``function`` of its input."""

    def compute(m: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
        return function(input_of("", args, kwargs))

    handle = module.register_forward_hook(compute, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def receiving(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, ``module`` receives ``function`` of its input."""

    def change(m: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (function(args[0]), *args[1:]), kwargs
        key = next(iter(kwargs))
        return args, {**kwargs, key: function(kwargs[key])}

    handle = module.register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def sensitivity(
    model: nn.Module,
    data: Calibration,
    layers: Layers,
    sites: Mapping[str, Site],
    quantizers: Mapping[str, ActivationQuantizer],
) -> dict[str, dict[str, float]]:
    """Relative change of the float model's output when one thing alone is quantized: a layer's ``weights``, its
    ``input``, or a point of attention."""
    wanted = output_of(model, data)
    size = float(wanted.norm())
    found: dict[str, dict[str, float]] = {}

    def add(name: str, what: str) -> None:
        change = float((output_of(model, data) - wanted).norm())
        found.setdefault(name, {})[what] = change / size if size > 0 else math.nan

    for name, (module, make) in layers.items():
        made = make()
        made.input_quantizer = None  # type: ignore[assignment]
        with computing(module, made.eval()):
            add(name, "weights")
    for name, quantizer in quantizers.items():
        site = sites[name]
        with receiving(site.module, quantizer):
            add(name if site.kind == INPUT else name.rpartition(".")[0], site.kind)
    return {name: found[name] for name, _ in model.named_modules() if name in found}


# --- all of it ---


@optional
def measure(
    model: nn.Module,
    data: Calibration | None,
    layers: Layers,
    sites: Mapping[str, Site],
    quantizers: Mapping[str, ActivationQuantizer],
) -> dict[str, Any]:
    """``"activations"`` and ``"sensitivity"`` of :class:`torchquant.Report`'s details, of the model before the swap."""
    runs = len(layers) + len(quantizers)
    count = 0 if data is None else samples_in(data) // max(runs, 1)
    part = None if data is None else few(data, min(max(count, 1), SAMPLES))
    if part is None or not quantizers:
        return {}
    drawn: dict[str, Any] = {}

    def draw(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = input_of(name, args, kwargs).detach()
        if name not in drawn and x.numel() > 0:
            drawn[name] = bars(quantizers[name], x)

    with hooked({name: sites[name].module for name in quantizers}, draw):
        part.run(model)
    return {"activations": drawn, "sensitivity": sensitivity(model, part, layers, sites, quantizers)}
