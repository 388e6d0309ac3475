"""Fused transformer blocks: the same as their modules one by one, up to a code that falls the other way."""

import copy

import pytest
import torch
from helpers import assert_same, random, scripted
from nn.test_mlp import Mlp
from small_models import distance, run
from torch import nn

from torchquant import Activations, load, pass_codes_, save
from torchquant.demo.digits_vit import Attention
from torchquant.nn.block import QBlock, fuse_modules
from torchquant.nn.repeat import OperatorCalls

TOKENS = Activations(dynamic=True, granularity="token", symmetric=True, softmax="uniform")


class DropPath(nn.Module):
    def forward(self, x):
        return x * torch.rand(len(x), 1, 1).round() * 2 if self.training else x


class Scale(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((24,), start))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """As timm's."""

    def __init__(self, scale=None, norm=nn.LayerNorm):
        super().__init__()
        self.norm1, self.attn = norm(24), Attention(24, 3)
        self.ls1 = nn.Identity() if scale is None else Scale(scale)
        self.drop_path1 = DropPath()
        self.norm2, self.mlp = norm(24), Mlp()
        self.drop_path2 = nn.Identity()

    def forward(self, x):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class NormsBehind(Block):
    def forward(self, x):
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class WithContext(Block):
    def forward(self, x, context=None):
        return super().forward(x)


class WithWidth(Block):
    def __init__(self):
        super().__init__()
        self.width = 24


BLOCKS = {
    "timm": Block,
    "no weights": lambda: Block(norm=lambda size: nn.LayerNorm(size, elementwise_affine=False)),
    "no bias": lambda: Block(norm=lambda size: nn.LayerNorm(size, bias=False, eps=1e-3)),
}
OTHERS = {
    "norms behind": NormsBehind,
    "a scale": lambda: Block(0.5),
    "a scale that is one": lambda: Block(1.0),
    "another argument": WithContext,
    "an attribute": WithWidth,
    "another norm": lambda: Block(norm=nn.RMSNorm),
}


def inputs(count=3, batch=3, tokens=40):
    return [torch.randn(batch, tokens, 24, generator=random(seed)) for seed in range(count)]


def quantized(make=Block, scheme="W4A8", **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(make(), nn.LayerNorm(24)).eval()
    run(model, scheme, inputs(), method="rtn", **options)
    return model


def one_by_one(model):
    model = copy.deepcopy(model)
    model[0].forward = model[0].unfused
    return model


def operators(model, x):
    with torch.no_grad(), OperatorCalls() as seen:
        found = model(x)
    return [call[0].__name__ for call in seen.calls if call[0].namespace == "torchquant"], found


@pytest.mark.parametrize("activations", [None, TOKENS], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_same_as_one_by_one(name, activations):
    model = quantized(BLOCKS[name], activations=activations)
    with torch.no_grad():
        assert type(model[0]) is QBlock and model[0].fuses(inputs()[0])
    assert distance(model, one_by_one(model), inputs()) < (1e-6 if activations else 1e-2)


def test_codes_from_norms_are_those_of_the_layers_behind():
    model = quantized()
    x = inputs()[0]
    before = operators(model, x)
    passed = pass_codes_(model, x)
    assert {"0.norm1", "0.norm2"} <= set(passed)
    for names, found in (before, operators(model, x)):
        assert names == ["quantized_block.default"]
        assert_same(found, before[1])
    with torch.no_grad():
        assert_same(one_by_one(model)(x), before[1])  # the same kernels one by one


@pytest.mark.parametrize("name", OTHERS)
def test_what_stays(name):
    assert type(quantized(OTHERS[name])[0]) is not QBlock


@pytest.mark.parametrize("ignored", ["0.mlp.fc2", "0.attn.qkv"])
def test_layers_in_floating_point(ignored):
    model = quantized(ignore=[ignored])
    assert "quantized_block.default" not in operators(model, inputs()[0])[0]


def test_attention_in_floating_point_stays():
    model = quantized(scheme="W4A16")
    assert type(model[0]) is Block and operators(model, inputs()[0])[0] == ["quantized_linear.default"] * 2 + [
        "quantized_mlp.default"
    ]


def test_batches_are_those_of_single_sequences():
    model = quantized()
    x = inputs(1, batch=8, tokens=100)[0]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.no_grad():
                assert_same(model(x), torch.cat([model(row) for row in x.split(1)]))
                with torch.inference_mode():
                    assert_same(model(x), model(x.clone()))
    finally:
        torch.set_num_threads(threads)


def test_parts_that_are_observed():
    model, x, seen = quantized(), inputs()[0], []
    with torch.no_grad():
        wanted = one_by_one(model)(x)
        for part in ("norm1", "attn", "attn.qkv", "norm2", "mlp", "mlp.act", "mlp.fc2"):
            handle = model[0].get_submodule(part).register_forward_hook(lambda m, i, o: seen.append(o))
            torch.testing.assert_close(model(x), wanted, rtol=0.1, atol=0.1)
            handle.remove()
    assert len(seen) == 7 and all(o.dtype == torch.float32 for o in seen)


def test_masks_training_and_gradients():
    model, x = quantized(), inputs()[0]
    block = model[0]
    with torch.no_grad():
        wanted = block(x)
        mask = torch.ones(40, 40, dtype=torch.bool)
        torch.testing.assert_close(block(x, mask), wanted, rtol=0.05, atol=0.05)
        assert (block(x, mask.tril()) - wanted).abs().max() > 0.1
        assert_same(block(x, None, True), block.unfused(x, None, True))
    assert not block.fuses(x)  # somebody may ask for the gradients of the norms
    block(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    model.train()
    with torch.no_grad():
        assert not block.fuses(x)
        assert (block(x) - wanted).abs().max() > 0.1  # dropout


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    model, x = quantized(), inputs()[0]
    with torch.no_grad():
        got = copy.deepcopy(model).to(dtype)(x.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), model(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("activations", [None, TOKENS], ids=["static", "dynamic"])
def test_roads(activations, tmp_path):
    model, x = quantized(activations=activations), inputs()[0]
    with torch.no_grad():
        wanted = model(x)
        assert_same(scripted(model)(x), wanted)
        assert_same(torch.jit.trace(model, (x,))(x), wanted)
        assert_same(torch.export.export(model, (x,)).module()(x), wanted)
        assert_same(torch.compile(model, backend="eager", fullgraph=True)(x), wanted)
        assert_same(copy.deepcopy(model)(x), wanted)
        save(model, tmp_path / "saved")
        again = load(tmp_path / "saved", nn.Sequential(Block(), nn.LayerNorm(24)).eval())
        assert type(again[0]) is QBlock and list(again.state_dict()) == list(model.state_dict())
        assert_same(again(x), wanted)


@pytest.mark.parametrize("part", ["0", "0.mlp"])
def test_what_is_observed_before_stays(part):
    seen = []

    def observed():
        block = Block()
        nn.Sequential(block).get_submodule(part).register_forward_hook(lambda m, i, o: seen.append(o))
        return block

    model = quantized(observed)
    seen.clear()
    model(inputs()[0])
    assert type(model[0]) is Block and len(seen) == 1


def test_twice_is_harmless():
    model = quantized()
    before = model[0]
    fuse_modules(model)
    assert model[0] is before
