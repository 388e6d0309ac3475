"""``quantize_``: calibrate, solve layer by layer, and swap at the very end, so that a failure changes nothing."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .calibrate import Calibration, calibrating, logger
from .checkpoint import Checkpoint, weights_fingerprint
from .collect import Observed, Stats, collect_grams, collect_pairs, observing, stages
from .config import RTN, Scheme, Step, method_name, parse_method
from .memory import estimate, quantized_bytes
from .nn import from_float, layout, swap_modules
from .report import LayerReport, Report
from .selection import Target, select, skipped_report
from .solve import Solution, solve

INPUTS = ("float", "quantized")
BINS = 64  # of the weight histograms in Report.details


@dataclass(frozen=True)
class Statistics:
    """Calibration that was done before, in place of calibration data: one pass serves several calls of quantize_."""

    stats: dict[str, Stats]
    seen: Observed


def collect_statistics(
    model: nn.Module, calib: Any, *, max_tokens: int | None = None, seed: int = 0, progress: bool = True
) -> Statistics:
    """Run the calibration once, to compare methods or schemes on copies of one float model.

    Pass the result as ``calib`` of :func:`quantize_`, with ``inputs="float"`` and without ``checkpoint_dir``.
    """
    layers = {name: target.module for name, target in select(model, Scheme(8), {}, ())[0].items()}
    with calibrating(model, seed):
        return Statistics(
            *collect_grams(model, layers, Calibration(calib, progress=progress), max_tokens=max_tokens, seed=seed)
        )


@dataclass
class Run:
    """What one call of quantize_ has so far."""

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

    def open_layers(self) -> dict[str, nn.Module]:
        """The layers that are neither solved nor given up."""
        return {name: t.module for name, t in self.targets.items() if name not in self.layers}

    def skip(self, name: str, class_name: str, reason: str) -> None:
        self.layers[name] = skipped_report(name, class_name, reason)
        logger.warning("%s is left in floating point: %s", name, reason)

    def require_all(self) -> None:
        """Under strict, an error as soon as it is known which layers would stay: before anything costly."""
        left = [
            f"{name} ({layer.status.removeprefix('skipped: ')})" for name, layer in self.layers.items() if layer.skipped
        ]
        if self.strict and left:
            raise ValueError(f"quantize_: strict: {len(left)} would stay in floating point: {'; '.join(left)}")


def quantize_(
    model: nn.Module,
    scheme: str | Scheme,
    calib: Any = None,
    *,
    method: str | Step | Sequence[Step] = "auto",
    effort: str = "standard",
    overrides: Mapping[str, str | Scheme | None] | None = None,
    ignore: Sequence[str] = (),
    inputs: str = "float",
    strict: bool = False,
    progress: bool = True,
    checkpoint_dir: str | Path | None = None,
    seed: int = 0,
    max_tokens: int | None = None,
    ridge: float = 0.01,
) -> Report:
    """Replace the model's linear and convolution layers by low-bit ones, in place. If it raises, nothing has changed.

    Replaced: Linear, Conv1d, Conv2d, Conv3d, ConvTranspose2d, and Hugging Face's Conv1D. Embeddings and norms stay.
    Layers that cannot be replaced (tied weights, used through F.linear, never reached) are named in the report.

    Args:
        model: any module. It is run in evaluation mode; its mode and the global random state are put back.
        scheme: ``"W4A16"``, ``"W3A16g128"``, ``"W4A16g64-sym"`` ... or a Scheme.
        calib: calibration data (see :mod:`torchquant.calibrate`) or the result of :func:`collect_statistics`; only
            ``method="rtn"`` goes without.
        method: ``"auto"``, ``"rtn"``, ``"comq"``, ``"gptq"``, ``"gptq+comq"``, ``"magr+comq"`` or a list of steps.
        effort: of ``"auto"``: ``"fast"``, ``"standard"`` or ``"high"``.
        overrides: name, ``re:`` pattern or class name -> another scheme, or None to leave the layer as it is.
        ignore: names, ``re:`` patterns or class names to leave as they are.
        inputs: ``"float"``: one pass, every layer sees what it sees in the float model. ``"quantized"``: block by
            block, and the solvers also correct the error of the blocks before; needs two passes a block.
        strict: raise instead of leaving a layer in floating point.
        progress: show progress bars.
        checkpoint_dir: finished layers are kept there, and a repeated call goes on where the last one was stopped.
        seed: of the calibration's random numbers (sub-sampling, shuffling loaders).
        max_tokens: use at most so many tokens a layer (convolutions: whole pictures, at least one).
        ridge: share of its mean diagonal added to every Gram, for the solvers and for the errors reported: keeps them
            from fitting the calibration data where it is thin. 0 trusts the data alone.

    Raises:
        ValueError: options that mean nothing, patterns that match nothing, calibration data without tokens or with NaN
            or Inf, a checkpoint of another run, and under ``strict`` a layer that would stay in floating point.
    """
    began = time.perf_counter()
    wanted, steps = Scheme.parse(scheme), parse_method(method, effort)
    check_options(inputs, max_tokens, ridge, calib, steps)
    if isinstance(calib, Statistics) and (inputs != "float" or checkpoint_dir is not None or max_tokens is not None):
        raise ValueError(
            "quantize_: collected statistics go with inputs='float' and neither checkpoint_dir nor max_tokens"
        )
    targets, skipped = select(model, wanted, overrides or {}, ignore)
    data = calib if calib is None or isinstance(calib, Statistics) else Calibration(calib, progress=progress)
    logger.info("memory: %s", estimate(targets))
    config = {
        "scheme": str(wanted),
        "method": [step.to_dict() for step in steps],
        "layers": {name: str(target.scheme) for name, target in targets.items()},
        "inputs": inputs,
        "seed": seed,
        "max_tokens": max_tokens,
        "ridge": ridge,
    }
    with calibrating(model, seed):
        checkpoint = None if isinstance(data, Statistics) else open_checkpoint(checkpoint_dir, config, model, data)
        run = Run(model, targets, steps, checkpoint, {}, {}, max_tokens, seed, progress, strict, ridge)
        for layer in skipped:
            run.skip(layer.name, layer.type, layer.status.removeprefix("skipped: "))
        run.require_all()
        restore(run)
        if data is None:
            skip_foreign(run)
            solve_layers(run, run.open_layers(), {})
        elif isinstance(data, Statistics):
            solve_from_statistics(run, data.stats, data.seen)
        elif inputs == "float":
            quantize_from_float_inputs(run, data)
        else:
            quantize_from_quantized_inputs(run, data)
    report = finish(run, wanted, began)
    swap_in(run)
    return report


def check_options(inputs: str, max_tokens: int | None, ridge: float, calib: Any, steps: Sequence[Step]) -> None:
    if ridge < 0:
        raise ValueError(f"quantize_: ridge must not be negative, got {ridge}")
    if inputs not in INPUTS:
        raise ValueError(f"quantize_: inputs must be one of {', '.join(INPUTS)}, got {inputs!r}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"quantize_: max_tokens must be at least 1, got {max_tokens}")
    if calib is None and not (len(steps) == 1 and isinstance(steps[0], RTN)):
        raise ValueError(f"quantize_: method {method_name(steps)!r} needs calibration data; only 'rtn' goes without")


def open_checkpoint(
    folder: str | Path | None, config: dict[str, Any], model: nn.Module, data: Calibration | None
) -> Checkpoint | None:
    if folder is None:
        return None
    parts = {**config, "weights": weights_fingerprint(model), "data": None if data is None else data.fingerprint()}
    return Checkpoint(folder, parts)


def restore(run: Run) -> None:
    for name in run.targets if run.checkpoint is not None else ():
        done = run.checkpoint.load(name)  # type: ignore[union-attr]
        if done is not None:
            run.layers[name], run.solutions[name] = done
    if run.solutions:
        logger.info("%d of %d layers were done before", len(run.solutions), len(run.targets))


def quantize_from_float_inputs(run: Run, data: Calibration) -> None:
    layers = run.open_layers()
    if not layers:
        return
    solve_from_statistics(run, *collect_grams(run.model, layers, data, max_tokens=run.max_tokens, seed=run.seed))


def solve_from_statistics(run: Run, stats: Mapping[str, Stats], seen: Observed) -> None:
    explain_missing(run, seen, stats)
    solve_layers(run, run.open_layers(), stats)


def quantize_from_quantized_inputs(run: Run, data: Calibration) -> None:
    """Stage by stage: a block's layers are solved together, on inputs from the blocks already quantized."""
    if not run.open_layers():
        return
    data.keep()
    everything = {name: target.module for name, target in run.targets.items()}
    with observing(run.model, everything) as seen:
        data.run(run.model)
    explain_missing(run, seen, seen.order)
    quantized: dict[nn.Module, nn.Module] = {}
    for stage in stages(run.model, [name for name in seen.order if name not in seen.foreign]):
        layers = {name: run.targets[name].module for name in stage if name not in run.layers}
        if layers:
            stats = collect_pairs(run.model, layers, quantized, data, max_tokens=run.max_tokens, seed=run.seed)
            for name in layers.keys() - stats.keys():
                run.skip(name, type(layers[name]).__name__, "it received no tokens")
            solve_layers(run, [name for name in layers if name in stats], stats)
        quantized |= {run.targets[n].module: replacement(run, n) for n in stage if n in run.solutions}


def skip_foreign(run: Run) -> None:
    """Without data there is no output to compare a subclass's own forward() with."""
    for name, module in run.open_layers().items():
        if not layout.is_known(module):
            kind = type(module).__name__
            run.skip(name, kind, f"{kind} has a forward() of its own; pass calibration data to have it checked")
    run.require_all()


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


def solve_layers(run: Run, names: Any, stats: Mapping[str, Stats]) -> None:
    stats = dict(stats)
    for name in tqdm(list(names), desc=method_name(run.steps), disable=not run.progress, leave=False):
        solve_layer(run, run.targets[name], stats.pop(name, None))  # popped: a Gram goes as soon as it is not needed


def solve_layer(run: Run, target: Target, stats: Stats | None) -> None:
    began = time.perf_counter()
    module, scheme = target.module, target.scheme
    matrix = layout.to_matrix(module)
    try:
        solution = solve(matrix, stats, scheme, run.steps, run.ridge)
    except (RuntimeError, TypeError, ValueError) as error:
        kind = RuntimeError if isinstance(error, RuntimeError) else ValueError
        raise kind(f"quantize_: layer {target.name!r}: {error}") from error
    layer = LayerReport(
        name=target.name,
        type=type(module).__name__,
        method=method_name(run.steps),
        scheme=str(scheme),
        bits=scheme.weight_bits,
        group_size=scheme.group_size,
        shape=(matrix.shape[0], matrix.shape[1]),
        error_rtn=solution.error_rtn,
        error=solution.error,
        dead_channels=solution.dead_channels,
        damping=solution.damping,
        tokens=0 if stats is None else stats.tokens,
        status=solution.status,
        seconds=time.perf_counter() - began,
        bytes_before=matrix.numel() * matrix.element_size(),
        bytes_after=quantized_bytes(tuple(matrix.shape), scheme),
        winners=solution.winners,
    )
    logger.info("%s: error %.4g (rounding %.4g), %.2f s", layer.name, layer.error, layer.error_rtn, layer.seconds)
    if run.checkpoint is not None:
        run.checkpoint.save(layer, solution)
    run.layers[target.name], run.solutions[target.name] = layer, solution


def replacement(run: Run, name: str) -> nn.Module:
    target, found = run.targets[name], run.solutions[name]
    device = target.module.weight.device  # type: ignore[union-attr]
    codes, scale, zero_point = (t.to(device) for t in (found.codes, found.scale, found.zero_point))  # type: ignore[arg-type]
    return from_float(target.module, codes, scale, zero_point, target.scheme.weight_bits, target.scheme.group_size)


def swap_in(run: Run) -> None:
    """The only change of the model: all new layers are made before the first one is put in."""
    swap_modules(run.model, {run.targets[name].module: replacement(run, name) for name in run.solutions})


def finish(run: Run, scheme: Scheme, began: float) -> Report:
    order = {name: i for i, (name, _) in enumerate(run.model.named_modules())}
    layers = sorted(run.layers.values(), key=lambda layer: order.get(layer.name, len(order)))
    details = {
        "histograms": {name: histogram(run.targets[name], found) for name, found in run.solutions.items()},
        "magr": {name: list(found.largest) for name, found in run.solutions.items() if found.largest},
    }
    seconds = time.perf_counter() - began
    solving = sum(layer.seconds for layer in layers)
    logger.info("%d layers quantized in %.1f s, of which solving %.1f s", len(run.solutions), seconds, solving)
    return Report(layers, seconds, str(scheme), method_name(run.steps), run.seed, details)


def histogram(target: Target, found: Solution) -> dict[str, Any]:
    """Of the float weights in units of their own grid: code k lies at k, whatever the row's scale."""
    levels = 2**target.scheme.weight_bits
    weight: Tensor = layout.to_matrix(target.module).float()
    group = target.scheme.group_size or weight.shape[1]
    scale, zero_point = (
        t.to(weight.device).repeat_interleave(group, dim=1)[:, : weight.shape[1]]
        for t in (found.scale, found.zero_point)
    )
    low, high = -1.0, float(levels)
    position = (weight / scale + zero_point).clamp(low, high)
    return {"low": low, "high": high, "levels": levels, "counts": torch.histc(position, BINS, low, high).int().tolist()}
