"""Where activations are quantized, what the calibration shows of them, and which quantizers follow from that."""

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import Calibration, logger
from .collect import Observed, SharingBroken, check_finite, hooked, input_of, observing
from .config import SOFTMAX, Activations
from .nn import layout
from .nn.attention_product import POINTS
from .nn.quantizers import ActivationQuantizer, DynamicQuantizer, TableQuantizer, UniformQuantizer
from .quantizers.sulq import sulq_fit
from .reparameterize import Norm, NormTrace, tracing_norms
from .report import ActivationReport
from .statistics import histogram_accumulate_, histogram_range, new_histogram

INPUT = "input"  # of a layer; the other kinds are the points of an attention product
LOG_VARIANTS = {"sulq": "zero_exact"}  # names in Activations -> names in sulq_fit, where they differ


@dataclass
class Site:
    """A place where an activation enters a matrix product: the input of ``module``."""

    name: str  # of the module: a layer, or a point of an attention product
    kind: str  # "input", "query", "key", "value" or "softmax"
    bits: int
    module: nn.Module

    @property
    def axis(self) -> int:
        """Of the channels."""
        return layout.channel_axis(self.module) if self.kind == INPUT else -1


@dataclass
class Observations:
    """What one pass of the calibration data showed."""

    histograms: dict[str, Tensor] = field(default_factory=dict)  # [3, B], or [C, 3, B] with a range for each channel
    norms: dict[str, Norm] = field(default_factory=dict)
    seen: Observed = field(default_factory=Observed)

    @property
    def order(self) -> list[str]:
        """Layers in the order of their first calls."""
        return self.seen.order

    def feeding(self) -> dict[str, Norm]:
        """Layer -> the LayerNorm that feeds it and can be reparameterized."""
        return {layer: norm for norm in self.norms.values() if not norm.reason for layer in norm.layers}


def attention_sites(name: str, module: nn.Module, bits: int) -> list[Site]:
    """The four points of a rewritten attention module."""
    product: nn.Module = module.product  # type: ignore[assignment]
    return [Site(f"{name}.product.{point}", point, bits, getattr(product, point)) for point in POINTS]


def observe(
    model: nn.Module,
    sites: Mapping[str, Site],
    layers: Mapping[str, nn.Module],
    data: Calibration,
    *,
    granularity: str = "tensor",
) -> Observations:
    """Run ``data`` once: histograms of every site, how ``layers`` are reached, and which LayerNorms feed which of them.

    A site has one histogram per channel when a LayerNorm's output enters it, or under ``granularity="channel"``.
    """
    data.keep()
    for share in (True, False):
        found = Observations()
        try:
            with observing(model, layers) as found.seen, tracing_norms(model, layers) as trace:
                counter = Counter(found.histograms, sites, trace, granularity, share=share)
                with hooked({name: site.module for name, site in sites.items()}, counter.hook):
                    data.run(model)
            counter.finish()
            found.norms = trace.finish()
            return found
        except SharingBroken as broken:
            logger.info("calibration: %s stopped sharing its inputs; again with one histogram a site", broken)
    raise AssertionError("unreachable: without sharing nothing breaks")


class Counter:
    """Counts what enters sites. Siblings that receive the very same tensor (q, k, v) share one histogram: those behind
    LayerNorms are large. The first call decides who shares; SharingBroken is raised where they go separate ways."""

    def __init__(
        self,
        histograms: dict[str, Tensor],
        sites: Mapping[str, Site],
        trace: NormTrace,
        granularity: str,
        *,
        share: bool,
    ) -> None:
        self.histograms, self.sites, self.trace, self.granularity = histograms, sites, trace, granularity
        self.share = share
        # The last tensor, its version, and the site that counted it.
        self.counted: tuple[weakref.ref[Tensor], int, str] | None = None
        self.partners: dict[str, str] = {}
        self.calls: dict[str, int] = {}

    def hook(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = input_of(name, args, kwargs)
        if x.numel() == 0:
            return
        self.calls[name] = self.calls.get(name, 0) + 1
        other = self.counted_by(name, x)
        if other and self.calls[name] == 1:
            self.histograms[name], self.partners[name] = self.histograms[other], other
        if name in self.partners:
            if other != self.partners[name]:
                raise SharingBroken(name)
            return
        per_channel = self.granularity == "channel" or self.trace.origin(x) is not None
        add_values(self.histograms, self.sites[name], x.detach(), per_channel)
        self.counted = weakref.ref(x), version_of(x), name

    def counted_by(self, name: str, x: Tensor) -> str:
        """The site that has just counted this very tensor; empty when there is none."""
        if not self.share or self.counted is None:
            return ""
        tensor, version, other = self.counted
        same = tensor() is x and version == version_of(x) and self.sites[other].axis == self.sites[name].axis
        return other if same else ""

    def finish(self) -> None:
        for name, other in self.partners.items():
            if self.calls[name] != self.calls[other]:
                raise SharingBroken(name)


def version_of(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def add_values(histograms: dict[str, Tensor], site: Site, x: Tensor, per_channel: bool) -> None:
    x = x.float() if x.dtype == torch.float64 else x
    if site.name not in histograms:
        histograms[site.name] = new_histogram(x.shape[site.axis] if per_channel else None, device=x.device)
    try:
        histogram_accumulate_(histograms[site.name], x, axis=site.axis)
    except (TypeError, ValueError) as error:
        check_finite(site.name, x)
        raise ValueError(f"calibration: activation {site.name!r}: {error}") from error


def choose_quantizers(
    observed: Observations, sites: Mapping[str, Site], activations: Activations
) -> dict[str, ActivationQuantizer]:
    """A quantizer for every site that calibration reached.

    Inputs that come from a LayerNorm which can be reparameterized get a scale for each channel: see
    :mod:`torchquant.reparameterize`, which is to follow.
    """
    feeding = observed.feeding() if activations.reparameterize and not activations.dynamic else {}
    # One scale for each channel serves all layers behind a LayerNorm, or none.
    bits = {layer: {sites[n].bits for n in norm.layers if n in sites} for layer, norm in feeding.items()}
    feeding = {layer: norm for layer, norm in feeding.items() if len(bits[layer]) == 1}
    return {
        name: choose_quantizer(sites[name], histogram, activations, per_channel=name in feeding)
        for name, histogram in observed.histograms.items()
    }


def choose_quantizer(
    site: Site, histogram: Tensor, activations: Activations, *, per_channel: bool = False
) -> ActivationQuantizer:
    if site.kind == "softmax":
        return softmax_quantizer(histogram, site.bits, activations.softmax)
    if activations.dynamic:
        # A convolution sums over channels and neighbours: there is no vector along the last dimension.
        spatial = activations.granularity == "token" and site.axis != -1
        granularity = "tensor" if spatial else activations.granularity
        return DynamicQuantizer(site.bits, granularity, activations.symmetric, site.axis)
    if not per_channel and activations.granularity != "channel":
        histogram = merged(histogram)
    scale, zero_point = histogram_range(
        histogram,
        bits=site.bits,
        symmetric=activations.symmetric,
        rule=activations.range,
        percentile=activations.percentile,
    )
    if scale.dim() == 1:
        scale, zero_point = without_constants(histogram, scale, zero_point)
    return UniformQuantizer(site.bits, scale, zero_point, site.axis)


def softmax_quantizer(histogram: Tensor, bits: int, choice: str) -> ActivationQuantizer:
    """Of values in 0..1. Under "auto" the one with the least ``attention_error``."""
    histogram = merged(histogram)
    if choice == "auto":
        made = [softmax_quantizer(histogram, bits, name) for name in SOFTMAX if name != "auto"]
        return min(made, key=lambda quantizer: attention_error(quantizer, histogram))
    eta, thresholds, exponents = sulq_fit(histogram, bits=bits, variant=LOG_VARIANTS.get(choice, choice))
    if choice == "uniform":  # the same levels, with integer arithmetic
        scale = exponents[1].exp2()
        return UniformQuantizer(bits, scale, torch.zeros_like(scale))
    return TableQuantizer(bits, thresholds, exponents, eta, choice)


def attention_error(quantizer: ActivationQuantizer, histogram: Tensor) -> float:
    """Expected squared error of attention's output per key, for values whose mean is about as large as their spread.

    Each weight's error meets the spread of the values, the sum of a row's errors their mean: ``MSE + T bias^2`` with T
    keys a row. The squared error alone would favour uniform levels at 3 bits, which round most small weights to zero
    and take a fifth from the sum of a row; accuracy does not.
    """
    count, total, squares = histogram
    values = quantizer((total / count.clamp(min=1)).float()).double()
    number = count.sum()
    mean_squared = (squares - 2 * values * total + values.square() * count).sum() / number
    bias = (values * count - total).sum() / number
    keys = number / total.sum().clamp(min=1)  # a row of weights sums to one
    return float(mean_squared + keys * bias.square())


def merged(histogram: Tensor) -> Tensor:
    """One histogram for all channels."""
    return histogram if histogram.dim() == 2 else histogram.sum(0)


def without_constants(histogram: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """Channels that are always zero take the others' mean scale: theirs means nothing and would spoil the mean."""
    dead = histogram[:, 2].sum(-1) == 0  # [C]
    if not bool(dead.any()) or bool(dead.all()):
        return scale, zero_point
    return torch.where(dead, scale[~dead].mean(), scale), torch.where(
        dead, zero_point[~dead].mean().round(), zero_point
    )


def relative_error(quantizer: ActivationQuantizer, histogram: Tensor) -> float:
    """``|| x~ - x || / || x ||`` over the values of a histogram; NaN where the quantizer depends on the input.

    Exact but for bins that a threshold divides: each bin is taken whole to the level of its mean.
    """
    if math.isnan(quantizer.bounds()[0]):
        return math.nan
    per_channel = isinstance(quantizer, UniformQuantizer) and quantizer.scale.dim() == 1
    count, total, squares = (histogram if per_channel else merged(histogram)).movedim(-2, 0)  # [B] or [C, B]
    means = (total / count.clamp(min=1)).float()
    if per_channel:
        shape = [means.shape[1], means.shape[0], *[1] * (-quantizer.axis - 1)]  # type: ignore[operator]
        values = quantizer(means.t().reshape(shape)).reshape(shape[:2]).t().double()
    else:
        values = quantizer(means).double()
    error = (squares - 2 * values * total + values.square() * count).sum()
    energy = float(squares.sum())
    return math.sqrt(max(float(error), 0.0) / energy) if energy > 0 else 0.0


def describe(
    site: Site, quantizer: ActivationQuantizer, histogram: Tensor | None, observed_by: ActivationQuantizer | None = None
) -> ActivationReport:
    """What the report says of one site. ``observed_by``: the quantizer of what was observed, where a LayerNorm was
    reparameterized since."""
    low, high = quantizer.bounds()
    error = math.nan if histogram is None else relative_error(observed_by or quantizer, histogram)
    return ActivationReport(site.name, site.kind, quantizer.name, quantizer.bits, low, high, error)


@contextmanager
def quantizing_inputs(
    model: nn.Module, quantizers: Mapping[str, ActivationQuantizer], *, straight_through: bool = False
) -> Iterator[None]:
    """Inside, the modules of these names receive quantized inputs; nothing is swapped.

    ``straight_through``: gradients pass the quantizers, but for values that are clipped.
    """
    with ExitStack() as stack:
        for name, quantizer in quantizers.items():

            def quantized(m: nn.Module, args: Any, q: ActivationQuantizer = quantizer) -> Any:
                return (q.straight_through(args[0]) if straight_through else q(args[0]), *args[1:])

            stack.callback(model.get_submodule(name).register_forward_pre_hook(quantized).remove)
        yield
