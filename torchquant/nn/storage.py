"""How codes lie in memory: each row is one little-endian bit string, code i in bits [i * bits, (i + 1) * bits)."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Eight codes fill exactly `bits` bytes, whatever the width, and none of them touches more than two bytes.
CODES = 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 ``[N, K]`` -> int32 ``[N, ceil(K * bits / 32)]``."""
    rows, columns = codes.shape
    words = (columns * bits + 31) // 32
    groups = (columns + CODES - 1) // CODES
    eights = F.pad(codes, (0, groups * CODES - columns)).to(torch.int64).view(rows, groups, CODES)
    whole = torch.zeros(rows, groups, dtype=torch.int64, device=codes.device)
    for i in range(CODES):
        whole |= eights[:, :, i] << (i * bits)
    octets = torch.stack([(whole >> (8 * i)) & 0xFF for i in range(bits)], dim=-1).to(torch.uint8).view(rows, -1)
    return fit(octets, words * 4).contiguous().view(torch.int32)


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """int32 ``[N, ceil(columns * bits / 32)]`` -> uint8 ``[N, columns]``."""
    rows = packed.shape[0]
    # Shifts, not view(torch.uint8): TorchScript takes that for a shape.
    octets = torch.stack([(packed >> shift) & 255 for shift in [0, 8, 16, 24]], dim=-1).view(rows, -1)
    if bits == 8:
        return octets[:, :columns].to(torch.uint8)
    groups = (columns + 7) // 8  # CODES, written out: TorchScript reads no module-level names
    octets = fit(octets, groups * bits).reshape(rows, groups, bits)
    octets = F.pad(octets, [0, 1])
    codes: list[Tensor] = []
    for i in range(8):
        first, shift = i * bits // 8, i * bits % 8
        pair = octets[:, :, first] + octets[:, :, first + 1] * 256
        codes.append(((pair >> shift) & ((1 << bits) - 1)).to(torch.uint8))
    return torch.stack(codes, dim=-1).view(rows, -1)[:, :columns]


def fit(octets: Tensor, width: int) -> Tensor:
    """Cut the rows to ``width`` bytes, or fill them up with zeros."""
    missing = width - octets.shape[1]
    return F.pad(octets, [0, missing]) if missing > 0 else octets[:, :width]
