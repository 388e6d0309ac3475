"""The smooth optimization strategy of I&S-ViT (2311.10126): blocks are trained, one at a time, towards the float ones.

A unit is a block of the model, or a layer outside all blocks (patch embedding, head). Its weights and biases are
trained by Adam to give, with quantized activations (and, in the last stage, quantized weights), the outputs of the
float unit. Inputs and targets are recorded once. Rounding passes gradients on.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from ..calibrate import tensors_of
from ..collect import longest_blocks, stages
from ..nn import layout
from ..nn.quantizers import ActivationQuantizer, UniformQuantizer
from ..solve import Solution
from ..solvers.rtn import rtn_quantize
from ..steps import Run, add_solution, quantizing_inputs

# Of a row's grid, the best by the weights' error; the published code searches percentiles of the row.
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)


@dataclass(frozen=True)
class Training:
    """The published settings. A network of a few thousand weights wants a larger ``rate``."""

    rate: float = 4e-5
    iterations: int = 1000  # the publication: 200 at 6 bits
    batch: int = 64


@dataclass
class Unit:
    """What is trained at once."""

    name: str
    module: nn.Module
    layers: list[str]  # names in the model

    def own(self, names: Mapping[str, Any]) -> dict[str, Any]:
        """Of ``names`` in the model those inside the unit, as the unit calls them."""
        prefix = self.name + "."
        found = {key.removeprefix(prefix): value for key, value in names.items() if key.startswith(prefix)}
        return found | ({"": names[self.name]} if self.name in names else {})


@dataclass
class Recorded:
    """One call of a unit."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    target: Tensor = field(default_factory=lambda: torch.empty(0))


def units_of(run: Run) -> list[Unit]:
    transposed = {name for name, target in run.targets.items() if isinstance(target.module, nn.ConvTranspose2d)}
    order = [n for n in run.observed.order if n in run.targets and n not in run.layers and n not in transposed]
    blocks = longest_blocks(run.model, order)
    units = []
    for layers in stages(run.model, order):
        name = next((block for block in blocks if layers[0].startswith(block + ".")), layers[0])
        units.append(Unit(name, run.model.get_submodule(name), layers))
    return units


# --- inputs and targets ---


def record(run: Run, model: nn.Module, name: str) -> list[Recorded]:
    """Every call of the module ``name`` of ``model`` during one pass of the calibration data."""
    module, calls = model.get_submodule(name), []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(Recorded(args, kwargs))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls[-1].target = next(tensors_of(output))

    # First of all hooks: the inputs as they are before the unit's own quantizers.
    handles = [
        module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]
    assert run.data is not None
    try:
        run.data.run(model, f"inputs of {name}")
    finally:
        for handle in handles:
            handle.remove()
    return calls


def joined(calls: Sequence[Recorded]) -> list[Recorded]:
    """One call with all samples where the unit takes a single tensor; otherwise the calls as they are."""
    if any(len(call.args) != 1 or any(True for _ in tensors_of(call.kwargs)) for call in calls):
        return list(calls)
    if len({(call.args[0].shape[1:], call.target.shape[1:]) for call in calls}) > 1:
        return list(calls)
    args = (torch.cat([call.args[0] for call in calls]),)
    return [Recorded(args, calls[0].kwargs, torch.cat([call.target for call in calls]))]


def random_batches(calls: Sequence[Recorded], size: int, generator: torch.Generator) -> Iterator[Recorded]:
    """Without end: ``size`` random samples of joined calls, or whole calls."""
    while True:
        if len(calls) > 1:
            yield calls[int(torch.randint(len(calls), (1,), generator=generator))]
            continue
        (x,), target = calls[0].args, calls[0].target
        pick = torch.randperm(len(x), generator=generator)[:size].to(x.device)
        yield Recorded((x[pick],), calls[0].kwargs, target[pick])


# --- training ---


def output_of(unit: Unit, grids: Mapping[str, ActivationQuantizer], call: Recorded) -> Tensor:
    """The unit's output with the weights of ``grids`` quantized."""
    parameters = dict(unit.module.named_parameters())
    weights = {}
    for name, grid in unit.own(grids).items():
        key = f"{name}.weight" if name else "weight"
        weights[key] = grid.straight_through(parameters[key])
    return next(tensors_of(functional_call(unit.module, weights, call.args, call.kwargs)))


def loss_of(unit: Unit, grids: Mapping[str, ActivationQuantizer], calls: Sequence[Recorded]) -> float:
    return sum(F.mse_loss(output_of(unit, grids, call), call.target).item() for call in calls) / len(calls)


def train_unit(
    run: Run, unit: Unit, calls: Sequence[Recorded], grids: Mapping[str, ActivationQuantizer], how: Training, bar: tqdm
) -> tuple[float, float]:
    """Adam on the layers' weights and biases; returns the loss before and after. What did not help is undone."""
    layers = [run.targets[name].module for name in unit.layers]
    parameters = [p for layer in layers for p in layer.parameters(recurse=False)]
    before, frozen = [p.detach().clone() for p in parameters], [p.requires_grad for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=how.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.iterations)
    generator = torch.Generator().manual_seed(run.seed)
    batches = random_batches(calls, how.batch, generator)
    with quantizing_inputs(unit.module, unit.own(run.quantizers), straight_through=True):
        first = loss_of(unit, grids, calls)
        for p in parameters:
            p.requires_grad_(True)
        for _ in range(how.iterations):
            with torch.enable_grad():
                batch = next(batches)
                loss = F.mse_loss(output_of(unit, grids, batch), batch.target)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
        last = loss_of(unit, grids, calls)
        if not last < first:
            last = first
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
    for p, flag in zip(parameters, frozen, strict=True):
        p.requires_grad_(flag).grad = None
    return first, last


def train_activations(run: Run, teacher: nn.Module, how: Training) -> dict[str, tuple[float, float]]:
    """Stage 1: float weights learn to live with quantized activations. Inputs and targets are the float model's."""
    units = units_of(run)
    losses = {}
    with tqdm(total=len(units) * how.iterations, desc="sos 1/2", disable=not run.progress, leave=False) as bar:
        for unit in units:
            losses[unit.name] = train_unit(run, unit, joined(record(run, teacher, unit.name)), {}, how, bar)
    return losses


def train_weights(run: Run, teacher: nn.Module, how: Training) -> dict[str, tuple[float, float]]:
    """Stage 3: weights too are quantized, on grids that stay. Inputs come from the units quantized before."""
    units = units_of(run)
    losses: dict[str, tuple[float, float]] = {}
    done: dict[str, Tensor] = {}
    with tqdm(total=len(units) * how.iterations, desc="sos 2/2", disable=not run.progress, leave=False) as bar:
        for unit in units:
            began = time.perf_counter()
            targets = record(run, teacher, unit.name)
            with quantizing_inputs(run.model, run.quantizers), holding(run, done):
                calls = record(run, run.model, unit.name)
            for call, target in zip(calls, targets, strict=True):
                call.target = target.target
            grids = {name: weight_grid(run, name) for name in unit.layers}
            losses[unit.name] = train_unit(run, unit, joined(calls), grids, how, bar)
            for name, grid in grids.items():
                done[name] = grid(run.targets[name].module.weight.detach())  # type: ignore[union-attr,operator]
                add_trained(run, name, grid, (time.perf_counter() - began) / len(grids))
    return losses


@contextmanager
def holding(run: Run, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, these layers have other weights."""
    before = {name: run.targets[name].module._parameters["weight"] for name in weights}
    try:
        for name, weight in weights.items():
            run.targets[name].module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for name, parameter in before.items():
            run.targets[name].module._parameters["weight"] = parameter


def weight_grid(run: Run, name: str) -> UniformQuantizer:
    """Of the layer's weight as it lies in the module: one scale and zero point for each output."""
    target = run.targets[name]
    bits, grid = target.scheme.weight_bits, target.scheme.grid
    _, scale, zero_point = rtn_quantize(layout.to_matrix(target.module), bits=bits, grid=grid, shrink=SHRINK)
    return UniformQuantizer(bits, scale[:, 0], zero_point[:, 0], axis=-1 if layout.is_hf_conv1d(target.module) else 0)


def add_trained(run: Run, name: str, grid: UniformQuantizer, seconds: float) -> None:
    module = run.targets[name].module
    codes = grid.codes(module.weight.detach())  # type: ignore[union-attr,operator]
    matrix = codes.t().contiguous() if layout.is_hf_conv1d(module) else codes.flatten(1)
    add_solution(run, name, Solution(matrix, grid.scale[:, None], grid.zero_point[:, None]), seconds)
    run.layers[name].method = "sos"
