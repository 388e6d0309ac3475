"""Synthetic layers of the benchmarked shapes: correlated inputs of uneven channels, heavy-tailed weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .harness import Floor, matmul_run

Shape = tuple[int, int]

# (N outputs, K inputs): fc1, fc2 of DeiT-S, a square layer of DeiT-B, a layer of a language model.
SHAPES: tuple[Shape, ...] = ((1536, 384), (384, 1536), (768, 768), (4096, 4096))
VIT_TOKENS = 6304  # 32 images of 197 tokens
LARGE_TOKENS = 4096
LARGE = 2048  # inputs from which a layer counts as large: peers are timed on a part of it


@dataclass(frozen=True)
class Layer:
    weight: Tensor  # [N, K]
    x: Tensor  # [tokens, K]
    gram: Tensor  # [K, K]

    @property
    def shape(self) -> Shape:
        return self.weight.shape[0], self.weight.shape[1]

    def rows(self, count: int) -> "Layer":
        """Its first rows: rows are independent given the Gram."""
        return Layer(self.weight[:count].clone(), self.x, self.gram)


def make_inputs(columns: int, seed: int = 0) -> Tensor:
    """A quarter as many factors as channels, plus noise, on channels of log-normal size."""
    random = torch.Generator().manual_seed(seed)
    tokens = LARGE_TOKENS if columns >= LARGE else VIT_TOKENS
    factors = max(1, columns // 4)
    x = torch.randn(tokens, factors, generator=random) @ torch.randn(factors, columns, generator=random)
    x = x / factors**0.5 + 0.3 * torch.randn(tokens, columns, generator=random)
    return x * torch.exp(0.5 * torch.randn(columns, generator=random))


def make_weight(rows: int, columns: int, seed: int = 0, device: str = "cpu") -> Tensor:
    random = torch.Generator(device).manual_seed(seed + 1)
    spread = torch.randn(rows, columns, 6, generator=random, device=device).square().mean(-1).clamp_min(0.1).sqrt()
    return 0.02 * torch.randn(rows, columns, generator=random, device=device) / spread


def make_layer(shape: Shape, seed: int = 0) -> Layer:
    x = make_inputs(shape[1], seed)
    return Layer(make_weight(*shape, seed), x, x.T @ x)


layer_of = lru_cache(maxsize=None)(make_layer)


def some_rows(shape: Shape, count: int) -> Layer:
    """The layer, or of a large one the first rows."""
    return layer_of(shape).rows(count) if shape[1] >= LARGE else layer_of(shape)


def label(shape: Shape, whole: Shape) -> str:
    """(rows, columns), and of how many rows."""
    return f"({shape[0]}, {shape[1]})" if shape == whole else f"({shape[0]} of {whole[0]}, {shape[1]})"


def product_floor(
    shape: Shape, work: Sequence[tuple[str, float]], target: float | None = None, inner: int | None = None
) -> Floor:
    """BLAS on the same shape: [N, inner] times [inner, K]."""
    run, operations = matmul_run(shape[0], inner or shape[1], shape[1])
    return Floor(run, operations, "GFLOP/s", tuple(work), target)
