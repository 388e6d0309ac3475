"""Which quantizer the softmax's output gets, decided by what it does to the model's outputs.

Activations(softmax="auto") decides for each module from the histogram of its weights alone; this costs a pass of the
calibration data for every candidate, and decides for the bit width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..activations import softmax_quantizer
from ..calibrate import tensors_of
from ..config import Activations
from ..nn.quantizers import ActivationQuantizer
from ..steps import Run, quantizing_inputs

CANDIDATES = ("log2", "log_sqrt2", "sulq", "uniform")
MEASURED = "measured"


def activations_for(softmax: str) -> Activations:
    """RepQ-ViT's ranges with this quantizer; ``"measured"`` is decided later, by ``measure_softmax``."""
    return Activations(range="percentile", softmax="auto" if softmax == MEASURED else softmax)


def measure_softmax(run: Run, candidates: Sequence[str] = CANDIDATES) -> dict[str, float]:
    """Give all softmax outputs the kind of quantizer with which the model's outputs change least.

    Measured on the calibration data with all activations quantized and float weights.

    Returns:
        ``|| outputs - float outputs ||^2 / || float outputs ||^2`` by candidate. Empty, and nothing is changed, in a
        model without such sites.
    """
    sites = [name for name in run.quantizers if run.sites[name].kind == "softmax"]
    if not sites:
        return {}
    reference = outputs_with(run, {})
    energy = sum(float(part.double().square().sum()) for part in reference)
    errors, made = {}, {}
    for candidate in candidates:
        made[candidate] = {
            name: softmax_quantizer(run.observed.histograms[name], run.sites[name].bits, candidate) for name in sites
        }
        found = outputs_with(run, run.quantizers | made[candidate])
        changes = (float((a.double() - b.double()).square().sum()) for a, b in zip(found, reference, strict=True))
        errors[candidate] = sum(changes) / energy if energy > 0 else 0.0
    best = min(errors, key=lambda name: errors[name])
    run.quantizers |= made[best]
    run.activations = replace(run.activations, softmax=best)
    return errors


def outputs_with(run: Run, quantizers: Mapping[str, ActivationQuantizer]) -> list[Tensor]:
    """Every floating-point output of the model on the calibration data."""
    found: list[Tensor] = []

    def keep(module: torch.nn.Module, args: object, output: object) -> None:
        found.extend(tensor for tensor in tensors_of(output) if tensor.is_floating_point())

    handle = run.model.register_forward_hook(keep)
    assert run.data is not None
    try:
        with quantizing_inputs(run.model, quantizers):
            run.data.run(run.model, "softmax")
    finally:
        handle.remove()
    return found
