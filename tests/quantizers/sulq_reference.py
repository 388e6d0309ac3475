"""Softmax outputs worth quantizing, products with them, and the formulas of the log family in float64."""

import torch
from helpers import random

from torchquant.quantizers import sulq_fit, sulq_quantize

VARIANTS = ("zero_exact", "paper", "reference", "log2", "log_sqrt2", "uniform")
SULQ = VARIANTS[:3]
WITH_ZERO = ("zero_exact", "log2", "log_sqrt2", "uniform")
BITS = (2, 3, 4, 6, 8)
REFERENCE_ETAS = (1e-3, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1)


def attention(spread: float, rows: int = 64, columns: int = 197, seed: int = 0) -> torch.Tensor:
    return torch.softmax(spread * torch.randn(rows, columns, generator=random(seed)), dim=-1)


def with_masked_rows() -> torch.Tensor:
    x = attention(2.0)
    x[::5] = 0
    x[1, :] = 0
    x[1, 7] = 1
    return x


CASES = {
    "even": lambda: attention(0.5),
    "usual": lambda: attention(2.0),
    "peaked": lambda: attention(8.0),
    "masked": with_masked_rows,
    "half": lambda: attention(4.0).half(),
    "gelu": lambda: 40 * torch.randn(64, 64, generator=random(3)).abs(),
}


def product_case(variant, place, shape=(2, 3, 33, 50, 17), dtype=torch.int8):
    batch, heads, rows, inner, columns = shape
    x = torch.softmax(3 * torch.randn(batch, heads, rows, inner, generator=random(5)), -1).to(place)
    eta, thresholds, exponents = sulq_fit(x, bits=4, variant=variant)
    info = torch.iinfo(dtype)
    v = torch.randint(info.min, info.max + 1, (batch, heads, inner, columns), generator=random(6), dtype=dtype)
    return sulq_quantize(x, thresholds), exponents, eta, v.to(place)


# --- the paper in float64 ---


def bins_of(x: torch.Tensor) -> torch.Tensor:
    """The mean of each bin (32 an octave) that holds something, rising."""
    flat = x.float().reshape(-1)
    _, bin_of = torch.unique(flat.view(torch.int32) >> 18, return_inverse=True)
    total = torch.zeros(int(bin_of.max()) + 1, dtype=torch.float64).index_add(0, bin_of, flat.double())
    return total / torch.bincount(bin_of)


def sulq_value(x, eta, lo, hi, bits, variant):
    """Float64 values of x in the range lo .. hi."""
    steps = 2**bits - (variant != "reference")
    if variant == "reference":
        u, least, most = (torch.log2(t + eta) for t in (x, lo, hi))
        s = (most - least) / steps if most > least else torch.tensor(1.0)
        return torch.exp2(torch.round(torch.clamp((u - least) / s, 0, steps).round() * s + least)) - eta
    v, least, most = (-torch.log2(t + eta) for t in (x, hi, lo))
    s = (most - least) / steps if most > least else torch.tensor(1.0)
    if variant == "zero_exact":
        return torch.exp2(-torch.round(torch.clamp((v - least) / s, 0, steps).round() * s + least)) - eta
    z = torch.round(-least / s)
    q = torch.clamp(torch.round(v / s) + z, 0, steps)
    return torch.exp2(torch.round(-s * (q - z))) - eta


def log_value(x, top, bits, step):
    """step 1 or 1/2; the last code is zero."""
    q = torch.round((top - torch.log2(x)) / step).clamp(0, 2**bits - 1)
    return torch.where(q == 2**bits - 1, 0.0, torch.exp2(top - q * step))
