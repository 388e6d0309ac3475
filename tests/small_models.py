"""Small networks and calibration data for the tests of quantize_."""

import pytest
import torch
from torch import nn

from torchquant.quantize import quantize_


class Mlp(nn.Module):
    """Correlated inputs, so that methods differ."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(24, 24), nn.GELU()) for _ in range(3)))
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        return self.head(self.blocks(x))


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, padding="same", groups=4)
        self.up = nn.ConvTranspose2d(12, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.line = nn.Conv1d(6, 4, 3, padding=1)

    def forward(self, x):
        x = self.up(torch.relu(self.grouped(torch.relu(self.depthwise(torch.relu(self.stem(x)))))))
        return self.line(x.flatten(2))


def make(cls, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls()


def rows(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(24, 24, generator=generator) * torch.logspace(0, -1.5, 24)
    return [torch.randn(32, 24, generator=generator) @ mix for _ in range(count)]


def pictures(count=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 12, 12, generator=generator) for _ in range(count)]


def run(model, scheme, calib=None, **options):
    return quantize_(model, scheme, calib, progress=False, **options)


def distance(model, other, xs):
    with torch.no_grad():
        pairs = [(model(x), other(x)) for x in xs]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


def assert_unchanged(model, message, error=ValueError, **options):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules, flags = list(model.modules()), [module.training for module in model.modules()]
    with pytest.raises(error, match=message):
        quantize_(model, options.pop("scheme", "W4A16"), options.pop("calib", None), progress=False, **options)
    assert list(model.modules()) == modules and [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
