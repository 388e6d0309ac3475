"""LayerNorm reparameterization: the float function and every code stay the same, and only sound pairs are found."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import random
from nn.attention_models import build, output
from torch import nn

from torchquant.nn import layout, rewrite_attention
from torchquant.nn.quantizers import UniformQuantizer
from torchquant.reparameterize import Norm, reparameterize, reparameterize_all, trace_norms

CHANNELS, TOKENS = 24, 300


def spread_norm(seed=0):
    """A LayerNorm whose channels differ in range by factors, as those of large transformers do."""
    norm = nn.LayerNorm(CHANNELS)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(CHANNELS, generator=random(seed)).mul(0.5).exp())
        norm.weight[:3] *= 10
        norm.bias.copy_(torch.randn(CHANNELS, generator=random(seed + 1)))
    return norm


def linear(outputs=10, bias=True, seed=2):
    layer = nn.Linear(CHANNELS, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, CHANNELS, generator=random(seed)))
    return layer


def tokens(seed=3):
    return torch.randn(TOKENS, CHANNELS, generator=random(seed))


def per_channel(x, bits):
    """Min-max of each channel, integral zero points."""
    low, high = x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    return UniformQuantizer(bits, scale, (-low / scale).round())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_lossless(bits, bias):
    norm, layers, x = spread_norm(), {"q": linear(bias=bias), "v": linear(7, seed=5)}, tokens()
    with torch.no_grad():
        before = norm(x)
        wanted = [layer(before) for layer in layers.values()]
    quantizer = per_channel(before, bits)
    position = before / quantizer.scale + quantizer.zero_point
    tie = (
        position - position.floor() - 0.5
    ).abs() < 1e-4  # another order of float operations may round these otherwise
    shared = reparameterize(Norm("norm", norm, dict(layers)), quantizer)
    with torch.no_grad():
        after = norm(x)
        got = [layer(after) for layer in layers.values()]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))
    assert shared.scale.dim() == 0 and shared.zero_point == shared.zero_point.round()
    codes, others = quantizer.codes(before), shared.codes(after)
    assert torch.equal(codes[~tie], others[~tie]) and tie.float().mean() < 0.01
    assert codes.unique().numel() >= 0.9 * 2**bits
    # So the layers get the same numbers, up to the float arithmetic that rescales them.
    same = (shared(after) - shared.zero_point * 0) * (quantizer.scale / shared.scale)
    shift = quantizer.scale * (quantizer.zero_point - shared.zero_point)
    torch.testing.assert_close((same - shift)[~tie], quantizer(before)[~tie], rtol=1e-4, atol=1e-4)


def test_as_published_the_zero_point_is_fractional_and_levels_are_too_many():
    norm, x, bits = spread_norm(), tokens(), 4
    with torch.no_grad():
        before = norm(x)
    quantizer = per_channel(before, bits)
    scale, zero = quantizer.scale.mean(), quantizer.zero_point.mean()
    moved = (before + quantizer.scale * (quantizer.zero_point - zero)) / (quantizer.scale / scale)
    codes = ((moved / scale).round() + zero).clamp(0, 2**bits - 1)
    assert codes.unique().numel() == 2**bits + 1


def test_parameters_are_replaced_and_old_ones_untouched():
    norm, layer = spread_norm(), linear()
    old = [norm.weight, norm.bias, layer.weight, layer.bias]
    values = [p.detach().clone() for p in old]
    layer.weight.requires_grad_(False)
    with torch.no_grad():
        quantizer = per_channel(norm(tokens()), 4)
    reparameterize(Norm("norm", norm, {"fc": layer}), quantizer)
    assert all(new is not was for new, was in zip([norm.weight, norm.bias, layer.weight, layer.bias], old, strict=True))
    assert all(torch.equal(was, value) for was, value in zip(old, values, strict=True))
    assert not layer.weight.requires_grad and layer.bias.requires_grad


def test_hf_conv1d():
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, CHANNELS)
    norm, x = spread_norm(), tokens()
    with torch.no_grad():
        wanted = layer(norm(x))
        reparameterize(Norm("norm", norm, {"fc": layer}), per_channel(norm(x), 4))
        torch.testing.assert_close(layer(norm(x)), wanted, rtol=1e-5, atol=1e-5)


# --- finding pairs ---


class Block(nn.Module):
    """q and v share a LayerNorm, through moves and dropout; the tail's output is averaged over tokens."""

    def __init__(self):
        super().__init__()
        self.first, self.second = spread_norm(), spread_norm(7)
        self.q, self.v, self.fc = linear(CHANNELS), linear(CHANNELS, seed=8), linear(5, seed=9)

    def forward(self, x):
        y = F.dropout(self.first(x.view(-1, 10, CHANNELS)), 0.1, training=False)
        y = y.reshape(-1, 5, 2, CHANNELS).permute(0, 2, 1, 3).flatten(0, 1)
        y = torch.roll(y, 1, dims=1)
        y = self.second((self.q(y) * self.v(y)).sigmoid() + x[:CHANNELS].mean())
        return self.fc(y.mean(1))


def find(model, x, names=None):
    layers = {n: m for n, m in model.named_modules() if layout.is_quantizable(m) and (names is None or n in names)}
    with torch.no_grad():
        return trace_norms(model, layers, lambda m: m(x))


def test_pairs_are_found_through_what_only_moves_tokens():
    found = find(Block().eval(), tokens())
    assert {name: sorted(norm.layers) for name, norm in found.items()} == {"first": ["q", "v"], "second": ["fc"]}
    assert not any(norm.reason for norm in found.values())


def test_reparameterizing_what_was_found_keeps_the_function():
    model, x = Block().eval(), tokens()
    before = copy.deepcopy(model)
    found = find(model, x)
    ranges = {"first": torch.linspace(0.01, 1.0, CHANNELS), "second": torch.logspace(-2, 1, CHANNELS)}
    quantizers = {
        layer: UniformQuantizer(4, ranges[name], torch.arange(CHANNELS) % 13)
        for name, norm in found.items()
        for layer in norm.layers
    }
    done = reparameterize_all(found, quantizers)
    assert {name: sorted(layers) for name, layers in done.items()} == {"first": ["q", "v"], "second": ["fc"]}
    assert all(quantizer.scale.dim() == 0 for quantizer in quantizers.values())
    assert quantizers["q"] is not quantizers["v"] and torch.equal(quantizers["q"].scale, quantizers["v"].scale)
    with torch.no_grad():
        torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-4)
    assert not torch.equal(model.first.weight, before.first.weight)


def shared_quantizers(**others):
    same = {name: UniformQuantizer(4, torch.linspace(0.1, 1.0, CHANNELS), torch.arange(CHANNELS) % 7) for name in "qv"}
    return same | others


def test_layers_behind_one_norm_share_its_quantizer_or_it_stays():
    model, x = Block().eval(), tokens()
    weight = model.first.weight
    for other in (
        UniformQuantizer(6, torch.linspace(0.1, 1.0, CHANNELS), torch.arange(CHANNELS) % 7),
        UniformQuantizer(4, torch.linspace(0.2, 1.0, CHANNELS), torch.arange(CHANNELS) % 7),
        UniformQuantizer(4, torch.tensor(0.1), torch.tensor(3.0)),
    ):
        quantizers = shared_quantizers(v=other)
        assert not reparameterize_all(find(model, x), quantizers)
        assert quantizers["v"] is other and model.first.weight is weight


def test_a_layer_with_float_inputs_behind_the_same_norm_absorbs_too():
    model, x = Block().eval(), tokens()
    before, quantizers = copy.deepcopy(model), shared_quantizers()
    del quantizers["v"]
    assert reparameterize_all(find(model, x), quantizers) == {"first": ["q", "v"]}
    assert set(quantizers) == {"q"}
    with torch.no_grad():
        torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-4)


class Unsound(nn.Module):
    """One module for each reason why a LayerNorm must stay."""

    def __init__(self, case):
        super().__init__()
        self.case, self.norm, self.other = case, spread_norm(), spread_norm(5)
        self.fc, self.more = linear(CHANNELS), linear(CHANNELS, seed=6)
        if case == "no bias":
            self.norm = nn.LayerNorm(CHANNELS, bias=False)

    def forward(self, x):
        y = self.norm(x)
        z = self.fc(y)
        if self.case == "residual":
            return z + y
        if self.case == "returned":
            return z, y[:1]
        if self.case == "two inputs":
            return z + self.fc(x)
        if self.case == "two norms":
            return z + self.fc(self.other(x))
        if self.case == "mixed channels":
            return z + self.more(y.flip(-1))
        if self.case == "float layer":
            return z + self.more(y)
        return z.sum(-1) if self.case == "no bias" else z


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("residual", "its output also goes to add"),
        ("returned", "its output also goes to the model's output"),
        ("two inputs", "its output also goes to fc, which also gets other inputs"),
        ("two norms", "its output also goes to fc, which also gets other inputs"),
        ("mixed channels", "its output also goes to flip"),
        ("float layer", "its output also goes to linear"),
        ("no bias", "it has no weight or no bias"),
    ],
)
def test_what_must_stay(case, reason):
    found = find(Unsound(case), tokens(), names={"fc"} if case == "float layer" else None)
    assert found["norm"].reason == reason
    quantizers = {"fc": UniformQuantizer(4, torch.ones(CHANNELS), torch.zeros(CHANNELS))}
    before = found["norm"].module.weight
    assert not reparameterize_all({"norm": found["norm"]}, quantizers)
    assert found["norm"].module.weight is before


def test_a_norm_that_reaches_no_layer():
    found = find(nn.Sequential(nn.LayerNorm(CHANNELS), nn.GELU(), linear()), tokens())
    assert found["0"].reason == "its output goes to gelu"


def test_convolutions_are_no_partners():
    model = nn.Sequential(nn.LayerNorm(CHANNELS), nn.Conv1d(10, 4, 1))
    found = find(model, tokens().view(-1, 10, CHANNELS))
    assert found["0"].reason == "its output also goes to 1, which is no linear layer"


PAIRS = {  # model -> how many LayerNorms feed layers alone
    "demo ViT": 5,  # the last one through a mean over tokens
    "timm ViT": 5,  # the last one through a token that is picked out
    "timm Swin": 10,
    "torchvision ViT": 5,
    "torchvision Swin": 5,  # those before attention go through real padding
    "HF ViT": 5,
    "HF Swin": 9,
    "HF BERT": 1,  # post-norm: all others are residuals too
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_real_architectures(name):
    model, inputs = build(name)
    rewrite_attention(model)
    wanted = output(model, inputs)
    layers = {n: m for n, m in model.named_modules() if layout.is_quantizable(m)}
    with torch.no_grad():
        found = trace_norms(model, layers, lambda m: m(**inputs))
    sound = {key: norm for key, norm in found.items() if not norm.reason}
    assert len(sound) == PAIRS[name], {key: norm.reason for key, norm in found.items() if norm.reason}
    quantizers = {
        layer: UniformQuantizer(
            4, torch.linspace(0.5, 2.0, norm.module.weight.numel()), torch.arange(norm.module.weight.numel()) % 5
        )
        for norm in sound.values()
        for layer in norm.layers
    }
    reparameterize_all(found, quantizers)
    torch.testing.assert_close(output(model, inputs), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
