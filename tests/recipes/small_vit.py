"""A vision transformer that quantizes in a second, and what every recipe for such networks must keep."""

import copy
import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torchquant.demo.digits_vit import DigitsViT


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsViT(dim=16, depth=2, heads=2)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data += 0.3 * torch.randn(parameter.shape)
            elif name.endswith("qkv.weight"):
                parameter.data *= 4  # attention that looks somewhere
    return model.eval()


def calibration(batches: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    patterns = torch.rand(6, 8, 8, generator=generator)
    return [
        torch.rand(16, 6, generator=generator).matmul(patterns.flatten(1)).view(-1, 8, 8) / 3 for _ in range(batches)
    ]


def output_error(model: nn.Module, quantized: nn.Module) -> float:
    """Relative, on inputs that were not calibrated on."""
    x = torch.cat(calibration(6)[4:])
    with torch.no_grad():
        reference = model(x)
        return float((quantized(x) - reference).norm() / reference.norm())


def quantized_error(
    recipe: Callable[..., object], scheme: str = "W4A4", model: nn.Module | None = None, **options
) -> float:
    model = network() if model is None else model
    quantized = copy.deepcopy(model)
    recipe(quantized, calibration(), scheme, progress=False, **options)
    return output_error(model, quantized)


def check_failure_changes_nothing(recipe: Callable[..., object], monkeypatch, where: str, **options) -> None:
    """An error late in the recipe: modules, parameters and their values are what they were."""
    model = network()
    tensors = dict(model.state_dict(keep_vars=True))
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    modules = dict(model.named_modules())

    def fail(*args, **kwargs):
        raise RuntimeError("the disk is full")

    module, _, name = where.rpartition(".")
    monkeypatch.setattr(importlib.import_module(module), name, fail)
    with pytest.raises(RuntimeError, match="the disk is full"):
        recipe(model, calibration(), "W4A4", progress=False, **options)
    after = dict(model.state_dict(keep_vars=True))
    assert after.keys() == tensors.keys() and all(after[name] is tensors[name] for name in tensors)
    assert all(torch.equal(after[name], values[name]) for name in values)
    assert {name: id(m) for name, m in model.named_modules()} == {name: id(m) for name, m in modules.items()}
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def spread(model: nn.Module) -> nn.Module:
    """The same function, with LayerNorm channels that differ in range by factors, as in large transformers."""
    from torchquant.demo.compare_vit import spread_channels

    return spread_channels(model, seed=0)
