"""Quantizers of activations: modules that give back the nearest value that a few bits can say.

All of them: buffers only, ``forward(x)`` = the dequantized x in x's dtype, ``codes(x)`` = uint8 codes, TorchScript and
export. ``describe()`` and ``quantizer_from`` write and read everything but the buffers' values.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .base import kept_float32

GRANULARITIES = ("tensor", "token", "channel")
Quantizer = TypeVar("Quantizer", bound="ActivationQuantizer")


class ActivationQuantizer(nn.Module):
    """Settings that are no tensors are listed in ``settings``; the buffers are named as the constructor's arguments."""

    settings: tuple[str, ...] = ("bits",)
    name = ""

    def __init__(self, bits: int, **buffers: Tensor | None) -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"{type(self).__name__}: bits must be 2..8, got {bits}")
        self.bits = bits
        for key, value in buffers.items():
            self.register_buffer(key, None if value is None else value.detach().float().clone())

    def is_integer(self) -> bool:
        """Whether values are ``(code - zero_point) * scale`` with one grid for a tensor or for each of its rows: then
        products can be taken in integers."""
        return False

    def for_kernel(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the packed kernels take, where ``is_integer()``: x or its codes, scale and zero point."""
        return x, torch.ones(1), torch.zeros(1)

    def inside(self, x: Tensor) -> Tensor:
        """Where x lies in the range that the codes cover."""
        return torch.ones_like(x, dtype=torch.bool)

    def straight_through(self, x: Tensor) -> Tensor:
        """``forward(x)`` whose gradient is that of x, and zero where x is clipped."""
        kept = torch.where(self.inside(x.detach()), x, x.detach())
        with torch.no_grad():
            change = self(x) - x
        return kept + change

    def bounds(self) -> tuple[float, float]:
        """Lowest and highest value; NaN when they depend on the input."""
        return float("nan"), float("nan")

    def copy(self: Quantizer) -> Quantizer:
        return copy.deepcopy(self)

    @torch.jit.ignore
    def same_as(self, other: "ActivationQuantizer") -> bool:
        """Same class, settings and buffers."""
        if self.describe() != other.describe():
            return False
        return all(torch.equal(a, b) for a, b in zip(self.buffers(), other.buffers(), strict=True))

    def describe(self) -> dict[str, Any]:
        shapes = {key: list(value.shape) for key, value in self.named_buffers()}
        return {"class": type(self).__name__, **{key: getattr(self, key) for key in self.settings}, "shapes": shapes}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        with kept_float32(self, tuple(self._buffers)):
            super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={getattr(self, key)}" for key in self.settings)


def plain(x: Tensor) -> Tensor:
    """The operators take float32, float16 and bfloat16."""
    return x.float() if x.dtype == torch.float64 else x


class UniformQuantizer(ActivationQuantizer):
    """``value = (code - zero_point) * scale`` with ``scale`` and ``zero_point`` [] or ``[C]`` along ``axis``."""

    scale: Tensor
    zero_point: Tensor
    settings = ("bits", "axis")
    name = "uniform"

    def __init__(self, bits: int, scale: Tensor, zero_point: Tensor, axis: int = -1) -> None:
        super().__init__(bits, scale=scale, zero_point=zero_point)
        self.axis = axis

    @torch.jit.export
    def codes(self, x: Tensor) -> Tensor:
        return torch.ops.torchquant.uniform_quantize(
            plain(x), self.scale, self.zero_point, bits=self.bits, axis=self.axis
        )

    def forward(self, x: Tensor) -> Tensor:
        values = torch.ops.torchquant.uniform_dequantize(self.codes(x), self.scale, self.zero_point, axis=self.axis)
        return values.to(x.dtype)

    @torch.jit.export
    def is_integer(self) -> bool:
        return self.scale.numel() == 1

    @torch.jit.export
    def for_kernel(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, self.scale, self.zero_point

    @torch.jit.ignore
    def ends(self) -> tuple[Tensor, Tensor]:
        return -self.zero_point * self.scale, (2**self.bits - 1 - self.zero_point) * self.scale

    @torch.jit.ignore
    def inside(self, x: Tensor) -> Tensor:
        low, high = self.ends()
        if low.dim() == 1:
            shape = [1] * x.dim()
            shape[self.axis] = -1
            low, high = low.view(shape), high.view(shape)
        return (x >= low - self.half(low)) & (x <= high + self.half(high))

    @torch.jit.ignore
    def half(self, like: Tensor) -> Tensor:
        """Half a step: what still rounds to an end is not clipped."""
        return self.scale.view_as(like) / 2

    @torch.jit.ignore
    def bounds(self) -> tuple[float, float]:
        low, high = self.ends()
        return float(low.min()) + 0.0, float(high.max())  # + 0.0: no -0


class DynamicQuantizer(ActivationQuantizer):
    """Uniform, with ranges from the input itself: of the ``tensor``, each ``token`` (last dimension) or ``channel``."""

    settings = ("bits", "granularity", "symmetric", "axis")
    name = "dynamic"

    def __init__(self, bits: int, granularity: str = "token", symmetric: bool = False, axis: int = -1) -> None:
        super().__init__(bits)
        if granularity not in GRANULARITIES:
            raise ValueError(
                f"DynamicQuantizer: granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}"
            )
        self.granularity, self.symmetric, self.axis = granularity, symmetric, axis

    @torch.jit.export
    def codes(self, x: Tensor) -> Tensor:
        return self.for_kernel(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        values = torch.ops.torchquant.dynamic_fake_quantize(
            plain(x), bits=self.bits, granularity=self.granularity, axis=self.axis, symmetric=self.symmetric
        )
        return values.to(x.dtype)

    @torch.jit.export
    def is_integer(self) -> bool:
        return self.granularity != "channel"

    @torch.jit.export
    def for_kernel(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.torchquant.dynamic_quantize(
            plain(x), bits=self.bits, granularity=self.granularity, axis=self.axis, symmetric=self.symmetric
        )


class TableQuantizer(ActivationQuantizer):
    """A staircase over thresholds, ``value = 2^exponent - eta``: the log family (SULQ, log2, log sqrt 2)."""

    thresholds: Tensor
    exponents: Tensor
    eta: Tensor
    settings = ("bits", "name")

    def __init__(self, bits: int, thresholds: Tensor, exponents: Tensor, eta: Tensor, name: str = "sulq") -> None:
        super().__init__(bits, thresholds=thresholds, exponents=exponents, eta=eta)
        self.name = name

    @torch.jit.export
    def codes(self, x: Tensor) -> Tensor:
        return torch.ops.torchquant.sulq_quantize(plain(x), self.thresholds)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.torchquant.sulq_dequantize(self.codes(x), self.exponents, self.eta).to(x.dtype)

    @torch.jit.ignore
    def bounds(self) -> tuple[float, float]:
        values = torch.exp2(self.exponents.double()) - self.eta
        return float(values.min()), float(values.max())


class SubsetQuantizer(ActivationQuantizer):
    """Nearest of chosen levels after a normalization of each sample's channels (DFSQ, 2305.05888).

    ``x -> (x - mean) / (max|x - mean| + 1e-8)``, the nearest level, and back.

    Args:
        levels: sorted, in [-1, 1]: ``[L]``, or ``[C, L]`` for channels of ``axis``; L <= 2^bits.
        axis: of the channels.
        centre: subtract the mean; False for what a ReLU gives.
        mean, magnitude: ``[C]``; fixed instead of those of the sample (static normalization).
    """

    levels: Tensor
    mean: Tensor | None
    magnitude: Tensor | None
    settings = ("bits", "axis", "centre")
    name = "subset"

    def __init__(
        self,
        bits: int,
        levels: Tensor,
        axis: int = 1,
        centre: bool = True,
        mean: Tensor | None = None,
        magnitude: Tensor | None = None,
    ) -> None:
        super().__init__(bits, levels=levels, mean=mean, magnitude=magnitude)
        if levels.shape[-1] > 2**bits:
            raise ValueError(f"SubsetQuantizer: levels must be at most 2^bits = {2**bits}, got {levels.shape[-1]}")
        self.axis, self.centre = axis, centre

    def normal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and largest magnitude, of x's number of dimensions, float32."""
        axis = self.axis % x.dim()
        fixed_mean, fixed_magnitude = self.mean, self.magnitude
        if fixed_mean is not None and fixed_magnitude is not None:
            shape = [1] * x.dim()
            shape[axis] = -1
            return fixed_mean.view(shape), fixed_magnitude.view(shape)
        dims: list[int] = []
        for d in range(1, x.dim()):
            if d != axis:
                dims.append(d)
        if len(dims) == 0:
            dims.append(axis)  # one value a channel has no spread of its own: the sample's
        mean = x.mean(dims, keepdim=True) if self.centre else torch.zeros_like(x.amax(dims, keepdim=True))
        return mean, (x - mean).abs().amax(dims, keepdim=True) + 1e-8

    @torch.jit.export
    def codes(self, x: Tensor) -> Tensor:
        mean, magnitude = self.normal(x.float())
        return torch.ops.torchquant.subset_quantize((x.float() - mean) / magnitude, self.levels, axis=self.axis)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        mean, magnitude = self.normal(x.float())
        codes = torch.ops.torchquant.subset_quantize((x.float() - mean) / magnitude, self.levels, axis=self.axis)
        values = torch.ops.torchquant.subset_dequantize(codes, self.levels, axis=self.axis)
        return (values * magnitude + mean).to(x.dtype)


CLASSES: dict[str, type[ActivationQuantizer]] = {
    cls.__name__: cls for cls in (UniformQuantizer, DynamicQuantizer, TableQuantizer, SubsetQuantizer)
}


def quantizer_from(description: Mapping[str, Any]) -> ActivationQuantizer:
    """The quantizer that ``describe()`` described, with zeros for its buffers."""
    rest = dict(description)
    kind, shapes = rest.pop("class", None), rest.pop("shapes", {})
    if kind not in CLASSES:
        raise ValueError(f"quantizer: class must be one of {', '.join(CLASSES)}, got {kind!r}")
    make: Callable[..., ActivationQuantizer] = CLASSES[kind]
    return make(**rest, **{key: torch.zeros(shape) for key, shape in shapes.items()})
