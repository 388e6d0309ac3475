"""Group scales that `linear_prepack` takes as integers."""

import torch
from torch import Tensor


def integer_group_scales(codes: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, group_size: int) -> Tensor:
    """Scales of groups moved to integer multiples of one unit for each row.

    ``unit = max_g scale / limit`` and ``m = clamp(round(scale / unit), 1, limit)``, where ``limit`` is the largest m
    for which ``(code - zero_point) * m`` fits in a byte with sign: 16, 32 and 64 for 4, 3 and 2 bits with the zero
    point in the middle, less for others. To nearest, not up: that has the smaller squared error where scales were
    searched for. The codes should be found again. Groups whose codes are all at the zero point get the unit.

    Args:
        codes: uint8 ``[N, K]``.
        scale, zero_point: float32 ``[N, G]``, ``G = ceil(K / group_size)``.
        bits: 2..4.
        group_size: columns that share a scale.

    Returns:
        float32 ``[N, G]``; the scales as they are, where a zero point is not an integer from 0 to ``2**bits - 2``.

    Raises:
        ValueError: wrong shapes or bits, or a NaN or Inf. TypeError: wrong dtype.
        NotImplementedError: neither on a CPU nor on CUDA.
    """
    return torch.ops.torchquant.integer_group_scales(codes, scale, zero_point, bits=bits, group_size=group_size)


@torch.library.register_fake("torchquant::integer_group_scales")
def _(codes, scale, zero_point, **options):  # type: ignore[no-untyped-def]
    return scale.new_empty(scale.shape)
