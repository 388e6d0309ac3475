"""What to quantize to (``Scheme``, ``Activations``) and how (``RTN``, ``MagR``, ``COMQ``, ``GPTQ``, ``Auto``): plain
frozen values."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

VERSION = 1  # of the dictionaries written by to_dict
EFFORTS = ("fast", "standard", "high")
GRIDS = ("asymmetric", "symmetric", "midrise")
RANGES = ("minmax", "percentile", "mse", "entropy")
SOFTMAX = ("auto", "sulq", "log2", "log_sqrt2", "uniform")
GRANULARITIES = ("tensor", "channel", "token")
_SCHEME = re.compile(r"W(\d+)A(\d+)(?:g(\d+))?(-sym)?(-intscale)?", re.IGNORECASE)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _one_of(owner: str, name: str, value: object, allowed: Sequence[str]) -> None:
    _require(value in allowed, f"{owner}: {name} must be one of {', '.join(allowed)}, got {value!r}")


class _Versioned:
    """to_dict / from_dict of a frozen dataclass: a version, and an unknown key is an error."""

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary with the class's name, the version of the layout and every field."""
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}  # type: ignore[call-overload]
        return {"kind": type(self).__name__, "version": VERSION, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Any:
        """The inverse of to_dict. Raises ValueError for another kind or version, or a key that is not a field."""
        rest = dict(values)
        kind, version = rest.pop("kind", cls.__name__), rest.pop("version", None)
        _require(kind == cls.__name__, f"{cls.__name__}: expected kind {cls.__name__!r}, got {kind!r}")
        _require(version == VERSION, f"{cls.__name__}: this release reads version {VERSION}, got {version!r}")
        known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(set(rest) - set(known))
        _require(not unknown, f"{cls.__name__}: unknown key {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in rest.items()})


@dataclass(frozen=True)
class Scheme(_Versioned):
    """Bits and grid of a layer, written ``W<bits>A<bits>[g<group size>][-sym][-intscale]``: ``W4A8``, ``W3A16g128``.

    Args:
        weight_bits: 2..8.
        activation_bits: 2..8, or 16: activations stay in floating point.
        group_size: input columns that share one scale; 0 = the whole row.
        symmetric: zero point in the middle of the codes instead of one per row or group.
        integer_scales: the scales of a row's groups are small integers times one scale, so that linear layers of groups
            run about as fast on CPUs as those of whole rows; rounding to nearest, the error grows by about 1 %. For
            groups of a multiple of 32 up to 512 columns; from 5 bits on nothing changes.
    """

    weight_bits: int
    activation_bits: int = 16
    group_size: int = 0
    symmetric: bool = False
    integer_scales: bool = False

    def __post_init__(self) -> None:
        _require(2 <= self.weight_bits <= 8, f"Scheme: weight_bits must be 2..8, got {self.weight_bits}")
        _require(
            2 <= self.activation_bits <= 8 or self.activation_bits == 16,
            f"Scheme: activation_bits must be 2..8, or 16 (activations stay float), got {self.activation_bits}",
        )
        _require(self.group_size >= 0, f"Scheme: group_size must be 0 (whole row) or positive, got {self.group_size}")
        served = self.group_size % 32 == 0 and 0 < self.group_size <= 512
        _require(
            served or not self.integer_scales,
            f"Scheme: integer_scales needs groups of a multiple of 32 up to 512 columns, got {self.group_size}",
        )

    @classmethod
    def parse(cls, scheme: "str | Scheme") -> "Scheme":
        """The Scheme that a string such as ``"W4A16g128-sym"`` stands for; a Scheme is returned as it is."""
        if isinstance(scheme, Scheme):
            return scheme
        found = _SCHEME.fullmatch(scheme) if isinstance(scheme, str) else None
        if found is None:
            raise ValueError(
                f"Scheme: expected W<bits>A<bits>[g<group size>][-sym][-intscale] such as 'W4A16g128', got {scheme!r}"
            )
        weight, activation, group, symmetric, integer = found.groups()
        return cls(int(weight), int(activation), int(group or 0), symmetric is not None, integer is not None)

    def __str__(self) -> str:
        group = f"g{self.group_size}" if self.group_size else ""
        grid = ("-sym" if self.symmetric else "") + ("-intscale" if self.integer_scales else "")
        return f"W{self.weight_bits}A{self.activation_bits}{group}{grid}"

    @property
    def grid(self) -> str:
        return "symmetric" if self.symmetric else "asymmetric"


@dataclass(frozen=True)
class Activations(_Versioned):
    """How activations are quantized, where the scheme's ``activation_bits`` are less than 16.

    Args:
        range: how a static range is chosen from the calibration's histogram: "minmax", "percentile", "mse" (least
            squared error) or "entropy".
        percentile: of range="percentile": the share of values that is not cut off at each end.
        softmax: quantizer of the softmax's output: "sulq", "log2", "log_sqrt2", "uniform", or "auto": in each attention
            the one with the least expected error of the attention's output (at 3 bits mostly log2 or sulq, at 4
            log_sqrt2, from 6 on uniform).
        reparameterize: quantize the outputs of LayerNorms per channel and move the differences of the scales into the
            LayerNorm and the layers that follow, where these alone receive them.
        dynamic: take ranges from each input at run time (softmax outputs excepted).
        granularity: what has a range of its own: "tensor", "channel", or, with ``dynamic``, "token".
        symmetric: zero point in the middle of the codes.
    """

    range: str = "mse"
    percentile: float = 0.9999
    softmax: str = "auto"
    reparameterize: bool = True
    dynamic: bool = False
    granularity: str = "tensor"
    symmetric: bool = False

    def __post_init__(self) -> None:
        _one_of("Activations", "range", self.range, RANGES)
        _require(0.5 < self.percentile <= 1, f"Activations: percentile must be in (0.5, 1], got {self.percentile}")
        _one_of("Activations", "softmax", self.softmax, SOFTMAX)
        _one_of("Activations", "granularity", self.granularity, GRANULARITIES)
        per_token = self.granularity == "token" and not self.dynamic
        _require(not per_token, "Activations: granularity 'token' has no ranges before run time; it needs dynamic=True")


class Step(_Versioned):
    """One part of a method."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        grid = getattr(self, "grid", None)
        if grid is not None:
            _one_of(type(self).__name__, "grid", grid, GRIDS)


@dataclass(frozen=True)
class RTN(Step):
    """Round to nearest. ``grid`` None: the scheme's, or mid-rise after MagR at 2 and 3 bits."""

    name: ClassVar[str] = "rtn"
    shrink: tuple[float, ...] = (1.0,)
    grid: str | None = None


@dataclass(frozen=True)
class MagR(Step):
    """MagR (2406.00800): lower each row's largest magnitude where the calibration data allow it.

    Args:
        alpha: weight of the largest magnitude, relative to the Gram's largest eigenvalue. None: 1e-3 for whole rows at
            2 and 3 bits, 1e-4 for groups and from 4 bits on.
        iters: 40 steps of fista reach the objective of the paper's 150 to 200 steps of ista.
        solver: "ista" (the paper's), "fista" or "admm".
    """

    name: ClassVar[str] = "magr"
    alpha: float | None = None
    iters: int = 40
    solver: str = "fista"

    def __post_init__(self) -> None:
        _require(self.alpha is None or self.alpha > 0, f"MagR: alpha must be positive, got {self.alpha}")
        _require(self.iters >= 1, f"MagR: iters must be at least 1, got {self.iters}")
        _one_of("MagR", "solver", self.solver, ("ista", "fista", "admm"))


@dataclass(frozen=True)
class COMQ(Step):
    """COMQ (2403.07134): coordinate descent over codes and scales.

    Args:
        sweeps: passes over all columns, each followed by a scale update.
        order: "shared", "greedy", "semi" or "cyclic".
        update_scale: False keeps the first scale.
        shrink: factors on the scale that are tried per row; None = the operator's own list.
        init: "weight", "rtn" or "gptq"; a GPTQ step before this one gives its codes instead.
        grid: None = the scheme's, or mid-rise after MagR at 2 and 3 bits.
    """

    name: ClassVar[str] = "comq"
    sweeps: int = 3
    order: str = "shared"
    update_scale: bool = True
    shrink: tuple[float, ...] | None = None
    init: str = "weight"
    grid: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.sweeps >= 1, f"COMQ: sweeps must be at least 1, got {self.sweeps}")
        _one_of("COMQ", "order", self.order, ("shared", "greedy", "semi", "cyclic"))
        _one_of("COMQ", "init", self.init, ("weight", "rtn", "gptq"))


@dataclass(frozen=True)
class GPTQ(Step):
    """GPTQ (2210.17323). ``damp``: share of the mean diagonal added to the Gram; raised by itself where that fails."""

    name: ClassVar[str] = "gptq"
    shrink: tuple[float, ...] | None = None
    damp: float = 0.01
    order: str = "natural"
    block_size: int = 128
    grid: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.damp >= 0, f"GPTQ: damp must not be negative, got {self.damp}")
        _one_of("GPTQ", "order", self.order, ("natural", "activation"))
        _require(self.block_size >= 1, f"GPTQ: block_size must be at least 1, got {self.block_size}")


@dataclass(frozen=True)
class Auto(Step):
    """Try several pipelines and keep, row by row, the one with the lowest output error. ``effort`` bounds the cost."""

    name: ClassVar[str] = "auto"
    effort: str = "standard"

    def __post_init__(self) -> None:
        _one_of("Auto", "effort", self.effort, EFFORTS)


STEPS: dict[str, type[Step]] = {step.name: step for step in (RTN, MagR, COMQ, GPTQ, Auto)}
ORDERS = "[magr+] rtn | comq | gptq | gptq+comq, or auto alone"


def parse_method(method: "str | Step | Sequence[Step]", effort: str = "standard") -> tuple[Step, ...]:
    """The steps of ``"auto"``, ``"rtn"``, ``"magr+comq"``, ``"gptq+comq"`` ..., or of a list of step configs.

    Raises:
        ValueError: an unknown step, or an order of steps that means nothing.
    """
    _one_of("quantize_", "effort", effort, EFFORTS)
    if isinstance(method, str):
        names = method.lower().split("+")
        unknown = [name for name in names if name not in STEPS]
        _require(not unknown, f"method: unknown step {', '.join(unknown)!r}; known: {', '.join(STEPS)}")
        steps: tuple[Step, ...] = tuple(Auto(effort) if name == "auto" else STEPS[name]() for name in names)
    else:
        steps = (method,) if isinstance(method, Step) else tuple(method)
        wrong = [step for step in steps if not isinstance(step, Step)]
        _require(not wrong, f"method: expected step configs such as MagR() or COMQ(), got {wrong}")
    solving = (
        [step.name for step in steps[1:] or steps] if steps and steps[0].name == "magr" else [s.name for s in steps]
    )
    allowed = solving in (["rtn"], ["comq"], ["gptq"], ["gptq", "comq"]) or [s.name for s in steps] == ["auto"]
    _require(allowed, f"method: expected {ORDERS}; got {method_name(steps) or 'no step'}")
    return steps


def method_name(steps: Sequence[Step]) -> str:
    return "+".join(step.name for step in steps)
