"""BatchNorm folded into the layers ahead: the same outputs, and only where nobody else reads between."""

import copy

import pytest
import torch
from helpers import random
from torch import nn

import torchquant
from torchquant import fold_batch_norm_


class Net(nn.Module):
    """Folded: stem, depthwise, line. Not: one whose input is read twice, one behind an activation, one used twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8, affine=False)
        self.read, self.norm3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.norm4 = nn.BatchNorm2d(8)
        self.twice, self.norm5 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.line, self.norm6 = nn.Linear(8, 5), nn.BatchNorm1d(5)

    def forward(self, x):
        x = torch.relu(self.norm1(self.stem(x)))
        x = self.norm2(self.depthwise(x))
        y = self.read(x)
        x = self.norm4(torch.relu(self.norm3(y) + y))
        x = self.norm5(self.twice(x))
        x = self.norm5(self.twice(x))
        return self.norm6(self.line(x.mean((2, 3))))


FOLDED = ["norm1", "norm2", "norm6"]


def network(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().to(dtype)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    nn.init.normal_(module.weight), nn.init.normal_(module.bias)
        return model.eval()


def pictures(dtype=torch.float32):
    return torch.randn(4, 3, 9, 9, generator=random(0)).to(dtype)


@pytest.mark.parametrize("example", [lambda x: x, lambda x: (x,), lambda x: {"x": x}], ids=["input", "tuple", "dict"])
def test_the_same_outputs(example):
    model = network(torch.float64)
    x, parameters = pictures(torch.float64), dict(model.named_parameters())
    before, values = model(x), {name: p.detach().clone() for name, p in parameters.items()}
    assert fold_batch_norm_(model, example(x)) == FOLDED
    assert all(type(model.get_submodule(name)) is nn.Identity for name in FOLDED)
    assert isinstance(model.norm3, nn.BatchNorm2d) and isinstance(model.norm5, nn.BatchNorm2d)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(parameters[name], value) for name, value in values.items())
    assert model.stem.bias.requires_grad and model.stem.bias.dtype == torch.float64
    assert fold_batch_norm_(model, x) == []


def test_tied_weights_and_half():
    model = network(torch.bfloat16)
    model.other = nn.Linear(8, 5)
    model.other.weight = model.line.weight
    assert fold_batch_norm_(model, pictures(torch.bfloat16)) == FOLDED[:2]
    assert model.stem.weight.dtype == torch.bfloat16


def test_what_cannot_be_folded_leaves_the_model_as_it_was():
    class Peeking(Net):
        def forward(self, x):
            return super().forward(x) * self.stem.weight.sum()

    model = network()
    model.__class__ = Peeking
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    with pytest.raises(ValueError, match="computes something else"):
        fold_batch_norm_(model, pictures())
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="must be in evaluation mode"):
        fold_batch_norm_(model.train(), pictures())


def test_quantized_behind_it():
    model = network()
    plain = copy.deepcopy(model)
    fold_batch_norm_(model, pictures())
    torchquant.quantize_(model, "W8A8", [pictures()], method="rtn", progress=False)
    wanted = plain(pictures())
    assert (model(pictures()) - wanted).norm() < 0.05 * wanted.norm()
