"""RepQ-ViT: the baseline of the recipes for vision transformers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..activations import relative_error
from ..config import Activations, Scheme
from ..report import Report
from ..steps import (
    Run,
    choose_quantizers,
    collect_inputs,
    observe,
    preparing,
    reparameterize_layernorms,
    rewrite_attention,
    solve_weights,
)

# Candidates for the share of values that a range covers at each end, as in the released code.
PERCENTILES = (0.999, 0.9999, 0.99999)
REPQ = Activations(range="percentile", softmax="log_sqrt2")


def repq_vit(
    model: nn.Module,
    calib: Any,
    scheme: str | Scheme = "W4A4",
    *,
    activations: Activations = REPQ,
    overrides: Mapping[str, str | Scheme | None] | None = None,
    ignore: Sequence[str] = (),
    first_last_bits: int | None = 8,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Quantize a vision transformer in place: ranges from percentiles, softmax outputs by powers of sqrt(2) [1].

    What follows a LayerNorm is quantized per channel; the differences between channels then move into the LayerNorm and
    the next weights, so that one range is left. Weights are rounded to nearest, biases stay. With the mean of the zero
    points rounded this move loses nothing; the released code's fractional mean changes codes.

    Args:
        model: any module; attention as :func:`torchquant.nn.rewrite_attention` knows it.
        calib: calibration data, as for :func:`torchquant.quantize_`; 32 pictures in the publication.
        scheme: ``"W4A4"``, ``"W3A3"`` ...
        activations: other ranges or softmax quantizers; a range="percentile" stands for the best of ``PERCENTILES``.
        overrides, ignore, first_last_bits, seed, progress: as for :func:`torchquant.quantize_`.

    References:
        [1] Li et al., RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers,
            2212.08254.
    """
    with preparing(
        model, calib, scheme, activations=activations, method="rtn", overrides=overrides, ignore=ignore,
        first_last_bits=first_last_bits, seed=seed, progress=progress,
    ) as run:  # fmt: skip
        rewrite_attention(run)
        observe(run)
        choose_ranges(run)
        reparameterize_layernorms(run)
        collect_inputs(run)
        keep_biases(run)
        solve_weights(run)
    return run.report


def choose_ranges(run: Run, percentiles: Sequence[float] = PERCENTILES) -> None:
    """``run.quantizers``; under range="percentile" each with the percentile that has the least squared error."""
    if run.activations.range != "percentile":
        choose_quantizers(run)
        return
    least: dict[str, float] = {}
    chosen = {}
    for percentile in percentiles:
        run.activations = replace(run.activations, percentile=percentile)
        choose_quantizers(run)
        for name, quantizer in run.quantizers.items():
            error = relative_error(quantizer, run.observed.histograms[name])
            if name not in least or error < least[name]:
                least[name], chosen[name] = error, quantizer
    run.quantizers = chosen


def keep_biases(run: Run) -> None:
    """The solvers would give every layer the bias that makes up for the mean error: without the sums they do not."""
    run.stats = {name: replace(stats, sums=None) for name, stats in run.stats.items()}
