"""``quantize_``: calibrate, solve layer by layer, and swap at the very end, so that a failure changes nothing."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .calibrate import Calibration, calibrating, logger
from .checkpoint import Checkpoint, weights_fingerprint
from .collect import Observed, Stats, collect_grams, observing, stages
from .config import RTN, Activations, Scheme, Step, method_name, parse_method
from .memory import estimate
from .nn import layout
from .report import Report
from .selection import select
from .steps import (
    Run,
    choose_quantizers,
    collect_inputs,
    collect_stage,
    correct_weights,
    explain_missing,
    finish,
    observe,
    preparing,
    reparameterize_layernorms,
    replacement,
    rewrite_attention,
    solve_layers,
    solve_weights,
    swap_in,
)

INPUTS = ("float", "quantized")


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
    activations: Activations | None = None,
    first_last_bits: int | None = 8,
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
    With ``activation_bits`` below 16 the inputs of these layers are quantized too, and in attention q, k, v and the
    softmax's output (:func:`torchquant.nn.rewrite_attention` says which classes); LayerNorms are reparameterized. The
    weights are then solved for the quantized inputs, with the float layers' outputs as the target.

    Args:
        model: any module. It is run in evaluation mode; its mode and the global random state are put back.
        scheme: ``"W4A16"``, ``"W4A4"``, ``"W3A16g128"``, ``"W4A16g64-sym"`` ... or a Scheme.
        calib: calibration data (see :mod:`torchquant.calibrate`) or the result of :func:`collect_statistics`; only
            ``method="rtn"`` goes without.
        method: ``"auto"``, ``"rtn"``, ``"comq"``, ``"gptq"``, ``"gptq+comq"``, ``"magr+comq"`` or a list of steps.
        effort: of ``"auto"``: ``"fast"``, ``"standard"`` or ``"high"``.
        overrides: name, ``re:`` pattern or class name -> another scheme, or None to leave the layer as it is.
        ignore: names, ``re:`` patterns or class names to leave as they are.
        inputs: ``"float"``: one pass, every layer sees what it sees in the float model. ``"quantized"``: block by
            block, and the solvers also correct the error of the blocks before; needs two passes a block.
        activations: how activations are quantized (:class:`Activations`), where ``activation_bits`` is below 16.
        first_last_bits: then the least number of bits, of weights and inputs, in the layers that run first and last
            (unless an override names them); None: no exception.
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
    schemes = [wanted, *(Scheme.parse(value) for value in (overrides or {}).values() if value is not None)]
    quantizes_activations = any(s.activation_bits < 16 for s in schemes)
    check_options(inputs, max_tokens, ridge, calib, steps)
    if isinstance(calib, Statistics) and (inputs != "float" or checkpoint_dir is not None or max_tokens is not None):
        raise ValueError(
            "quantize_: collected statistics go with inputs='float' and neither checkpoint_dir nor max_tokens"
        )
    if quantizes_activations:
        check_activations(calib, wanted)
        prepared = preparing(
            model, calib, wanted, activations=activations, method=steps, overrides=overrides, ignore=ignore,
            first_last_bits=first_last_bits, strict=strict, progress=progress, seed=seed, max_tokens=max_tokens,
            ridge=ridge,
        )  # fmt: skip
        with prepared as run:
            quantize_activations_and_weights(run, inputs, checkpoint_dir)
        return run.report
    targets, skipped = select(model, wanted, overrides or {}, ignore)
    data = calib if calib is None or isinstance(calib, Statistics) else Calibration(calib, progress=progress)
    logger.info("memory: %s", estimate(targets))
    with calibrating(model, seed):
        run = Run(model, targets, steps, None, {}, {}, max_tokens, seed, progress, strict, ridge, wanted)
        if not isinstance(data, Statistics):
            run.checkpoint = open_checkpoint(checkpoint_dir, fingerprint(run, inputs), model, data)
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


def check_activations(calib: Any, scheme: Scheme) -> None:
    if calib is None or isinstance(calib, Statistics):
        got = "none" if calib is None else "collected statistics"
        raise ValueError(f"quantize_: activations ({scheme}) need calibration data, got {got}")


def quantize_activations_and_weights(run: Run, inputs: str, checkpoint_dir: str | Path | None) -> None:
    """The steps of ``quantize_`` where activations are quantized too."""
    rewrite_attention(run)
    logger.info("memory: %s", estimate(run.targets))
    run.checkpoint = open_checkpoint(checkpoint_dir, fingerprint(run, inputs), run.model, run.data)
    observe(run)
    choose_quantizers(run)
    reparameterize_layernorms(run)
    restore(run)
    if inputs == "float":
        collect_inputs(run)
        correct_weights(run)
        solve_weights(run)
        return
    quantized = run.point_quantizers()
    for stage in stages(run.model, [name for name in run.observed.order if name in run.targets]):
        collect_stage(run, stage, quantized)
        correct_weights(run)
        solve_weights(run)
        quantized |= {run.targets[name].module: replacement(run, name) for name in stage if name in run.solutions}


def fingerprint(run: Run, inputs: str) -> dict[str, Any]:
    """What the results of a run depend on, besides the weights and the data."""
    own = {
        "scheme": str(run.scheme),
        "method": [step.to_dict() for step in run.steps],
        "layers": {name: str(target.scheme) for name, target in run.targets.items()},
        "inputs": inputs,
        "seed": run.seed,
        "max_tokens": run.max_tokens,
        "ridge": run.ridge,
    }
    if run.sites:
        own |= {"activations": run.activations.to_dict(), "first_last_bits": run.first_last_bits}
    return own


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
    run.data = data
    everything = {name: target.module for name, target in run.targets.items()}
    with observing(run.model, everything) as seen:
        data.run(run.model)
    explain_missing(run, seen, seen.order)
    quantized: dict[nn.Module, nn.Module] = {}
    for stage in stages(run.model, [name for name in seen.order if name not in seen.foreign]):
        layers = {name: run.targets[name].module for name in stage if name not in run.layers}
        if layers:
            collect_stage(run, list(layers), quantized)
            solve_weights(run)
        quantized |= {run.targets[n].module: replacement(run, n) for n in stage if n in run.solutions}


def skip_foreign(run: Run) -> None:
    """Without data there is no output to compare a subclass's own forward() with."""
    for name, module in run.open_layers().items():
        if not layout.is_known(module):
            kind = type(module).__name__
            run.skip(name, kind, f"{kind} has a forward() of its own; pass calibration data to have it checked")
    run.require_all()
