"""SULQ (arXiv 2311.10126): the search for eta on a histogram against passes over the tensor, and codes by table against
the formula."""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchquant.quantizers import sulq_dequantize, sulq_fit, sulq_quantize

from .harness import Contest, Floor, Peer, check
from .layers import Shape, label

BITS = 3
ETAS = (1e-3, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1)  # those of the released code
SOFTMAXES: tuple[Shape, ...] = ((37824, 197),)  # 32 images, 6 heads, 197 x 197: a layer of DeiT-S
TARGET = 20.0


def make_softmax(shape: Shape) -> Tensor:
    return torch.softmax(2 * torch.randn(shape, generator=torch.Generator().manual_seed(0)), dim=-1)


def formula(x: Tensor, eta: float) -> Tensor:
    """Values of x as published: a uniform grid on log2(x + eta), the exponent rounded."""
    u = torch.log2(x + eta)
    low, high = u.min(), u.max()
    step = (high - low) / (2**BITS - 1)
    q = torch.clamp(torch.round((u - low) / step), 0, 2**BITS - 1)
    return 2 ** torch.round(q * step + low) - eta


def published_error(x: Tensor, eta: float) -> float:
    return float((formula(x, eta) - x).pow(2).mean())


def published_search(x: Tensor) -> float:
    errors = [published_error(x, eta) for eta in ETAS]
    return ETAS[errors.index(min(errors))]


def table_run(x: Tensor, table: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    eta, thresholds, exponents = table
    return sulq_dequantize(sulq_quantize(x, thresholds), exponents, eta)


def check_search(x: Tensor) -> str:
    ours, theirs = float(sulq_fit(x, bits=BITS, variant="reference")[0]), published_search(x)
    ratio = published_error(x, ours) / published_error(x, theirs)
    check(ratio <= 1.01, f"sulq: eta {ours} has {ratio} times the squared error of eta {theirs}")
    return f"eta {ours:g} and {theirs:g}: squared errors {ratio:.3f} : 1"


def check_codes(x: Tensor, table: tuple[Tensor, Tensor, Tensor]) -> str:
    """The formula has one range for the data, the table was made for it: equal but for ties of float32."""
    eta = float(table[0])
    offset, step = -torch.log2(x.max() + eta), torch.log2(1 + x.max() / eta) / (2**BITS - 1)
    q = torch.clamp(torch.round((-torch.log2(x + eta) - offset) / step), 0, 2**BITS - 1)
    wanted = 2 ** -torch.round(q * step + offset) - eta
    same = float((table_run(x, table) == wanted).double().mean())
    check(same > 0.9999, f"sulq: {same:.4%} of the values are those of the formula")
    return f"{same:.3%} of the values are the formula's"


def sulq(shape: Shape) -> Iterator[Contest]:
    x = make_softmax(shape)
    note = check_search(x)
    bytes_read = 4.0 * x.numel()
    floor = Floor(lambda: x.sum(), bytes_read, "GB/s, one read of the tensor", (("one read", bytes_read),))
    loop = f"torch: {len(ETAS)} etas, passes over the tensor"
    yield Contest(
        f"sulq, search of the same {len(ETAS)} etas",
        label(shape, shape),
        lambda: sulq_fit(x, bits=BITS, variant="reference"),
        [Peer(loop, lambda: published_search(x), target=TARGET)],
        floor,
        note,
    )
    yield Contest(
        "sulq, search of 20 etas, zero exact",
        label(shape, shape),
        lambda: sulq_fit(x, bits=BITS),
        [Peer(loop, lambda: published_search(x))],
        floor,
    )
    table = sulq_fit(x, bits=BITS)
    yield Contest(
        "sulq, quantize and dequantize",
        label(shape, shape),
        lambda: table_run(x, table),
        [Peer("torch: the formula", lambda: formula(x, float(table[0])))],
        floor,
        check_codes(x, table),
    )
