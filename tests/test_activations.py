"""What calibration shows of activations, and the quantizers that are chosen from it."""

import math

import pytest
import torch
from helpers import random
from torch import nn

from torchquant.activations import (
    Observations,
    Site,
    add_values,
    attention_error,
    choose_quantizer,
    choose_quantizers,
    describe,
    merged,
    observe,
    quantizing_inputs,
    relative_error,
    softmax_quantizer,
)
from torchquant.calibrate import Calibration
from torchquant.config import Activations
from torchquant.nn.quantizers import DynamicQuantizer, TableQuantizer, UniformQuantizer
from torchquant.statistics import histogram_accumulate_, new_histogram

CHANNELS = 12


def values(seed=0, shape=(64, CHANNELS)):
    spread = torch.logspace(-1, 1, CHANNELS)
    return torch.randn(shape, generator=random(seed)) * spread + spread / 2


def site(kind="input", bits=4, module=None):
    return Site("fc", kind, bits, module or nn.Linear(CHANNELS, 3))


def histogram(x, axis=None):
    found = new_histogram(None if axis is None else x.shape[axis])
    histogram_accumulate_(found, x, axis=-1 if axis is None else axis)
    return found


class Net(nn.Module):
    """A LayerNorm that feeds a layer, one that does not, a convolution and a layer that is never reached."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv1d(3, CHANNELS, 1), nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 4)
        self.head, self.idle = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.fc(self.norm(self.conv(x).transpose(1, 2))).relu())


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().eval()
        nn.init.normal_(model.norm.weight)
    return model


def observed(**options):
    model = net()
    layers = {name: module for name, module in model.named_children() if name != "norm"}
    sites = {name: Site(name, "input", 4, module) for name, module in layers.items()}
    batches = [torch.randn(4, 3, 7, generator=random(seed)) for seed in range(3)]
    with torch.no_grad():
        return model, sites, observe(model, sites, layers, Calibration(batches), **options), batches


def test_one_pass_shows_histograms_order_and_norms():
    model, _, found, batches = observed()
    assert set(found.histograms) == {"conv", "fc", "head"}
    assert found.order == ["conv", "fc", "head"]
    assert found.histograms["conv"].dim() == 2 and found.histograms["conv"][0].sum() == 3 * 4 * 3 * 7
    assert found.histograms["fc"].shape[0] == CHANNELS  # behind a LayerNorm: a histogram for each channel
    assert found.feeding().keys() == {"fc"}
    with torch.no_grad():
        x = torch.cat([model.norm(model.conv(batch).transpose(1, 2)) for batch in batches])
    torch.testing.assert_close(found.histograms["fc"][:, 1].sum(-1), x.double().sum((0, 1)), rtol=1e-5, atol=1e-5)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


class Siblings(nn.Module):
    """q and k receive one tensor; v receives it too, but for what ``apart`` says of the second call."""

    def __init__(self, apart):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(CHANNELS, 4) for _ in range(3))
        self.apart, self.calls = apart, 0

    def forward(self, x):
        self.calls += 1
        y = self.q(x) + self.k(x)
        if self.calls % 2 == 1 or self.apart == "never":
            return y + self.v(x)
        return y if self.apart == "not called" else y + self.v(2 * x)


@pytest.mark.parametrize(("apart", "factor"), [("never", 1), ("another tensor", 2), ("not called", 0)])
def test_siblings_share_a_histogram_while_they_see_the_same(apart, factor):
    model = Siblings(apart)
    layers = dict(model.named_children())
    sites = {name: Site(name, "input", 4, module) for name, module in layers.items()}
    found = observe(model, sites, layers, Calibration(iter([values(0), values(1)]))).histograms
    assert (found["v"] is found["q"]) == (apart == "never")
    assert torch.equal(found["q"], found["k"])
    assert torch.equal(found["q"][0], histogram(torch.cat([values(0), values(1)]))[0])
    assert found["v"][1].sum() == pytest.approx(float((values(0) + factor * values(1)).double().sum()), rel=1e-5)


def test_a_histogram_for_each_channel_on_request():
    _, sites, found, _ = observed(granularity="channel")
    assert [found.histograms[name].shape[0] for name in ("conv", "fc", "head")] == [3, CHANNELS, 4]
    assert sites["conv"].axis == -2


def test_choice_by_kind():
    _, sites, found, _ = observed()
    chosen = choose_quantizers(found, sites, Activations())
    assert {name: tuple(q.scale.shape) for name, q in chosen.items()} == {"conv": (), "fc": (CHANNELS,), "head": ()}
    plain = choose_quantizers(found, sites, Activations(reparameterize=False))
    assert plain["fc"].scale.shape == ()
    wide = choose_quantizers(*[observed(granularity="channel")[i] for i in (2, 1)], Activations(granularity="channel"))
    assert wide["conv"].scale.shape == (3,) and wide["conv"].axis == -2
    dynamic = choose_quantizers(found, sites, Activations(dynamic=True, granularity="token"))
    assert all(isinstance(q, DynamicQuantizer) for q in dynamic.values())
    assert dynamic["fc"].granularity == "token" and dynamic["conv"].granularity == "tensor"


@pytest.mark.parametrize("rule", ["minmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_range_rules(rule, symmetric):
    x = values()
    options = Activations(range=rule, symmetric=symmetric, percentile=0.95)
    quantizer = choose_quantizer(site(), histogram(x), options)
    low, high = quantizer.bounds()
    assert quantizer.zero_point == quantizer.zero_point.round()
    if rule == "minmax":
        step = float(quantizer.scale)
        assert low <= float(x.min()) + step and high >= float(x.max()) - step
    else:
        assert high - low < float(x.max() - x.min())
    if symmetric:
        assert quantizer.zero_point == 8


def test_mse_is_never_worse_than_minmax():
    for seed in range(4):
        found = histogram(values(seed))
        errors = [
            relative_error(choose_quantizer(site(), found, Activations(range=r)), found) for r in ("mse", "minmax")
        ]
        assert errors[0] <= errors[1] * (1 + 1e-9)


@pytest.mark.parametrize(("choice", "kind"), [("sulq", "sulq"), ("log2", "log2"), ("log_sqrt2", "log_sqrt2")])
def test_softmax_by_name(choice, kind):
    probabilities = values(shape=(8, 5, CHANNELS)).softmax(-1)
    quantizer = softmax_quantizer(histogram(probabilities), 4, choice)
    assert isinstance(quantizer, TableQuantizer) and quantizer.name == kind
    assert quantizer(torch.zeros(1)) == 0
    assert relative_error(quantizer, histogram(probabilities)) < 0.35


def test_softmax_uniform_and_auto():
    probabilities = values(shape=(8, 5, CHANNELS)).softmax(-1)
    found = histogram(probabilities)
    uniform = softmax_quantizer(found, 4, "uniform")
    assert isinstance(uniform, UniformQuantizer) and uniform.zero_point == 0
    auto = softmax_quantizer(found, 4, "auto")
    named = [softmax_quantizer(found, 4, name) for name in ("sulq", "log2", "log_sqrt2", "uniform")]
    assert attention_error(auto, found) == min(attention_error(quantizer, found) for quantizer in named)
    per_channel = softmax_quantizer(histogram(probabilities, -1), 4, "auto")  # behind no LayerNorm, but on request
    assert per_channel.name == auto.name


def attention_like(seed=0):
    """Rows of softmax weights with a few large and many small ones."""
    return (2 * torch.randn(400, 36, generator=random(seed))).softmax(-1)


@pytest.mark.parametrize(("bits", "names"), [(3, {"sulq", "log2"}), (4, {"log_sqrt2"}), (8, {"uniform"})])
def test_auto_is_chosen_by_the_error_of_what_attention_gives(bits, names):
    weights = attention_like()
    found = histogram(weights)
    auto = softmax_quantizer(found, bits, "auto")
    assert auto.name in names
    values = torch.randn(36, 64, generator=random(1)) + torch.randn(64, generator=random(2))  # means as large as spread

    def error(quantizer):
        return float(((quantizer(weights) - weights) @ values).square().mean())

    others = [error(softmax_quantizer(found, bits, name)) for name in ("sulq", "log2", "log_sqrt2", "uniform")]
    assert error(auto) <= 1.15 * min(others)
    change = auto(weights) - weights
    wanted = float(change.square().mean()) + 36 * float(change.mean()) ** 2
    assert attention_error(auto, found) == pytest.approx(wanted, rel=0.05 if bits < 8 else 0.3)  # steps as fine as bins


@pytest.mark.parametrize("axis", [None, -1])
def test_relative_error_is_that_of_the_values(axis):
    x = values(3, (4096, CHANNELS))
    found = histogram(x, axis)
    quantizer = choose_quantizer(site(bits=3), found, Activations(), per_channel=axis is not None)
    wanted = float((quantizer(x) - x).norm() / x.norm())
    assert relative_error(quantizer, found) == pytest.approx(wanted, rel=0.02)


def test_relative_error_for_channels_of_pictures():
    x = values(4, (6, 5, 7, CHANNELS)).permute(0, 3, 1, 2)
    conv = nn.Conv2d(CHANNELS, 2, 3)
    found = histogram(x, 1)
    quantizer = choose_quantizer(site(module=conv), found, Activations(granularity="channel"))
    assert quantizer.axis == -3
    assert relative_error(quantizer, found) == pytest.approx(float((quantizer(x) - x).norm() / x.norm()), rel=0.02)


def test_relative_error_where_there_is_none_to_tell():
    found = histogram(values())
    assert math.isnan(relative_error(DynamicQuantizer(4), found))
    zero = histogram(torch.zeros(10))
    assert relative_error(choose_quantizer(site(), zero, Activations()), zero) == 0
    report = describe(site(), DynamicQuantizer(4), found)
    assert (report.quantizer, report.bits, report.kind) == ("dynamic", 4, "input") and math.isnan(report.low)


def test_channels_without_values_take_the_others_scale():
    x = values()
    x[:, 3] = 0
    quantizer = choose_quantizer(site(), histogram(x, -1), Activations(range="minmax"), per_channel=True)
    rest = [i for i in range(CHANNELS) if i != 3]
    assert quantizer.scale[3] == pytest.approx(float(quantizer.scale[rest].mean()))
    assert torch.equal(quantizer(x)[:, 3], torch.zeros(len(x)))
    dead = choose_quantizer(site(), histogram(torch.zeros(4, 3), -1), Activations(), per_channel=True)
    assert torch.equal(dead(torch.zeros(4, 3)), torch.zeros(4, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    found = {}
    add_values(found, site(), values().to(dtype), False)
    assert found["fc"][0].sum() == 64 * CHANNELS


def test_bad_activations_are_named():
    x = values()
    x[0, 0] = float("nan")
    with pytest.raises(ValueError, match="calibration: the input of layer 'fc' holds NaN or Inf"):
        add_values({}, site(), x, False)
    with pytest.raises(ValueError, match="calibration: activation 'fc': histogram_accumulate_"):
        add_values({"fc": new_histogram(5)}, site(), values(), True)


def test_merged_adds_channels():
    x = values()
    assert torch.equal(merged(histogram(x, -1))[0], histogram(x)[0].view(4096, -1).sum(-1))
    assert merged(histogram(x)).dim() == 2


def test_nothing_is_observed_without_tokens():
    assert not choose_quantizers(Observations(), {}, Activations())


def test_quantizing_inputs_inside_only():
    model = nn.Sequential(nn.Linear(CHANNELS, 4))
    quantizer = UniformQuantizer(2, torch.tensor(2.0), torch.tensor(1.0))
    x = values().requires_grad_()
    plain = model(x)
    with quantizing_inputs(model, {"0": quantizer}):
        assert torch.equal(model(x), model[0].forward(quantizer(x)))
    with quantizing_inputs(model, {"0": quantizer}, straight_through=True):
        y = model(x)
    torch.testing.assert_close(y, model(quantizer(x)))
    y.sum().backward()
    assert torch.equal(x.grad != 0, quantizer.inside(x.detach()))
    assert torch.equal(model(x), plain) and not model[0]._forward_pre_hooks
