"""How codes lie in memory: each row is one little-endian bit string, code i in bits ``[i * bits, (i + 1) * bits)``."""

import torch
from torch import Tensor


def pack_codes(codes: Tensor, *, bits: int) -> Tensor:
    """Codes as dense rows of 32-bit words, the last word of a row filled up with zeros.

    The layout of compressed-tensors (0.18 and later), of GPTQ after a transpose and of AWQ after a permutation.

    Args:
        codes: uint8 ``[N, K]``, below ``2**bits``.
        bits: 1..8.

    Returns:
        int32 ``[N, ceil(K * bits / 32)]``.

    Raises:
        ValueError: wrong shape or bits, or a code that does not fit. TypeError: codes not uint8.
    """
    return torch.ops.torchquant.pack_codes(codes, bits=bits)


def unpack_codes(packed: Tensor, *, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_codes`; bits behind the last code are not looked at.

    Args:
        packed: int32 ``[N, ceil(columns * bits / 32)]``.
        bits: 1..8.
        columns: codes a row.

    Returns:
        uint8 ``[N, columns]``.

    Raises:
        ValueError: wrong bits, columns or number of words. TypeError: packed not int32.
    """
    return torch.ops.torchquant.unpack_codes(packed, bits=bits, columns=columns)


@torch.library.register_fake("torchquant::pack_codes")
def _(codes, *, bits):  # type: ignore[no-untyped-def]
    rows, columns = codes.shape
    return codes.new_empty((rows, (columns * bits + 31) // 32), dtype=torch.int32)


@torch.library.register_fake("torchquant::unpack_codes")
def _(packed, *, bits, columns):  # type: ignore[no-untyped-def]
    return packed.new_empty((packed.shape[0], columns), dtype=torch.uint8)
