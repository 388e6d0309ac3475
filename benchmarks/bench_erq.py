"""ERQ at 4 bits, ridge_update and flips_quantize, against the published form, which works on the activations."""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchquant import dequantize, flips_quantize, ridge_update
from torchquant.statistics import cross_gram_accumulate_, gram_accumulate_

from . import peers
from .harness import Contest, Peer, check
from .layers import Layer, Shape, label, product_floor, some_rows

BITS = 4
RIDGE = 0.1  # relative to the mean of the Gram's diagonal
FLIPS = 100  # a row and half, at most
PUBLISHED_ROWS = 500  # that the published form takes at a time
SOME_ROWS = 384  # of a large layer


@dataclass(frozen=True)
class Inputs:
    """A layer with its inputs on 16 levels, and what the operators know of them."""

    layer: Layer
    quantized: Tensor  # [tokens, K]
    gram: Tensor
    cross: Tensor

    def error(self, weight: Tensor) -> float:
        """Squared output error relative to the float layer's outputs."""
        wanted = self.layer.x @ self.layer.weight.T
        return float((wanted - self.quantized @ weight.T).square().sum() / wanted.square().sum())


def make_grams(x: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
    gram, cross = torch.zeros(x.shape[1], x.shape[1]), torch.zeros(x.shape[1], x.shape[1])
    gram_accumulate_(gram, quantized)
    cross_gram_accumulate_(cross, quantized, x)
    return gram, cross


def make_inputs(shape: Shape) -> Inputs:
    layer = some_rows(shape, SOME_ROWS)
    step = layer.x.square().mean().sqrt() / 2
    quantized = (layer.x / step).round().clamp(-8, 7) * step
    return Inputs(layer, quantized, *make_grams(layer.x, quantized))


def ours(inputs: Inputs, refine: str = "best") -> Tensor:
    weight = ridge_update(inputs.layer.weight, inputs.gram, inputs.cross, ridge=RIDGE)
    options = {"bits": BITS, "shrink": [1.0], "ridge": RIDGE, "steps": FLIPS}
    return dequantize(*flips_quantize(weight, inputs.gram, refine=refine, **options)[:3])


# --- the published form ---


def published_update(inputs: Inputs, ridge: Tensor) -> Tensor:
    """Regression of the missing outputs on the quantized inputs."""
    x, weight = inputs.quantized, inputs.layer.weight
    missing = (inputs.layer.x - x) @ weight.T
    inverse = torch.linalg.inv(x.T @ x + ridge * torch.eye(x.shape[1]))
    return weight + (inverse @ (x.T @ missing)).T


def published_flips(codes: Tensor, weight: Tensor, grid: peers.Grid, proxy: Tensor, impatient: bool) -> Tensor:
    """Per step the gradient and two quadratic forms anew. Impatient: ends when no row gains any more."""
    row = torch.arange(len(codes))
    for _ in range(FLIPS):
        error = (codes - grid.zero[:, None]) * grid.scale[:, None] - weight
        gradient = 2 * error @ proxy
        other = codes - error.sign()
        usable = (error * gradient > 0) & (other >= 0) & (other <= grid.top)
        column = torch.where(usable, gradient.abs(), 0).argmax(1)
        trial = codes.clone()
        trial[row, column] = torch.where(usable, other, codes)[row, column]
        moved = (trial - grid.zero[:, None]) * grid.scale[:, None] - weight
        better = ((moved @ proxy) * moved).sum(1) < ((error @ proxy) * error).sum(1)
        if impatient and not better.any():
            break
        codes = torch.where(better[:, None], trial, codes)
    return codes


def published_rows(x: Tensor, weight: Tensor, grid: peers.Grid, ridge: Tensor, impatient: bool) -> Tensor:
    """Halving of some rows: the products of the inputs and an inverse for every half."""
    weight, result = weight.clone(), torch.empty_like(weight)
    start, columns = 0, weight.shape[1]
    while start < columns:
        now = slice(start, start + max(1, (columns - start) // 2))
        start = now.stop
        first, rest, w = x[:, now], x[:, start:], weight[:, now]
        mean = first.mean(0)
        centred = first - mean
        proxy = mean[:, None] * mean + centred.T @ centred / len(x)
        codes = published_flips(peers.to_codes(w, grid), w, grid, proxy, impatient)
        result[:, now] = (codes - grid.zero[:, None]) * grid.scale[:, None]
        if start < columns:
            inverse = torch.linalg.inv(rest.T @ rest + ridge * torch.eye(columns - start))
            weight[:, start:] -= (result[:, now] - w) @ (first.T @ rest) @ inverse
    return result


def published(inputs: Inputs, impatient: bool = False) -> Tensor:
    ridge = RIDGE * inputs.quantized.square().sum(0).mean()
    weight = published_update(inputs, ridge)
    parts = [
        published_rows(inputs.quantized, rows, peers.minmax_grid(rows, BITS), ridge, impatient)
        for rows in weight.split(PUBLISHED_ROWS)
    ]
    return torch.cat(parts)


def erq(shape: Shape) -> Contest:
    inputs = make_inputs(shape)
    theirs, best, parity = (inputs.error(w) for w in (published(inputs), ours(inputs), ours(inputs, "gradient")))
    check(abs(parity / theirs - 1) < 0.01, f"erq: error {parity} by the published rule, {theirs} by the published form")
    check(best < 1.01 * theirs, f"erq: error {best}, {theirs} by the published form")
    name = f"published form in torch: an inverse per half and {PUBLISHED_ROWS} rows, {FLIPS} steps"
    impatient = "the same, ended when no row gains"
    return Contest(
        "erq",
        label(inputs.layer.shape, shape),
        lambda: ours(inputs),
        [
            Peer(name, lambda: published(inputs), target=20.0),
            Peer(f"{name}; our Grams from the inputs included", lambda: None, timed_as=name, ours_plus="grams"),
            Peer(impatient, lambda: published(inputs, impatient=True)),
        ],
        product_floor(inputs.layer.shape, [("2NK²", 2.0 * inputs.layer.weight.numel() * shape[1])]),
        f"relative output error {best:.5f}, published {theirs:.5f}",
        extra={"grams": lambda: make_grams(inputs.layer.x, inputs.quantized)},
    )
