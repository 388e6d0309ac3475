"""What the tests of every room share: layers worth testing, the opcheck harness, tiers and threads."""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import torchquant  # noqa: F401  (registers the operators)
from torchquant import _C

BITS = (2, 3, 4, 8)
GRIDS = ("asymmetric", "symmetric", "midrise")
FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
PLACES = ("scalar", "avx2", "avx512", "cuda")


@dataclass(frozen=True)
class Layer:
    """A layer's weight and its calibration inputs."""

    weight: Tensor  # [N, K] float32, float16 or bfloat16
    x: Tensor  # [tokens, K] float64

    @property
    def gram(self) -> Tensor:  # [K, K] float32
        return (self.x.T @ self.x).float()


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated_inputs(tokens: int, columns: int, seed: int = 0, power: float = 1.0) -> Tensor:
    """Inputs whose Gram has eigenvalues falling as 1, 2^-power, 3^-power ... in a random basis, as real layers have."""
    noise = torch.randn(tokens, columns, generator=random(seed), dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(columns, columns, generator=random(seed + 1), dtype=torch.float64))
    spectrum = torch.arange(1, columns + 1, dtype=torch.float64) ** (-power / 2)
    return (noise * spectrum) @ basis.T


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Weights with the tails of trained ones (a normal over the root of a chi-square)."""
    normal = torch.randn(rows, columns, generator=random(seed + 2))
    chi = torch.randn(rows, columns, 6, generator=random(seed + 3)).square().mean(-1)
    return 0.02 * normal / chi.clamp_min(0.1).sqrt()


def correlated(rows: int, columns: int, tokens: int = 0, seed: int = 0) -> Layer:
    return Layer(heavy_tailed(rows, columns, seed), correlated_inputs(tokens or 4 * columns + 8, columns, seed))


def massive_activation(rows: int, columns: int, seed: int = 0) -> Layer:
    layer = correlated(rows, columns, seed=seed)
    layer.x[:, columns // 3] *= 1e3
    return layer


def rank_deficient(rows: int, columns: int, seed: int = 0) -> Layer:
    return correlated(rows, columns, tokens=max(1, columns // 3), seed=seed)


def dead_channels(rows: int, columns: int, seed: int = 0) -> Layer:
    layer = correlated(rows, columns, seed=seed)
    layer.x[:, 1::4] = 0
    return layer


def constant_rows(rows: int, columns: int, seed: int = 0) -> Layer:
    layer = correlated(rows, columns, seed=seed)
    for row, value in enumerate((0.0, 0.5, -0.25)[:rows]):
        layer.weight[row] = value
    return layer


def typed(dtype: torch.dtype) -> Callable[..., Layer]:
    def make(rows: int, columns: int, seed: int = 0) -> Layer:
        layer = correlated(rows, columns, seed=seed)
        return Layer(layer.weight.to(dtype), layer.x)

    return make


# One named case list: values, opcheck and properties all run over it. Each maps (rows, columns, seed=) to a layer.
LAYERS: dict[str, Callable[..., Layer]] = {
    "correlated": correlated,
    "massive": massive_activation,
    "rank_deficient": rank_deficient,
    "dead": dead_channels,
    "constant": constant_rows,
    "bfloat16": typed(torch.bfloat16),
    "half": typed(torch.float16),
    "one_row": lambda rows, columns, seed=0: correlated(1, columns, seed=seed),
    "one_column": lambda rows, columns, seed=0: correlated(rows, 1, seed=seed),
}


def missing_place(place: str) -> str:
    """Why this machine cannot run a place ("scalar", "avx2", "avx512" or "cuda"); empty when it can."""
    if place != "cuda":
        return "" if place in _C.cpu_tiers() else f"this CPU or build has no {place} tier"
    if not _C.with_cuda:
        return "torchquant was built without CUDA"
    return "" if torch.cuda.is_available() else "no CUDA device"


@contextlib.contextmanager
def tier(name: str) -> Iterator[None]:
    before = _C.cpu_tier()
    _C.set_cpu_tier(name)
    try:
        yield
    finally:
        _C.set_cpu_tier(before)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def strided(tensor: Tensor) -> Tensor:
    """The same values on another layout: every second column of a wider, transposed buffer."""
    if tensor.dim() < 2:
        return tensor.repeat_interleave(2)[::2]
    shape = (*tensor.shape[:-2], tensor.shape[-1] * 2, tensor.shape[-2])
    buffer = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device).transpose(-1, -2)[..., ::2]
    return buffer.copy_(tensor)


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """Views of equal values that are not contiguous (for a matrix)."""
    wide = torch.cat([tensor, tensor, tensor], dim=1)
    return {
        "transposed": tensor.t().contiguous().t(),
        "sliced": wide[:, tensor.shape[1] : 2 * tensor.shape[1]],
        "strided": strided(tensor),
    }


def assert_same(got: Sequence[Tensor] | Tensor, wanted: Sequence[Tensor] | Tensor) -> None:
    """Bit for bit, dtype and shape included."""
    got, wanted = ([t] if isinstance(t, Tensor) else list(t) for t in (got, wanted))
    assert len(got) == len(wanted)
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=index: f"output {i}: {m}")


def check_deployed(layer: nn.Module, x: Tensor, more: Tensor) -> None:
    """Scripted, and exported with a dynamic first dimension: the same bits."""
    assert_same(scripted(layer)(x), layer(x))
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    assert_same(exported.module()(more), layer(more))


def check_op(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> None:
    """torch.library.opcheck (schema, autograd registration, fake kernel, AOT dispatch) on contiguous and on strided
    inputs, and the same result from both; on CUDA, whose BLAS chooses by addresses, within rounding."""
    kwargs = dict(kwargs or {})
    swap = lambda v: strided(v) if isinstance(v, Tensor) else v  # noqa: E731
    other_args, other_kwargs = [swap(a) for a in args], {k: swap(v) for k, v in kwargs.items()}
    torch.library.opcheck(op, tuple(args), kwargs)
    torch.library.opcheck(op, tuple(other_args), other_kwargs)
    copies = [a.clone() if isinstance(a, Tensor) else a for a in args]  # operators named with a trailing _ write
    outputs, other_outputs = op(*copies, **kwargs), op(*other_args, **other_kwargs)
    if outputs is not None:
        on_cuda = any(isinstance(a, Tensor) and a.is_cuda for a in args)
        (torch.testing.assert_close if on_cuda else assert_same)(outputs, other_outputs)


def scripted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through TorchScript, saved and loaded."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(function), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)
