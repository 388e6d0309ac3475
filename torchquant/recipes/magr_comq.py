"""MagR, then COMQ, as published."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..config import COMQ, MagR, Scheme
from ..quantize import quantize_
from ..report import Report

# beta of MagR's paper: how far the grid is shrunk, by bits, for whole rows. Groups: 0.95.
SHRINK = {2: 0.8, 3: 0.9}
GROUP_SHRINK = 0.95


def magr_comq(
    model: nn.Module,
    calib: Any,
    scheme: str | Scheme = "W4A16",
    *,
    alpha: float | None = None,
    sweeps: int | None = None,
    overrides: Mapping[str, str | Scheme | None] | None = None,
    ignore: Sequence[str] = (),
    inputs: str = "quantized",
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Quantize the model's weights in place: MagR lowers each row's largest magnitude, COMQ then chooses the codes.

    MagR [1] solves ``min_W 1/2 || X (W - W0)^T ||^2 + alpha lambda_max || W ||_inf`` for every row (or group) by 150
    proximal gradient steps. COMQ [2] minimises ``|| X W^T - X Q^T ||^2`` one coordinate at a time, in greedy order and
    with updates of the scale, starting from the grid of MagR's weights. Blocks are quantized one after the other, each
    on the inputs that the quantized blocks before it produce.

    These are the papers' settings but for one: the codes are fitted to the outputs of the original weights, not of
    MagR's. ``quantize_(..., method="magr+comq")`` follows what measured better on trained networks (a mid-rise grid at
    2 and 3 bits, a search for the scale), and ``method="auto"`` also leaves MagR out in every row where it hurts, which
    at 4 bits is most of them.

    Args:
        model: any module with linear or convolution layers.
        calib: calibration data, as for :func:`torchquant.quantize_`.
        scheme: ``"W4A16"``, ``"W2A16g128"`` ...; ``"W4A4"``, ``"W4A8"`` ... quantize activations too, as
            :func:`torchquant.quantize_` does by default.
        alpha: None: the paper's 1e-3 for whole rows, 1e-4 for groups. Relative to the Gram's largest eigenvalue.
        sweeps: passes of COMQ. None: 3, and 30 at 2 bits, as many as MagR's paper spends on coordinate descent there.
        overrides, ignore, inputs, seed, progress: as for :func:`torchquant.quantize_`.

    References:
        [1] Zhang et al., MagR: Weight Magnitude Reduction for Enhancing Post-Training Quantization, 2406.00800.
        [2] Zhang et al., COMQ: A Backpropagation-Free Algorithm for Post-Training Quantization, 2403.07134.
    """
    scheme = Scheme.parse(scheme)
    grouped = scheme.group_size > 0
    shrink = GROUP_SHRINK if grouped else SHRINK.get(scheme.weight_bits, 1.0)
    steps = [
        MagR(alpha=alpha or (1e-4 if grouped else 1e-3), iters=150, solver="ista"),
        COMQ(
            sweeps=sweeps or (30 if scheme.weight_bits == 2 else 3),
            order="greedy",
            shrink=(shrink,),
            grid=scheme.grid,
        ),
    ]
    return quantize_(
        model, scheme, calib, method=steps, overrides=overrides, ignore=ignore, inputs=inputs, seed=seed,
        progress=progress,
    )  # fmt: skip
