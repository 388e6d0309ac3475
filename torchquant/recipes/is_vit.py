"""I&S-ViT: shift-uniform-log2 softmax outputs, and blocks trained towards the float ones in three stages."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..config import Scheme
from ..report import Report
from ..steps import (
    collect_inputs,
    observe,
    own_weights,
    preparing,
    reparameterize_layernorms,
    rewrite_attention,
    solve_weights,
)
from .repq_vit import choose_ranges, keep_biases
from .softmax import MEASURED, activations_for, measure_softmax
from .sos import Training, train_activations, train_weights


def is_vit(
    model: nn.Module,
    calib: Any,
    scheme: str | Scheme = "W4A4",
    *,
    softmax: str = "sulq",
    sos: bool | Training = True,
    overrides: Mapping[str, str | Scheme | None] | None = None,
    ignore: Sequence[str] = (),
    first_last_bits: int | None = 8,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Quantize a vision transformer in place: SULQ and the smooth optimization strategy [1].

    SULQ codes ``-log2(x + eta)`` of the softmax's output x uniformly, eta chosen by squared error. The strategy trains
    block after block: first the float weights with quantized activations, those behind LayerNorms per channel; then one
    range takes the place of the channels' ranges, which changes nothing; then the weights are quantized and trained
    again, with the inputs that the quantized blocks before them make.

    Args:
        model: any module; attention as :func:`torchquant.nn.rewrite_attention` knows it.
        calib: calibration data, as for :func:`torchquant.quantize_`; 1024 pictures in the publication.
        scheme: ``"W4A4"``, ``"W3A3"`` ...; whole rows share a scale.
        softmax: ``"log_sqrt2"`` for the strategy alone; ``"auto"``: in each module the one with the least expected
            error; ``"measured"``: in all of them the one that changes the model's outputs least.
        sos: False for SULQ alone, with weights rounded to nearest; or other settings than the published ones.
        overrides, ignore, first_last_bits, seed, progress: as for :func:`torchquant.quantize_`.

    Returns:
        The report; ``details["sos"]`` has every unit's squared error before and after each training.

    References:
        [1] Zhong et al., I&S-ViT: An Inclusive & Stable Method for Pushing the Limit of Post-Training ViTs
            Quantization, 2311.10126.
    """
    how = Training() if sos is True else sos
    losses = {}
    with preparing(
        model, calib, scheme, activations=activations_for(softmax), method="rtn", overrides=overrides, ignore=ignore,
        first_last_bits=first_last_bits, seed=seed, progress=progress,
    ) as run:  # fmt: skip
        rewrite_attention(run)
        observe(run)
        choose_ranges(run)
        errors = measure_softmax(run) if softmax == MEASURED else {}
        if how:
            require_rows(run.targets)
            teacher = copy.deepcopy(run.model)
            own_weights(run)
            losses["activations"] = train_activations(run, teacher, how)
        reparameterize_layernorms(run)
        if how:
            losses["weights"] = train_weights(run, teacher, how)
        if run.open_layers():
            collect_inputs(run)
            keep_biases(run)
            solve_weights(run)
    run.report.details |= {"sos": losses, "softmax": errors}
    return run.report


def require_rows(targets: Mapping[str, Any]) -> None:
    grouped = [name for name, target in targets.items() if target.scheme.group_size > 0]
    if grouped:
        raise ValueError(f"is_vit: sos quantizes whole rows, got groups in {', '.join(grouped)}")
