"""Fused MLPs: the same as their modules one by one, up to a code that falls the other way."""

import copy

import pytest
import torch
from helpers import assert_same, random, scripted
from small_models import distance, run
from torch import nn

from torchquant import load, save
from torchquant.nn.mlp import QMlp, QSequentialMlp, fuse_mlps
from torchquant.nn.quantizers import DynamicQuantizer
from torchquant.nn.repeat import OperatorCalls


class Mlp(nn.Module):
    """As timm's."""

    def __init__(self, act=None, norm=None):
        super().__init__()
        self.fc1 = nn.Linear(24, 50)
        self.act = nn.GELU() if act is None else act
        self.drop1 = nn.Dropout(0.5)
        self.norm = nn.Identity() if norm is None else norm
        self.fc2 = nn.Linear(50, 24)
        self.drop2 = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class Twice(Mlp):
    """Only looks alike."""

    def forward(self, x):
        return self.fc2(self.act(self.act(self.fc1(x))))


def sequence(*between, act=None, last=()):
    return nn.Sequential(nn.Linear(24, 50), nn.GELU() if act is None else act, *between, nn.Linear(50, 24), *last)


MLPS = {
    "timm": Mlp,
    "silu": lambda: Mlp(nn.SiLU()),
    "sequence": sequence,
    "torchvision": lambda: sequence(nn.Dropout(0.5), last=[nn.Dropout(0.5)]),
}
OTHERS = {
    "another function": lambda: Mlp(nn.ReLU()),
    "GELU by tanh": lambda: sequence(act=nn.GELU("tanh")),
    "a norm between": lambda: Mlp(norm=nn.LayerNorm(50)),
    "another forward": Twice,
    "a layer more": lambda: sequence(last=[nn.Linear(24, 24)]),
}


def inputs(count=3, tokens=40):
    return [torch.randn(2, tokens, 24, generator=random(seed)) for seed in range(count)]


def quantized(make, scheme="W4A8"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(make(), nn.LayerNorm(24)).eval()
    names = [name for name, _ in model.named_modules()]
    run(model, scheme, inputs(), method="rtn")
    assert [name for name, _ in model.named_modules() if "quantizer" not in name][: len(names)] == names
    return model


def one_by_one(model):
    """The model with its MLPs unfused."""
    model = copy.deepcopy(model)
    model[0].forward = model[0].unfused
    return model


@pytest.mark.parametrize("scheme", ["W4A8", "W4A4", "W3A16"])
@pytest.mark.parametrize("name", MLPS)
def test_the_same_as_one_by_one(name, scheme):
    model = quantized(MLPS[name], scheme)
    assert isinstance(model[0], QMlp | QSequentialMlp)
    assert model[0].fuses(inputs()[0])
    assert distance(model, one_by_one(model), inputs()) < (1e-5 if scheme == "W3A16" else 2e-3)


def test_codes_travel():
    model = quantized(Mlp)
    x, (fc1, fc2) = inputs()[0], (model[0].fc1, model[0].fc2)
    with torch.no_grad(), OperatorCalls() as seen:
        found = model[0](x)
    assert [call[0].__name__ for call in seen.calls] == ["quantized_mlp.default"]
    assert_same(found, fc2.packed(fc2.input_quantizer.codes(fc1.packed(x, "gelu"))))
    fc2.input_quantizer = DynamicQuantizer(8)
    assert_same(model[0](x), fc2(fc1.packed(x, "gelu")))


@pytest.mark.parametrize("name", OTHERS)
def test_what_stays(name):
    assert not isinstance(quantized(OTHERS[name])[0], QMlp | QSequentialMlp)


def test_layers_in_floating_point_stay():
    model = nn.Sequential(Mlp(), Mlp()).eval()
    run(model, "W4A8", inputs(), method="rtn", ignore=["0.fc2"])
    assert type(model[0]) is Mlp and type(model[1]) is QMlp


def test_parts_that_are_observed_give_floats():
    model = quantized(Mlp)
    x, seen = inputs()[0], []
    wanted = one_by_one(model)(x)
    for part in ("fc1", "act", "drop1", "fc2"):
        handle = model[0].get_submodule(part).register_forward_hook(lambda m, i, o: seen.append(o))
        assert_same(model(x), wanted)
        handle.remove()
    assert len(seen) == 4 and all(o.dtype == torch.float32 for o in seen)


def test_training_and_gradients():
    model = quantized(lambda: Mlp(nn.SiLU()))
    x = inputs()[0].requires_grad_()
    assert not model[0].fuses(x) and model[0].fuses(x.detach())
    assert_same(model(x), one_by_one(model)(x))
    wanted = model(x.detach())
    model.train()
    assert not model[0].fuses(x.detach())
    assert (model(x.detach()) - wanted).abs().max() > 0.1  # dropout


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    model = quantized(Mlp)
    half = copy.deepcopy(model).to(dtype)
    got = half(inputs()[0].to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), model(inputs()[0]), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("scheme", ["W4A8", "W3A16"])
@pytest.mark.parametrize("name", MLPS)
def test_roads(name, scheme, tmp_path):
    model, x = quantized(MLPS[name], scheme), inputs()[0]
    with torch.no_grad():
        wanted = model(x)
        assert_same(scripted(model)(x), wanted)
        assert_same(torch.export.export(model, (x,)).module()(x), wanted)
        assert_same(copy.deepcopy(model)(x), wanted)
    save(model, tmp_path / "saved")
    again = load(tmp_path / "saved", nn.Sequential(MLPS[name](), nn.LayerNorm(24)).eval())
    assert type(again[0]) is type(model[0])
    assert list(again.state_dict()) == list(model.state_dict())
    assert_same(again(x), wanted)


def test_compiles_in_one_graph():
    model, x = quantized(Mlp), inputs()[0]
    with torch.no_grad():
        assert_same(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def test_twice_is_harmless():
    model = quantized(Mlp)
    before = model[0]
    fuse_mlps(model)
    assert model[0] is before
