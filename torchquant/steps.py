"""The steps that quantize_ and the recipes are made of. Each reads and changes a ``Run``; a recipe calls them in turn.

    with preparing(model, calib, "W4A4") as run:
        rewrite_attention(run)          # attention modules -> the same, with a point at every matrix operand
        observe(run)                    # histograms of all activations; which LayerNorms feed which layers
        choose_quantizers(run)          # one for every activation
        reparameterize_layernorms(run)  # per-channel ranges behind LayerNorms become one range, losslessly
        collect_inputs(run)             # Grams of quantized inputs, and their products with the float inputs
        correct_weights(run)            # float weights that answer for the inputs' quantization
        solve_weights(run)              # codes
    return run.report                   # leaving the block swapped everything in; an exception puts everything back

Between steps ``run.quantizers``, ``run.stats``, ``run.solutions`` ... may be read and changed.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from . import activations as acts
from . import views
from .activations import INPUT, Observations, Site, quantizing_inputs
from .calibrate import Calibration, calibrating, logger
from .checkpoint import Checkpoint
from .collect import Observed, Stats, collect_own, collect_pairs
from .config import Activations, Scheme, Step, method_name, parse_method
from .memory import quantized_bytes
from .nn import from_float, layout, swap_modules
from .nn.block import fuse_modules
from .nn.quantizers import ActivationQuantizer
from .nn.rewrite import rewrite_attention as rewrite
from .nn.swap import unchanged_on_error
from .reparameterize import reparameterize_all
from .report import LayerReport, Report
from .selection import Target, select, select_attention, skipped_report
from .solve import Solution, correct, solve, weight_histogram

__all__ = [
    "Run", "add_solution", "choose_quantizers", "collect_inputs", "correct_weights", "observe", "own_weights",
    "preparing", "quantizing_inputs", "reparameterize_layernorms", "rewrite_attention", "solve_weights",
    "unchanged_on_error",
]  # fmt: skip


@dataclass
class Run:
    """What one quantization has so far."""

    model: nn.Module
    targets: dict[str, Target]
    steps: tuple[Step, ...]
    checkpoint: Checkpoint | None
    layers: dict[str, LayerReport]
    solutions: dict[str, Solution]
    max_tokens: int | None
    seed: int
    progress: bool
    strict: bool
    ridge: float
    # Of runs that quantize activations too:
    scheme: Scheme = field(default_factory=lambda: Scheme(8))
    activations: Activations = field(default_factory=Activations)
    data: Calibration | None = None
    first_last_bits: int | None = None
    overrides: Mapping[str, str | Scheme | None] = field(default_factory=dict)
    ignore: Sequence[str] = ()
    attention: dict[str, nn.Module] = field(default_factory=dict)  # rewritten modules
    sites: dict[str, Site] = field(default_factory=dict)
    observed: Observations = field(default_factory=Observations)
    quantizers: dict[str, ActivationQuantizer] = field(default_factory=dict)  # of sites
    per_channel: dict[str, ActivationQuantizer] = field(default_factory=dict)  # before LayerNorms were reparameterized
    stats: dict[str, Stats] = field(default_factory=dict)
    corrected: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)  # weight [N, K] and bias
    maps: dict[str, Tensor] = field(default_factory=dict)  # attention of the float model, for the report
    report: Report = field(default_factory=Report)

    def open_layers(self) -> dict[str, nn.Module]:
        """The layers that are neither solved nor given up."""
        return {name: t.module for name, t in self.targets.items() if name not in self.layers}

    def skip(self, name: str, class_name: str, reason: str) -> None:
        self.layers[name] = skipped_report(name, class_name, reason)
        for gone in (self.sites, self.quantizers):
            gone.pop(name, None)
        logger.warning("%s is left in floating point: %s", name, reason)

    def require_all(self) -> None:
        """Under strict, an error as soon as it is known which layers would stay: before anything costly."""
        left = [
            f"{name} ({layer.status.removeprefix('skipped: ')})" for name, layer in self.layers.items() if layer.skipped
        ]
        if self.strict and left:
            raise ValueError(f"quantize_: strict: {len(left)} would stay in floating point: {'; '.join(left)}")

    def input_quantizers(self) -> dict[str, ActivationQuantizer]:
        """Of layers, by their names."""
        return {name: q for name, q in self.quantizers.items() if name in self.targets}

    def point_quantizers(self) -> dict[nn.Module, nn.Module]:
        """Of attention: the placeholder that stands in the model -> its quantizer."""
        return {self.sites[name].module: q for name, q in self.quantizers.items() if self.sites[name].kind != INPUT}


@contextmanager
def preparing(
    model: nn.Module,
    calib: Any,
    scheme: str | Scheme,
    *,
    activations: Activations | None = None,
    method: str | Step | Sequence[Step] = "auto",
    effort: str = "standard",
    overrides: Mapping[str, str | Scheme | None] | None = None,
    ignore: Sequence[str] = (),
    first_last_bits: int | None = 8,
    strict: bool = False,
    progress: bool = True,
    seed: int = 0,
    max_tokens: int | None = None,
    ridge: float = 0.01,
) -> Iterator[Run]:
    """A ``Run`` for the steps in the with block; after them ``run.report`` is made and quantized modules swapped in.

    The model is in evaluation mode, without gradients, with random numbers of its own. Arguments as for ``quantize_``.
    """
    began = time.perf_counter()
    wanted, steps = Scheme.parse(scheme), parse_method(method, effort)
    data = Calibration(calib, progress=progress)
    options = Activations() if activations is None else activations
    with unchanged_on_error(model), calibrating(model, seed):
        data.keep()
        run = Run(model, {}, steps, None, {}, {}, max_tokens, seed, progress, strict, ridge, wanted, options, data)
        run.first_last_bits, run.overrides, run.ignore = first_last_bits, overrides or {}, ignore
        yield run
        run.report = finish(run, wanted, began)
        run.report.details |= measure(run)
        swap_in(run)
        after = views.attention_maps(run.model, data, run.attention)
        run.report.details["attention"] = views.most_changed(run.maps, after)


def own_weights(run: Run) -> None:
    """Give the model parameters that nobody else holds: from here on they may be trained in place."""
    copies: dict[nn.Parameter, nn.Parameter] = {}
    for module in run.model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                module._parameters[key] = copies.setdefault(parameter, copy)


# --- where ---


def select_layers(run: Run, used: Sequence[str] = ()) -> None:
    """Fill ``run.targets`` and the sites of the layers' inputs; report layers that cannot be replaced."""
    run.targets, skipped = select(run.model, run.scheme, run.overrides, run.ignore, used)
    for layer in skipped:
        run.skip(layer.name, layer.type, layer.status.removeprefix("skipped: "))
    for name, target in run.targets.items():
        if target.scheme.activation_bits < 16:
            run.sites[name] = Site(name, INPUT, target.scheme.activation_bits, target.module)


def rewrite_attention(run: Run) -> None:
    """Attention modules make room for quantizers of q, k, v and the softmax; then the layers are selected."""
    schemes, used = select_attention(run.model, run.scheme, run.overrides, run.ignore)
    kinds = {name: type(run.model.get_submodule(name)).__name__ for name in schemes}
    done = rewrite(run.model, skip=[name for name, scheme in schemes.items() if scheme is None])
    select_layers(run, sorted(used))
    for name, reason in done.left.items():
        run.skip(name, kinds[name], reason)
    run.require_all()
    run.attention = done.modules
    for name, module in done.modules.items():
        scheme = schemes[name]
        assert scheme is not None
        run.sites |= {site.name: site for site in acts.attention_sites(name, module, scheme.activation_bits)}


# --- activations ---


def observe(run: Run) -> None:
    """Run the calibration once; give up layers that it did not reach; first and last layer get their bits."""
    if not run.targets and not run.layers:
        select_layers(run)
    assert run.data is not None
    layers = {name: target.module for name, target in run.targets.items()}
    granularity = run.activations.granularity
    run.observed = acts.observe(run.model, run.sites, layers, run.data, granularity=granularity)
    explain_missing(run, run.observed.seen, run.observed.seen.order)
    for name in run.attention:
        if f"{name}.product.softmax" not in run.observed.histograms:
            run.skip(name, type(run.attention[name]).__name__, "calibration never reached it")
    protect_first_and_last(run)
    run.maps = views.attention_maps(run.model, run.data, run.attention)


def protect_first_and_last(run: Run) -> None:
    """The layers that run first and last get ``first_last_bits``, unless the user gave them a scheme of their own."""
    order = [name for name in run.observed.order if name in run.targets and name not in run.layers]
    for name in {*order[:1], *order[-1:]} if run.first_last_bits is not None else ():
        target, bits = run.targets[name], run.first_last_bits
        assert bits is not None
        if target.explicit or target.scheme.activation_bits == 16:
            continue
        wider = [max(bits, own) for own in (target.scheme.weight_bits, target.scheme.activation_bits)]
        target.scheme = replace(target.scheme, weight_bits=wider[0], activation_bits=wider[1])
        run.sites[name].bits = wider[1]


def choose_quantizers(run: Run) -> None:
    """``run.quantizers``: one for every site that was reached."""
    sites = {name: site for name, site in run.sites.items() if name in run.observed.histograms}
    run.quantizers = acts.choose_quantizers(run.observed, sites, run.activations)


def reparameterize_layernorms(run: Run) -> dict[str, list[str]]:
    """One range for every LayerNorm's output, with the channels' own ranges absorbed; LayerNorm -> layers."""
    if not run.activations.reparameterize:
        return {}
    before = dict(run.quantizers)
    done = reparameterize_all(run.observed.norms, run.quantizers)
    run.per_channel |= {name: before[name] for layers in done.values() for name in layers if name in before}
    for name, norm in run.observed.norms.items():
        if norm.reason:
            logger.info("%s is not reparameterized: %s", name, norm.reason)
    return done


# --- weights ---


def collect_inputs(run: Run) -> None:
    """``run.stats``: in one pass, every layer's inputs as the float model makes them, before and after quantization."""
    assert run.data is not None
    run.stats = collect_own(
        run.model, run.open_layers(), run.input_quantizers(), run.data, max_tokens=run.max_tokens, seed=run.seed
    )


def collect_stage(run: Run, names: Sequence[str], quantized: Mapping[nn.Module, nn.Module]) -> None:
    """``run.stats`` of these layers, with the inputs that the ``quantized`` modules before them make."""
    assert run.data is not None
    layers = {name: run.targets[name].module for name in names if name not in run.layers}
    if not layers:
        return
    run.stats = collect_pairs(
        run.model, layers, quantized, run.data, max_tokens=run.max_tokens, seed=run.seed, quantizers=run.quantizers
    )
    for name in layers.keys() - run.stats.keys():
        run.skip(name, type(layers[name]).__name__, "it received no tokens")


def correct_weights(run: Run, ridge: float | None = None) -> None:
    """Start from float weights (and biases) that make up for the inputs' quantization: the first half of ERQ."""
    for name, stats in run.stats.items():
        matrix, bias = matrix_of(run.targets[name])
        run.corrected[name] = correct(matrix, bias, stats, run.ridge if ridge is None else ridge)


def solve_weights(run: Run) -> None:
    """Codes for all layers that have statistics and no solution yet. The target is the float layers' outputs."""
    solve_layers(run, [name for name in run.stats if name not in run.layers], run.stats)
    run.stats = {}


def matrix_of(target: Target) -> tuple[Tensor, Tensor | None]:
    bias = target.module.bias
    return layout.to_matrix(target.module), bias.detach() if isinstance(bias, Tensor) else None


def solve_layers(run: Run, names: Any, stats: Mapping[str, Stats]) -> None:
    stats = dict(stats)
    for name in tqdm(list(names), desc=method_name(run.steps), disable=not run.progress, leave=False):
        solve_layer(run, run.targets[name], stats.pop(name, None))  # popped: a Gram goes as soon as it is not needed


def solve_layer(run: Run, target: Target, stats: Stats | None) -> None:
    began = time.perf_counter()
    matrix, bias = matrix_of(target)
    start, original = matrix, None
    if target.name in run.corrected:
        start, original = run.corrected.pop(target.name)[0], matrix
    try:
        solution = solve(start, stats, target.scheme, run.steps, run.ridge, original, bias)
    except (RuntimeError, TypeError, ValueError) as error:
        kind = RuntimeError if isinstance(error, RuntimeError) else ValueError
        raise kind(f"quantize_: layer {target.name!r}: {error}") from error
    add_solution(run, target.name, solution, time.perf_counter() - began, 0 if stats is None else stats.tokens)


def add_solution(run: Run, name: str, solution: Solution, seconds: float = 0.0, tokens: int = 0) -> None:
    """This layer is done."""
    target = run.targets[name]
    matrix, scheme = layout.to_matrix(target.module), target.scheme
    layer = LayerReport(
        name=name,
        type=type(target.module).__name__,
        method=method_name(run.steps),
        scheme=str(scheme),
        bits=scheme.weight_bits,
        group_size=scheme.group_size,
        shape=(matrix.shape[0], matrix.shape[1]),
        error_rtn=solution.error_rtn,
        error=solution.error,
        dead_channels=solution.dead_channels,
        damping=solution.damping,
        tokens=tokens,
        status=solution.status,
        seconds=seconds,
        bytes_before=matrix.numel() * matrix.element_size(),
        bytes_after=quantized_bytes(tuple(matrix.shape), scheme),
        winners=solution.winners,
    )
    logger.info("%s: error %.4g (rounding %.4g), %.2f s", layer.name, layer.error, layer.error_rtn, layer.seconds)
    if run.checkpoint is not None:
        run.checkpoint.save(layer, solution)
    run.layers[name], run.solutions[name] = layer, solution


# --- the end ---


def replacement(run: Run, name: str) -> nn.Module:
    target, found = run.targets[name], run.solutions[name]
    device = target.module.weight.device  # type: ignore[union-attr]
    codes, scale, zero_point = (t.to(device) for t in (found.codes, found.scale, found.zero_point))  # type: ignore[arg-type]
    layer = from_float(target.module, codes, scale, zero_point, target.scheme.weight_bits, target.scheme.group_size)
    if found.bias is not None:
        layer.bias = found.bias.to(device)  # type: ignore[arg-type]
    if name in run.quantizers:
        layer.input_quantizer = run.quantizers[name].train(layer.training)
    return layer


def swap_in(run: Run) -> None:
    """All new modules are made before the first one is put in."""
    layers: dict[nn.Module, nn.Module] = {run.targets[name].module: replacement(run, name) for name in run.solutions}
    swap_modules(run.model, layers | run.point_quantizers())
    fuse_modules(run.model)


def finish(run: Run, scheme: Scheme, began: float) -> Report:
    order = {name: i for i, (name, _) in enumerate(run.model.named_modules())}
    layers = sorted(run.layers.values(), key=lambda layer: order.get(layer.name, len(order)))
    details = {
        "histograms": {
            name: weight_histogram(layout.to_matrix(run.targets[name].module), found, run.targets[name].scheme)
            for name, found in run.solutions.items()
        },
        "magr": {name: list(found.largest) for name, found in run.solutions.items() if found.largest},
    }
    described = [
        acts.describe(run.sites[name], quantizer, run.observed.histograms.get(name), run.per_channel.get(name))
        for name, quantizer in sorted(run.quantizers.items(), key=lambda item: order.get(item[0], len(order)))
    ]
    seconds = time.perf_counter() - began
    solving = sum(layer.seconds for layer in layers)
    logger.info("%d layers quantized in %.1f s, of which solving %.1f s", len(run.solutions), seconds, solving)
    return Report(layers, seconds, str(scheme), method_name(run.steps), run.seed, details, described)


def measure(run: Run) -> dict[str, Any]:
    """What the report draws of activations: the float model is still in place."""
    layers = {name: (run.targets[name].module, partial(replacement, run, name)) for name in run.solutions}
    return views.measure(run.model, run.data, layers, run.sites, run.quantizers)


def explain_missing(run: Run, seen: Observed, reached: Any) -> None:
    """Give up, by name and with the reason, what calibration did not reach."""
    layers = run.open_layers()
    if layers and not run.solutions and not any(name in reached for name in layers):
        raise ValueError("quantize_: calibration reached no layer with a single token: is calib empty?")
    for name, module in layers.items():
        kind = type(module).__name__
        if name in seen.foreign:
            run.skip(name, kind, f"{kind}.forward() computes something else than the class it derives from")
        elif name not in reached and f"{name}.weight" in seen.parameters and name not in seen.order:
            run.skip(name, kind, "its weight is used through F.linear, not by calling the layer")
        elif name not in reached:
            run.skip(name, kind, "calibration never reached it")
    report_loose_parameters(run, seen)
    run.require_all()


def report_loose_parameters(run: Run, seen: Observed) -> None:
    """Parameters that are used as a weight and belong to no layer, tied to none, and to no attention module."""
    owners = [module for module in run.model.modules() if layout.is_quantizable(module)]
    owners += [module for module in run.model.modules() if isinstance(module, nn.MultiheadAttention)]
    spoken_for = {p.untyped_storage().data_ptr() for module in owners for p in module.parameters()}
    for name in sorted(seen.parameters):
        if run.model.get_parameter(name).untyped_storage().data_ptr() not in spoken_for:
            run.skip(name, "Parameter", "it is used through F.linear, not by a layer")
