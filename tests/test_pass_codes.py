"""Layers that hand each other codes: the same outputs, and only where nobody reads floats between."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, random, scripted
from torch import nn

import torchquant
from torchquant import Activations, pass_codes_
from torchquant.demo.digits_vit import Attention
from torchquant.nn import QConv2d, QLayerNorm
from torchquant.pass_codes import PassingCodes


class Net(nn.Module):
    """Codes from: stem, depthwise (one ReLU6 for both), wide, line1. Not from: read (added to, too), narrow (nobody's
    input has one grid), last."""

    def __init__(self):
        super().__init__()
        self.stem, self.clip = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU6()
        self.depthwise = nn.Sequential(nn.ZeroPad2d((0, 1, 1, 2)), nn.Conv2d(8, 8, 3, groups=8))
        self.read = nn.Conv2d(8, 8, 1)
        self.wide, self.swish, self.narrow = nn.Conv2d(8, 20, 3, padding=1), nn.SiLU(), nn.Conv2d(20, 8, 1)
        self.pool, self.line1, self.relu, self.drop = (
            nn.AdaptiveAvgPool2d(1), nn.Linear(8, 12), nn.ReLU(inplace=True), nn.Dropout(),
        )  # fmt: skip
        self.last = nn.Linear(12, 5)

    def forward(self, x):
        x = self.clip(self.depthwise(self.clip(self.stem(x))))
        x = self.read(x)
        x = x + self.narrow(self.swish(self.wide(x)))
        return self.last(self.drop(self.relu(self.line1(self.pool(x).flatten(1)))))


GIVING = ["stem", "depthwise.1", "wide", "line1"]


def pictures(count=6):
    return 2 * torch.randn(count, 3, 21, 18, generator=random(0))


def network(scheme="W8A8", activations=None, make=Net):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
    torchquant.quantize_(model, scheme, [pictures()], method="rtn", activations=activations, progress=False)
    return model


@pytest.fixture(scope="module")
def quantized():
    model = network()
    return model, model(pictures())


def passing(quantized, giving=GIVING):
    model = copy.deepcopy(quantized[0])
    assert pass_codes_(model, pictures(2)) == giving
    return model


def types_between(model, x):
    seen = {}
    handles = [
        module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o.dtype))
        for name, module in model.named_modules()
        if name in [*GIVING, "read", "narrow", "last"]
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("example", [lambda x: x, lambda x: (x,), lambda x: {"x": x}], ids=["input", "tuple", "dict"])
def test_codes_pass_and_outputs_stay(quantized, example):
    model, x = copy.deepcopy(quantized[0]), pictures()
    assert pass_codes_(model, example(x)) == GIVING
    torch.testing.assert_close(model(x), quantized[1], rtol=0, atol=0.02 * float(quantized[1].std()))  # SiLU's rounding
    seen = types_between(model, x)
    assert {name for name, dtype in seen.items() if dtype == torch.uint8} == set(GIVING)
    assert type(model.depthwise[0]) is nn.Identity and model.depthwise[1].prepad == [0, 1, 1, 2]
    assert type(model.clip) is PassingCodes and type(model.swish) is PassingCodes
    assert pass_codes_(model, x) == GIVING  # again: nothing new


def test_without_rounding_of_its_own_every_bit_stays():
    class Plain(Net):
        def __init__(self):
            super().__init__()
            self.swish = nn.ReLU()

    model, x = network(make=Plain), pictures()
    before = model(x)
    assert pass_codes_(model, x) == GIVING
    assert_same(model(x), before)


def test_script_export_and_files(quantized, tmp_path):
    model, x = passing(quantized), pictures()
    wanted = model(x)
    assert_same(torch.jit.freeze(scripted(model))(x), wanted)
    assert_same(torch.export.export(model, (x,)).module()(x), wanted)
    assert list(model.state_dict()) == list(quantized[0].state_dict())
    torchquant.save(model, tmp_path / "model")
    loaded = torchquant.load(tmp_path / "model", Net().eval())
    assert_same(loaded(x), quantized[1])
    assert pass_codes_(loaded, x) == GIVING
    assert_same(loaded(x), wanted)


def test_floats_in_training_and_for_gradients(quantized):
    model, x = passing(quantized), pictures()
    model.train()
    assert set(types_between(model, x).values()) == {torch.float32}
    assert types_between(model.eval(), x.requires_grad_())["stem"] == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(quantized, dtype):
    model = passing(quantized).to(dtype)
    assert model.stem.output_scale.dtype == torch.float32
    y = model(pictures().to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), quantized[1], rtol=0.05, atol=0.1)


def test_only_one_grid_can_be_given():
    assert pass_codes_(network(activations=Activations(dynamic=True, granularity="token")), pictures()) == []
    assert pass_codes_(network("W4A16"), pictures()) == []


def test_functions_and_outputs_read_floats():
    class Peeking(Net):
        def forward(self, x):
            x = F.relu(self.stem(x))
            y = self.depthwise(x)
            return y, self.wide(self.read(torch.sigmoid(y)))

    model = network(make=Peeking)
    before = model(pictures())
    assert pass_codes_(model, pictures()) == ["read"]
    for got, wanted in zip(model(pictures()), before, strict=True):
        assert_same(got, wanted)


def test_grids_that_do_not_clip_leave_the_activation_alone(quantized):
    model = copy.deepcopy(quantized[0])
    model.depthwise[1].input_quantizer.zero_point += 3
    model.read.input_quantizer.scale *= 10
    assert pass_codes_(model, pictures()) == ["wide", "line1"]


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.float().exp()


def test_functions_of_autograd_read_floats():
    class Hiding(Net):
        def forward(self, x):
            y = self.stem(x)
            return self.read(y) + Hidden.apply(y)

    assert pass_codes_(network(make=Hiding), pictures()) == []


def test_what_cannot_pass_leaves_the_model_as_it_was(monkeypatch):
    model, x = network(), pictures()
    monkeypatch.setattr("torchquant.pass_codes.TOLERANCE", -1.0)
    before, attributes = model(x), [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ValueError, match="pass_codes_: the model computes something else when its layers give codes"):
        pass_codes_(model, x)
    assert_same(model(x), before)
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert isinstance(model.stem, QConv2d) and model.stem.output_scale is None
    with pytest.raises(ValueError, match="pass_codes_: the model must be in evaluation mode"):
        pass_codes_(model.train(), x)


class Transformer(nn.Module):
    """Two blocks of a ViT, and projections of one input that want the same codes."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*[Block(16, 2, separate=i == 1) for i in range(2)])
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.norm(self.blocks(x)).mean(1))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Separate(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return torch.softmax(q @ k.transpose(1, 2), -1) @ v


class Block(nn.Module):
    def __init__(self, dim, heads, separate):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Separate(dim) if separate else Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def test_layer_norm_gives_codes_to_attention_and_mlp(tmp_path):
    make = lambda: Transformer().eval()  # noqa: E731
    tokens = torch.randn(4, 9, 16, generator=random(2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    torchquant.quantize_(model, "W8A8", [tokens], method="rtn", progress=False)
    norms = [f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)]
    with torch.no_grad():
        wanted = model(tokens)
        assert pass_codes_(model, tokens) == norms
        assert all(type(model.get_submodule(name)) is QLayerNorm for name in norms)
        assert all(model.get_submodule(name)(tokens).dtype == torch.uint8 for name in norms)
        got = model(tokens)
        # Where a LayerNorm's float32 lies at a rounding edge, a code is the next one.
        assert (got - wanted).norm() < 0.01 * wanted.norm()
        assert_same(torch.jit.freeze(scripted(model))(tokens), got)
        assert_same(torch.export.export(model, (tokens,)).module()(tokens), got)
        torchquant.save(model, tmp_path / "model")
        assert_same(torchquant.load(tmp_path / "model", make())(tokens), wanted)
        assert pass_codes_(model, tokens) == norms
        assert_same(model(tokens), got)
    assert model.blocks[0].norm1(tokens).dtype == torch.float32  # its parameters want gradients
