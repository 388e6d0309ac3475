"""DFSQ: non-uniform activations for super-resolution networks, without fine-tuning."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate import Calibration
from ..collect import hooked, input_of
from ..config import Scheme, Step
from ..nn import layout
from ..nn.quantizers import SubsetQuantizer
from ..quantizers import SubsetChoice, choose_subset
from ..report import Report
from ..selection import Patterns, modules_with_names, require_used
from ..steps import Run, collect_inputs, observe, preparing, solve_weights

NORMS = ("dynamic", "static")
GUARD = 1e-8  # of the paper: keeps a channel of zeros from dividing by zero


def dfsq(
    model: nn.Module,
    calib: Any,
    scheme: str | Scheme = "W4A4",
    *,
    method: str | Step | Sequence[Step] = "rtn",
    norm: str = "dynamic",
    selector: str = "exact",
    fallback: bool = True,
    body: Sequence[str] | None = None,
    max_values: int = 1 << 16,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Quantize the body of a super-resolution network in place: subset quantizers for inputs, min-max for weights.

    Every channel of every sample is normalized at run time, ``x / (max|x| + 1e-8)`` where the input is never negative
    (after a ReLU), else ``(x - mean) / (max|x - mean| + 1e-8)``. For each channel ``2**bits`` levels, 0 among them, are
    chosen from a universal set of 377 sums of powers of two; each value goes to the nearest one. Weights: min-max,
    asymmetric, one scale an output channel. Head, tail and upsampler stay in floating point.

    As published [1], but for two things. The levels are the best ones (a shortest path) instead of those of 5 runs of
    k-means, rounded: ``selector="kmeans"`` gives these. And channels where equally spaced levels have the lower error,
    most of them at 8 bits, take these: ``fallback=False`` turns that off.

    Args:
        model: a network of convolutions: EDSR, RDN, SRResNet, ESRGAN ...
        calib: calibration data, small pictures; the paper takes 32 patches.
        scheme: ``"W4A4"``, ``"W6A6"``, ``"W8A8"`` ...
        method: of the weights, as for :func:`torchquant.quantize_`; the published one is ``"rtn"``.
        norm: ``"static"``: mean and largest magnitude of each channel from the calibration data: no reductions at run
            time, at the price of a range that does not follow the picture.
        selector, fallback: as above.
        body: names, ``re:`` patterns or class names of the layers to quantize. None: all convolutions but the first
            and the last one, transposed ones, those that see a larger picture than the first, and those that add the
            channels that are then shuffled into one.
        max_values: of each channel, drawn at random from the calibration data, on which levels are chosen.
        seed: of that choice and of k-means.
        progress: show progress bars.

    Returns:
        The report. ``details["subset"]`` has, for each layer, the squared errors of both kinds of levels relative to
        the values' energy and the number of channels that are uniform.

    References:
        [1] Zhong et al., Distribution-Flexible Subset Quantization for Post-Quantizing Super-Resolution Networks,
        2305.05888. The universal set and its use: Oh et al., Non-Uniform Step Size Quantization for Accurate
        Post-Training Quantization, ECCV 2022.
    """
    if norm not in NORMS:
        raise ValueError(f"dfsq: norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if max_values < 1:
        raise ValueError(f"dfsq: max_values must be at least 1, got {max_values}")
    wanted = Scheme.parse(scheme)
    if wanted.activation_bits > 8:
        raise ValueError(f"dfsq: activation_bits of the scheme must be 2..8, got {wanted}")
    choices: dict[str, SubsetChoice] = {}
    with preparing(model, calib, wanted, method=method, first_last_bits=None, progress=progress, seed=seed) as run:
        leave_rest(run, body)
        observe(run)
        normalizations = {name: normalization(run, name) for name in run.sites}
        if norm == "static":
            fix_normalizations(run, normalizations)
        values = normalized_values(run, normalizations, max_values, seed)
        generator = torch.Generator().manual_seed(seed)
        for name, x in values.items():
            choices[name] = choose_subset(
                x, bits=run.sites[name].bits, axis=0, selector=selector, fallback=fallback, generator=generator
            )
            run.quantizers[name] = with_levels(normalizations[name], run.sites[name].bits, choices[name].levels)
        collect_inputs(run)
        solve_weights(run)
    add_errors(run.report, choices, values)
    return run.report


# --- which layers ---


def leave_rest(run: Run, body: Sequence[str] | None) -> None:
    """Ignore every layer that is not of the body."""
    assert run.data is not None
    layers = {names[0]: module for names, module in modules_with_names(run.model) if layout.is_quantizable(module)}
    if body is None:
        kept = body_layers(run.model, run.data)
    else:
        patterns = Patterns("body", body)
        kept = [name for name, module in layers.items() if patterns.find([name], module)]
        require_used("body", [pattern for pattern in body if pattern not in patterns.used], list(layers))
    if not kept:
        kind = type(run.model).__name__
        raise ValueError(f"dfsq: {kind} has no convolution between head and upsampler; name the layers with body=")
    run.ignore = [name for name in layers if name not in kept]


def body_layers(model: nn.Module, data: Calibration) -> list[str]:
    """Convolutions in the order of their calls, without head, tail and what makes or sees the larger picture."""
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))}
    largest: dict[str, int] = {}  # picture that a convolution received, in the order of first calls
    upsamplers = {name for name, module in convolutions.items() if isinstance(module, nn.ConvTranspose2d)}
    last = [("", 0)]

    def before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        height, width = input_of(name, args, kwargs).shape[-2:]
        size, (previous, previous_size) = height * width, last[0]
        # What grows between two calls is a shuffle of the channels that the first one added, or an interpolation.
        if previous and size > previous_size > 0 and widens(convolutions[previous]):
            upsamplers.add(previous)
        largest[name] = max(largest.get(name, 0), size)
        last[0] = name, size

    def start(module: nn.Module, args: Any) -> None:
        last[0] = "", 0

    handle = model.register_forward_pre_hook(start)
    try:
        with hooked(convolutions, before):
            data.run(model)
    finally:
        handle.remove()
    names = list(largest)
    left = {*names[:1], *names[-1:], *upsamplers}
    return [name for name in names if name not in left and largest[name] <= largest[names[0]]]


def widens(module: nn.Module) -> bool:
    return bool(module.out_channels > module.in_channels)  # type: ignore[operator]


# --- normalization ---


def normalization(run: Run, name: str) -> SubsetQuantizer:
    """A quantizer without levels yet: it centres what is ever negative."""
    counts = run.observed.histograms[name][..., 0, :]
    centre = bool(counts[..., : counts.shape[-1] // 2].any())  # bins of negative values come first
    site = run.sites[name]
    return SubsetQuantizer(site.bits, torch.zeros(1, device=counts.device), site.axis, centre)


def with_levels(quantizer: SubsetQuantizer, bits: int, levels: Tensor) -> SubsetQuantizer:
    return SubsetQuantizer(bits, levels, quantizer.axis, quantizer.centre, quantizer.mean, quantizer.magnitude)


def channels_first(x: Tensor, axis: int) -> Tensor:
    """``[C, T]``"""
    return x.movedim(axis, 0).flatten(1)


def fix_normalizations(run: Run, normalizations: Mapping[str, SubsetQuantizer]) -> None:
    """Mean and magnitude ``[C]`` of all calibration data."""
    assert run.data is not None
    sums: dict[str, Tensor] = {}  # count and sum of each channel, float64 [2, C]
    extremes: dict[str, Tensor] = {}  # least and largest, [2, C]

    def add(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = channels_first(input_of(name, args, kwargs).float(), normalizations[name].axis)
        if x.numel() == 0:
            return
        total = x.double().sum(1)
        part, ends = torch.stack([torch.full_like(total, x.shape[1]), total]), torch.stack(x.aminmax(dim=1))
        if name in sums:
            part += sums[name]
            ends = torch.stack([torch.minimum(ends[0], extremes[name][0]), torch.maximum(ends[1], extremes[name][1])])
        sums[name], extremes[name] = part, ends

    with hooked({name: run.sites[name].module for name in normalizations}, add):
        run.data.run(run.model)
    for name, quantizer in normalizations.items():
        count, total = sums[name]
        mean = (total / count).float() if quantizer.centre else torch.zeros_like(extremes[name][0])
        low, high = extremes[name]
        quantizer.mean, quantizer.magnitude = mean, torch.maximum(high - mean, mean - low) + GUARD


def normalized_values(
    run: Run, normalizations: Mapping[str, SubsetQuantizer], limit: int, seed: int
) -> dict[str, Tensor]:
    """``[C, T]`` of every layer: about ``limit`` places, drawn evenly from the batches, the same for all channels."""
    assert run.data is not None
    per_call = -(-limit // max(len(run.data), 1))
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {name: [] for name in normalizations}

    def add(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, quantizer = input_of(name, args, kwargs).float(), normalizations[name]
        if x.numel() == 0:
            return
        mean, magnitude = quantizer.normal(x)
        rows = channels_first((x - mean) / magnitude, quantizer.axis)
        if rows.shape[1] > per_call:
            rows = rows[:, torch.randperm(rows.shape[1], generator=generator)[:per_call].to(rows.device)]
        found[name].append(rows)

    with hooked({name: run.sites[name].module for name in normalizations}, add):
        run.data.run(run.model)
    return {name: torch.cat(parts, 1) for name, parts in found.items()}


# --- report ---


def add_errors(report: Report, choices: Mapping[str, SubsetChoice], values: Mapping[str, Tensor]) -> None:
    found: dict[str, dict[str, float]] = {}
    for name, choice in choices.items():
        energy = max(float(values[name].double().square().sum()), 1e-300)
        errors = {
            "subset": float(choice.subset_error.sum()) / energy,
            "uniform": float(choice.uniform_error.sum()) / energy,
            "chosen": float(choice.error.sum()) / energy,
        }
        found[name] = {**errors, "channels": choice.uniform.numel(), "uniform channels": int(choice.uniform.sum())}
        line = report.activation(name)
        line.quantizer, line.error = choice.name, errors["chosen"] ** 0.5
    report.details["subset"] = found
