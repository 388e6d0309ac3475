"""Two packed linear layers as one operator."""

import torch
from torch import Tensor


def quantized_mlp(
    x: Tensor,
    fc1: list[Tensor],
    fc1_numbers: list[int],
    fc2: list[Tensor],
    fc2_numbers: list[int],
    *,
    activation: str = "gelu",
) -> Tensor:
    """``fc2(activation(fc1(x)))``: two calls of `quantized_linear`, the first of which gives the codes that the second
    one takes.

    A layer is ``[packed, grid, bias, levels, input_scale, input_zero_point]``, with empty tensors ``[0]`` for what it
    lacks, and the numbers ``[bits, in_features, out_features, group_size, input_bits, row_grids]``, as in
    `quantized_linear`. ``row_grids``: 1 for ``input_symmetric=True``, 2 for False, 0 for None.

    Args:
        x: float or uint8 ``[..., K]``: what `quantized_linear` takes for ``fc1``.
        fc2: with ``input_scale``, what is between the layers is uint8 codes of its grid; without, values in x's dtype
            (float32 for codes).
        activation: ``"none"``, ``"gelu"`` (exact, erf) or ``"silu"``.

    Returns:
        ``[..., N]`` in x's dtype (float32 for codes, as between the layers, too).

    Raises:
        ValueError: not 6 tensors and 6 numbers; and what `quantized_linear` raises.
    """
    return torch.ops.torchquant.quantized_mlp(x, fc1, fc1_numbers, fc2, fc2_numbers, activation=activation)


@torch.library.register_fake("torchquant::quantized_mlp")
def _(x, fc1, fc1_numbers, fc2, fc2_numbers, *, activation="gelu"):  # type: ignore[no-untyped-def]
    codes = x.dtype == torch.uint8 or fc2[4].numel() > 0
    return x.new_empty((*x.shape[:-1], fc2_numbers[2]), dtype=torch.float32 if codes else x.dtype)
