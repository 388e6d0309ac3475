"""Quantizers of the log family for softmax outputs: SULQ, log2, log-sqrt2 and uniform, in one table form."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

VARIANTS = ("zero_exact", "paper", "reference", "log2", "log_sqrt2", "uniform")
# In the automatic choice: what maps 0 to 0 (masked attention stays masked) within 2**bits codes.
CHOICES = ("zero_exact", "log2", "log_sqrt2", "uniform")


def sulq_fit(x: Tensor, *, bits: int, variant: str = "zero_exact") -> tuple[Tensor, Tensor, Tensor]:
    """Find the quantizer of a variant with the least squared error on non-negative activations (arXiv 2311.10126).

    With ``v = -log2(x + eta)``: ``q = clamp(round((v - min) / s), 0, 2**bits - 1)``, ``value = 2**-round(s q + min) -
    eta``. Every candidate is evaluated on one log-binned histogram. The winner is returned as a table without log2: of
    its levels those that some x >= 0 has, in rising order, and between them thresholds exact to the last float32.

    ==============  ====================================================================================================
    ``zero_exact``  eta = 2**-1 .. 2**-20 (times the power of two above the largest value), range [0, max]: 0 and the
                    values themselves come back exactly; exponents are integers
    ``paper``       the same etas, the range of the data, integral zero point (eq. 13, 14): 0 need not be a level
    ``reference``   the released code: 11 fixed etas, float offset, found with 2**bits codes and run with one more
    ``log2``        2**(top - q) and a code for zero
    ``log_sqrt2``   2**(top - q / 2) and a code for zero; exponents are multiples of 1/2
    ``uniform``     q * scale, exponent = log2(q * scale) in float32: a relative error of at most 1e-6, scale =
                    2**exponents[1]
    ==============  ====================================================================================================

    SULQ's exponents are rounded, so at most ``1 - log2(eta / max)`` levels differ, however many bits there are.

    Args:
        x: float32, float16 or bfloat16 of any shape, none negative; or their histogram, float64 ``[3, B]``.
        bits: 2..8.
        variant: one of the above.

    Returns:
        eta float32 ``[]``; thresholds float32 ``[L - 1]``, rising, infinite where fewer levels occur; exponents float32
        ``[L]``, ``L = 2**bits`` (``reference``: one more, at most 256); -inf is the level zero, with eta 0.

    Raises:
        ValueError: no values, a negative value, NaN or Inf, wrong bits or variant. TypeError: wrong dtype.
    """
    return torch.ops.torchquant.sulq_fit(x, bits=bits, variant=variant)


def sulq_error(histogram: Tensor, eta: Tensor, thresholds: Tensor, exponents: Tensor) -> Tensor:
    """Mean squared error of a table on the activations of a histogram, as :func:`sulq_fit` minimizes it.

    Exact but for the bins that a threshold cuts, whose values are taken as evenly spread.

    Args:
        histogram: float64 ``[3, B]``.
        eta, thresholds, exponents: as returned by :func:`sulq_fit`.

    Returns:
        float64 ``[]``.

    Raises:
        ValueError: no values, negative values, wrong shape or device. TypeError: wrong dtype.
    """
    return torch.ops.torchquant.sulq_error(histogram, eta, thresholds, exponents)


def sulq_quantize(x: Tensor, thresholds: Tensor) -> Tensor:
    """Count the thresholds strictly below each element: codes uint8 in x's shape, rising with x. NaN has code 0.

    Args:
        x: float32, float16 or bfloat16, any shape.
        thresholds: float32 ``[T]``, rising, T <= 255.

    Raises:
        ValueError: wrong shape or device; thresholds that fall (looked at on the CPU only). TypeError: wrong dtype.
    """
    return torch.ops.torchquant.sulq_quantize(x, thresholds)


def sulq_dequantize(codes: Tensor, exponents: Tensor, eta: Tensor) -> Tensor:
    """``2**exponents[code] - eta`` float32 in the shape of codes; a code without a level is NaN.

    Raises:
        ValueError: wrong shape or device. TypeError: wrong dtype.
    """
    return torch.ops.torchquant.sulq_dequantize(codes, exponents, eta)


def sulq_shift_matmul(codes: Tensor, exponents: Tensor, v: Tensor) -> Tensor:
    """``sum_k v[k, n] << (exponents[codes[m, k]] - least)``, in integers; least is the smallest finite exponent.

    Args:
        codes: uint8 ``[..., M, K]``, K <= 65536.
        exponents: float32 ``[L]``, integers that span at most 31, or -inf (which adds nothing).
        v: int8, uint8 or int16 ``[..., K, N]``; the same leading dimensions.

    Returns:
        int64 ``[..., M, N]``, exact.

    Raises:
        ValueError: wrong shape, device or exponents. TypeError: wrong dtype.
    """
    return torch.ops.torchquant.sulq_shift_matmul(codes, exponents, v)


def sulq_matmul(codes: Tensor, exponents: Tensor, eta: Tensor, v: Tensor) -> Tensor:
    """Attention times values without multiplying: ``(2**E - eta) V = 2**E V - eta 1 (1^T V)``.

    The integers v are shifted by the exponents and added up; one sum per column corrects for eta. Exponents that are
    odd multiples of 1/2 (``log_sqrt2``) have a sum of their own, multiplied by the root of two at the end.

    Args:
        codes, exponents, v: as for :func:`sulq_shift_matmul`; exponents may also be multiples of 1/2.
        eta: float32, one value.

    Returns:
        float32 ``[..., M, N]``, ``dequantized codes @ v`` with one rounding; multiply by the scale of v.

    Raises:
        ValueError: wrong shape, device or exponents. TypeError: wrong dtype.
    """
    return torch.ops.torchquant.sulq_matmul(codes, exponents, eta, v)


@dataclass(frozen=True, eq=False)
class LogQuantizer:
    """The quantizer that :func:`choose_log_quantizer` chose, and the mean squared error of every one it tried."""

    name: str
    bits: int
    eta: Tensor
    thresholds: Tensor
    exponents: Tensor
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        return self.errors[self.name]

    def __str__(self) -> str:
        others = ", ".join(f"{name} {error:.3g}" for name, error in self.errors.items() if name != self.name)
        return f"{self.name} at {self.bits} bits, mean squared error {self.error:.3g} ({others})"


def choose_log_quantizer(x: Tensor, bits: int, variants: Sequence[str] = CHOICES) -> LogQuantizer:
    """Fit each variant on one histogram and keep the one with the least mean squared error.

    The least error is not always the best accuracy; name one variant to decide otherwise.

    Args:
        x: activations or their histogram, as for :func:`sulq_fit`.
        bits: 2..8.
        variants: names, the first of equals wins. By default those that map 0 to 0 within 2**bits codes.

    Raises:
        ValueError: no or unknown variants; x or bits as for :func:`sulq_fit`.
    """
    if not variants:
        raise ValueError("choose_log_quantizer: variants must name at least one, got none")
    histogram = x if x.dtype == torch.float64 else _histogram_of(x)
    tables = {name: sulq_fit(histogram, bits=bits, variant=name) for name in variants}
    errors = {name: float(sulq_error(histogram, *table)) for name, table in tables.items()}
    name = min(errors, key=lambda n: errors[n])
    return LogQuantizer(name, bits, *tables[name], errors)


def _histogram_of(x: Tensor) -> Tensor:
    histogram = torch.zeros(3, 16384, dtype=torch.float64, device=x.device)
    torch.ops.torchquant.histogram_accumulate_(histogram, x)
    return histogram


@torch.library.register_fake("torchquant::sulq_fit")
def _(x, *, bits, variant="zero_exact"):  # type: ignore[no-untyped-def]
    levels = min(2**bits + (variant == "reference"), 256)
    return tuple(x.new_empty(shape, dtype=torch.float32) for shape in ((), (levels - 1,), (levels,)))


@torch.library.register_fake("torchquant::sulq_error")
def _(histogram, eta, thresholds, exponents):  # type: ignore[no-untyped-def]
    return histogram.new_empty(())


@torch.library.register_fake("torchquant::sulq_quantize")
def _(x, thresholds):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=torch.uint8)


@torch.library.register_fake("torchquant::sulq_dequantize")
def _(codes, exponents, eta):  # type: ignore[no-untyped-def]
    return codes.new_empty(codes.shape, dtype=torch.float32)


@torch.library.register_fake("torchquant::sulq_shift_matmul")
def _(codes, exponents, v):  # type: ignore[no-untyped-def]
    return codes.new_empty((*codes.shape[:-1], v.shape[-1]), dtype=torch.int64)


@torch.library.register_fake("torchquant::sulq_matmul")
def _(codes, exponents, eta, v):  # type: ignore[no-untyped-def]
    return codes.new_empty((*codes.shape[:-1], v.shape[-1]), dtype=torch.float32)
