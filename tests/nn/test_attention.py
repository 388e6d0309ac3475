"""Rewritten attention computes what the float modules compute, and its four points are where they should be."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import scripted
from nn.attention_models import MODELS, build, library, output
from torch import nn

from torchquant.nn import QAttention, rewrite_attention
from torchquant.nn.attention import QFunctionalAttention, QMultiheadAttention
from torchquant.nn.attention_product import POINTS


@pytest.mark.parametrize("name", MODELS)
def test_same_function_by_every_class(name):
    model, inputs = build(name)
    wanted = output(model, inputs)
    found = rewrite_attention(model)
    assert found.modules and not found.left
    assert {type(module).__name__ for module in found.modules.values()} == {MODELS[name][1]}
    assert all(model.get_submodule(where) is module for where, module in found.modules.items())
    torch.testing.assert_close(output(model, inputs), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_every_operand_passes_its_point(name):
    model, inputs = build(name)
    found = rewrite_attention(model)
    reached = {}
    for where, module in found.modules.items():
        for point in POINTS:
            hook = lambda m, args, out, key=(where, point): reached.setdefault(key, args[0])  # noqa: E731
            getattr(module.product, point).register_forward_hook(hook)
    output(model, inputs)
    assert reached.keys() == {(where, point) for where in found.modules for point in POINTS}
    for where in found.modules:
        rows = reached[where, "softmax"].sum(-1)
        torch.testing.assert_close(rows, torch.ones_like(rows))
        assert reached[where, "query"].shape[-1] == reached[where, "value"].shape[-1]


@pytest.mark.parametrize("name", [name for name, (_, kind) in MODELS.items() if kind != "QMultiheadAttention"])
def test_names_of_the_state_stay(name):
    model, _ = build(name)
    before = set(model.state_dict())
    rewrite_attention(model)
    assert set(model.state_dict()) == before


@pytest.mark.parametrize("name", ["demo ViT", "encoder", "timm ViT", "timm Swin", "torchvision Swin"])
def test_script(name):
    model, _ = build(name)
    attention = next(iter(rewrite_attention(model).modules.values()))
    shape = {"timm Swin": (8, 49, 16), "torchvision Swin": (2, 15, 13, 16)}.get(name, (2, 5, 24))
    x = (torch.randn(shape),) * (3 if name == "encoder" else 1)
    for got, wanted in zip(scripted(attention)(*x), attention(*x), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", ["demo ViT", "timm Swin", "torchvision Swin", "HF ViT", "HF Swin"])
def test_export_copy_and_pickle(name):
    model, inputs = build(name)
    rewrite_attention(model)
    wanted = output(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(other, inputs), wanted)
    exported = torch.export.export(model, (), kwargs=inputs)
    torch.testing.assert_close(output(exported.module(), inputs), wanted)


@pytest.mark.parametrize("name", ["demo ViT", "HF ViT"])
def test_compiles_in_one_graph(name):
    model, _ = build(name)
    attention = next(iter(rewrite_attention(model).modules.values()))
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        compiled, wanted = torch.compile(attention, fullgraph=True, backend="aot_eager")(x), attention(x)
    torch.testing.assert_close(compiled, wanted)


def test_training_mode_and_gradients_stay():
    model, inputs = build("demo ViT")
    model.train()
    rewrite_attention(model)
    assert all(module.training for module in model.modules())
    model(**inputs).sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_twice_is_harmless():
    model, _ = build("demo ViT")
    first = rewrite_attention(model)
    assert len(first.modules) == 2
    assert not rewrite_attention(model).modules


# --- nn.MultiheadAttention ---


def multihead(**options):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, **options).eval()
    for bias in (attention.out_proj.bias, attention.in_proj_bias):
        if bias is not None:
            nn.init.normal_(bias)
    return attention


def tokens(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def assert_same_outputs(attention, *args, **kwargs):
    ours = QMultiheadAttention(attention).eval()
    with torch.no_grad():
        for got, wanted in zip(ours(*args, **kwargs), attention(*args, **kwargs), strict=True):
            if wanted is None:
                assert got is None
            else:
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}, {"dropout": 0.5}])
@pytest.mark.parametrize("call", [{}, {"need_weights": False}, {"average_attn_weights": False}])
def test_multihead_self_attention(options, call):
    x = tokens(4, 2, 12)
    assert_same_outputs(multihead(**options), x, x, x, **call)


def test_multihead_cross_attention_with_sizes_of_their_own():
    q, k, v = tokens(4, 2, 12), tokens(5, 2, 7), tokens(5, 2, 9)
    assert_same_outputs(multihead(kdim=7, vdim=9), q, k, v)


def test_multihead_without_a_batch():
    x = tokens(4, 12)
    assert_same_outputs(multihead(), x, x, x)
    assert_same_outputs(multihead(batch_first=True), x, x, x, average_attn_weights=False)


CAUSAL = torch.ones(4, 4, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 4, [False, False, False, True]])


@pytest.mark.parametrize("attn_mask", [None, CAUSAL, tokens(4, 4), tokens(6, 4, 4), tokens(6, 4, 4) > 1.5])
@pytest.mark.parametrize("key_padding_mask", [None, PADDING, tokens(2, 4)])
def test_multihead_masks(attn_mask, key_padding_mask):
    if attn_mask is not None and key_padding_mask is not None and attn_mask.dtype != key_padding_mask.dtype:
        pytest.skip("nn.MultiheadAttention deprecates masks of two kinds")
    x = tokens(4, 2, 12)
    assert_same_outputs(multihead(), x, x, x, attn_mask=attn_mask, key_padding_mask=key_padding_mask)


def test_multihead_causal_hint():
    x, float_causal = tokens(4, 2, 12), torch.zeros(4, 4).masked_fill(CAUSAL, float("-inf"))
    assert_same_outputs(multihead(), x, x, x, attn_mask=float_causal, is_causal=True, need_weights=False)
    with pytest.raises(ValueError, match="QMultiheadAttention: is_causal needs an attn_mask"):
        QMultiheadAttention(multihead())(x, x, x, is_causal=True)


# --- the product ---


@pytest.mark.parametrize("mask", [None, tokens(5, 6), tokens(2, 1, 5, 6) > 0])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_product_is_scaled_dot_product_attention(mask, scale):
    q, k, v = tokens(2, 3, 5, 8), tokens(2, 3, 6, 8), tokens(2, 3, 6, 4)
    if mask is not None and mask.dtype == torch.bool:
        mask[0, 0, 2] = False  # a row in which nobody takes part
    got = QAttention()(q, k, v, mask, scale)[0]
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale))
    causal = QAttention()(q, k, v, is_causal=True)[0]
    torch.testing.assert_close(causal, F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_product_without_tokens_and_with_nan():
    q = torch.zeros(0, 3, 5, 8)
    assert QAttention()(q, q, q)[0].shape == q.shape
    bad = tokens(1, 1, 5, 8)
    bad[0, 0, 0, 0] = float("nan")
    assert QAttention()(bad, bad, bad, torch.zeros(5, 5))[0].isnan().any()


def test_window_attention_with_a_mask():
    library("timm")
    model, _ = build("timm Swin")
    attention = model.layers[0].blocks[0].attn
    x, mask = tokens(8, 49, 16), torch.where(tokens(4, 49, 49) > 1, -100.0, 0.0)
    wanted = attention(x, mask)
    rewrite_attention(model)
    torch.testing.assert_close(model.layers[0].blocks[0].attn(x, mask), wanted, rtol=1e-5, atol=1e-6)


# --- modules of one's own ---


class Own(nn.Module):
    """Fits no known shape; its forward uses a method and a property."""

    def __init__(self):
        super().__init__()
        self.to_qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    @property
    def heads(self):
        return 2

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x):
        q, k, v = map(self.split, self.to_qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class OwnSoftmaxAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x):
        return torch.softmax(x @ x.transpose(1, 2), -1) @ self.mix(x)


def test_modules_of_ones_own():
    model, x = nn.Sequential(Own(), OwnSoftmaxAttention()), tokens(2, 5, 8)
    wanted = model(x)
    found = rewrite_attention(model)
    assert isinstance(model[0], QFunctionalAttention) and repr(model[0]).startswith("QFunctionalAttention(\n  Own")
    assert found.left == {
        "1": "OwnSoftmaxAttention computes attention in its own way, not by F.scaled_dot_product_attention"
    }
    torch.testing.assert_close(model(x), wanted)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_what_stays_says_why():
    class Subclass(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    model = nn.ModuleDict({"bias": nn.MultiheadAttention(8, 2, add_bias_kv=True), "sub": Subclass(8, 2), "own": Own()})
    found = rewrite_attention(model, skip=["own"])
    assert found.left == {
        "bias": "add_bias_kv and add_zero_attn are not supported",
        "sub": "Subclass has a forward() of its own",
    }
    assert not found.modules
    assert rewrite_attention(Own()).left == {"": "the model is itself this attention module: wrap it in nn.Sequential"}


def test_an_attention_implementation_that_is_not_supported():
    model, _ = build("HF ViT")
    model.config._attn_implementation = "flex_attention"
    left = rewrite_attention(model).left
    assert "attention implementation 'flex_attention' is not supported" in next(iter(left.values()))
