"""The published pipeline of MagR and COMQ."""

import importlib

import pytest
import torch
from torch import nn

from torchquant import COMQ, MagR, quantize_
from torchquant.recipes import magr_comq


def network() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def inputs() -> list[torch.Tensor]:
    """Nearly rank-deficient, as real activations are: what MagR lives on."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.diag(0.7 ** torch.arange(24.0)) @ torch.randn(24, 24, generator=generator)
    return [torch.randn(64, 24, generator=generator) @ spread for _ in range(4)]


@pytest.mark.parametrize("scheme", ["W4A16", "W3A16", "W2A16", "W3A16g8"])
def test_it_beats_rounding(scheme):
    report = magr_comq(network(), inputs(), scheme, progress=False)
    assert len(report.layers) == 3 and report.not_ok == 0
    assert report.mean_ratio() < 0.8


def test_with_quantized_activations():
    report = magr_comq(network(), inputs(), "W3A8", progress=False)
    assert report.not_ok == 0 and report.mean_ratio() < 0.9
    assert {(a.name, a.bits) for a in report.activations} == {("0", 8), ("2", 8), ("4", 8)}


def test_magr_lowers_the_largest_magnitudes():
    report = magr_comq(network(), inputs(), "W3A16", progress=False)
    assert all(after < before for before, after in report.details["magr"].values())


@pytest.mark.parametrize(
    ("scheme", "alpha", "sweeps", "shrink"),
    [("W4A16", 1e-3, 3, 1.0), ("W3A16", 1e-3, 3, 0.9), ("W2A16", 1e-3, 30, 0.8), ("W4A16g8", 1e-4, 3, 0.95)],
)
def test_the_settings_are_the_papers(monkeypatch, scheme, alpha, sweeps, shrink):
    seen = {}

    def remember(model, scheme, calib, **options):
        seen.update(options)
        return quantize_(model, scheme, calib, **options)

    monkeypatch.setattr(importlib.import_module("torchquant.recipes.magr_comq"), "quantize_", remember)
    magr_comq(network(), inputs(), scheme, progress=False)
    assert seen["method"] == [
        MagR(alpha=alpha, iters=150, solver="ista"),
        COMQ(sweeps=sweeps, order="greedy", shrink=(shrink,), grid="asymmetric"),
    ]
    assert seen["inputs"] == "quantized"


def test_settings_can_be_changed():
    gentle = magr_comq(network(), inputs(), "W3A16", alpha=1e-6, inputs="float", progress=False).details["magr"]
    strong = magr_comq(network(), inputs(), "W3A16", alpha=1e-1, inputs="float", progress=False).details["magr"]
    assert all(strong[name][1] < gentle[name][1] for name in gentle)


def test_a_layer_may_be_left_alone():
    model = network()
    report = magr_comq(model, inputs(), "W4A16", ignore=["4"], progress=False)
    assert [layer.name for layer in report.layers] == ["0", "2"]
    assert type(model[4]) is nn.Linear
