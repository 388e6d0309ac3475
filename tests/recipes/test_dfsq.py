"""DFSQ on small super-resolution networks: which layers, what they compute, what the choice of levels promises."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import random, scripted
from torch import nn

import torchquant
from torchquant.calibrate import Calibration
from torchquant.nn import QConv2d
from torchquant.nn.quantizers import SubsetQuantizer
from torchquant.quantizers import subset_universe
from torchquant.recipes.dfsq import body_layers, dfsq


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(x)))


class Network(nn.Module):
    """EDSR's shape."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(Block(channels), Block(channels))
        self.up = nn.Sequential(nn.Conv2d(channels, 4 * channels, 3, padding=1), nn.PixelShuffle(2))
        self.tail = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x):
        x = self.head(x)
        return self.tail(self.up(x + self.body(x)))


class Interpolating(nn.Module):
    """ESRGAN's shape: the trunk's last layer is followed by an interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.trunk, self.wide = (
            nn.Conv2d(3, 5, 3, padding=1),
            nn.Conv2d(5, 5, 3, padding=1),
            nn.Conv2d(5, 9, 1),
        )
        self.narrow, self.up, self.last = (
            nn.Conv2d(9, 5, 1),
            nn.Conv2d(5, 5, 3, padding=1),
            nn.Conv2d(5, 3, 3, padding=1),
        )

    def forward(self, x):
        x = self.narrow(F.leaky_relu(self.wide(self.trunk(self.first(x)))))
        return self.last(self.up(F.interpolate(x, scale_factor=2)))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 5, 3, padding=1), nn.PReLU(), nn.Conv2d(5, 5, 3, padding=1), nn.PReLU(),
            nn.ConvTranspose2d(5, 4, 4, 2, 1), nn.Conv2d(4, 1, 3, padding=1),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


BODY = ["body.0.conv1", "body.0.conv2", "body.1.conv1", "body.1.conv2"]


def network(make=Network) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def pictures(count: int = 6, side: int = 12, channels: int = 3) -> torch.Tensor:
    """Smooth, as pictures are."""
    noise = torch.rand(count, channels, side + 4, side + 4, generator=random(1))
    return F.avg_pool2d(noise, 5, 1)


def relative_error(model: nn.Module, wanted: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - wanted(x)).norm() / (wanted(x) - wanted(x).mean()).norm())


@pytest.mark.parametrize(
    ("make", "channels", "body"),
    [(Network, 3, BODY), (Interpolating, 3, ["trunk", "wide", "narrow"]), (Transposed, 1, ["layers.2"])],
)
def test_head_tail_and_upsampler_are_left(make, channels, body):
    model, x = network(make), pictures(channels=channels)
    assert body_layers(model, Calibration([x, x])) == body
    dfsq(model, [x], progress=False)
    assert [name for name, m in model.named_modules() if isinstance(m, QConv2d)] == body
    quantizers = [m for m in model.modules() if isinstance(m, SubsetQuantizer)]
    assert len(quantizers) == len(body)


def test_layers_can_be_named():
    model = network()
    report = dfsq(model, [pictures()], body=["re:body.0.*"], progress=False)
    assert [layer.name for layer in report.layers] == BODY[:2]
    with pytest.raises(ValueError, match="body: 'trunk' matches no layer"):
        dfsq(network(), [pictures()], body=["trunk"], progress=False)
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3))
    with pytest.raises(ValueError, match="dfsq: Sequential has no convolution between head and upsampler; name the"):
        dfsq(flat, [pictures()], progress=False)
    assert type(flat[0]) is nn.Conv2d


def by_hand(x: torch.Tensor, levels: torch.Tensor, centre: bool) -> torch.Tensor:
    """The paper's formula, one channel of one sample at a time, in float64."""
    out = torch.empty_like(x, dtype=torch.float64)
    for sample in range(x.shape[0]):
        for channel in range(x.shape[1]):
            values = x[sample, channel].double()
            mean = values.mean() if centre else torch.zeros((), dtype=torch.float64)
            magnitude = (values - mean).abs().amax() + 1e-8
            normal = (values - mean) / magnitude
            nearest = (normal[..., None] - levels[channel].double()).abs().argmin(-1)
            out[sample, channel] = levels[channel].double()[nearest] * magnitude + mean
    return out


@pytest.mark.parametrize("fallback", [True, False])
def test_a_layer_computes_the_papers_formula(fallback):
    model, wanted, x = network(), network(), pictures()
    dfsq(model, [x], "W4A4", fallback=fallback, progress=False)
    block = model.body[0]
    kept = {}
    hooks = [conv.register_forward_pre_hook(lambda m, a: kept.update({m: a[0]})) for conv in (block.conv1, block.conv2)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    assert block.conv1.input_quantizer.centre and not block.conv2.input_quantizer.centre  # before and after a ReLU
    for conv, original in ((block.conv1, wanted.body[0].conv1), (block.conv2, wanted.body[0].conv2)):
        quantizer = conv.input_quantizer
        assert quantizer.levels.shape == (6, 16) and (quantizer.levels == 0).any(1).all()
        if not fallback:
            assert torch.isin(quantizer.levels, subset_universe("dfsq")).all()
        expected = by_hand(kept[conv], quantizer.levels, quantizer.centre)
        got = quantizer(kept[conv])
        close = (got.double() - expected).abs() < 1e-5 * kept[conv].abs().max()
        assert close.double().mean() > 0.995  # ties of float32
        rows = original.weight.detach().flatten(1)
        step = (rows.amax(1) - rows.amin(1)) / 15  # min-max, one scale an output channel
        assert ((conv.weight.flatten(1) - rows).abs().amax(1) <= 0.5001 * step).all()
        output = F.conv2d(got, conv.weight, conv.bias, padding=1)
        torch.testing.assert_close(conv(kept[conv]), output)


def test_error_falls_with_bits_and_the_float_model_returns():
    wanted, x = network(), pictures()
    errors = []
    for scheme in ("W2A2", "W4A4", "W6A6", "W8A8"):
        model = network()
        report = dfsq(model, [x[:4], x[4:]], scheme, progress=False)
        assert len(report.layers) == len(report.activations) == 4 and report.not_ok == 0
        errors.append(relative_error(model, wanted, x))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02


def test_the_report_has_both_kinds_of_levels():
    reports = {scheme: dfsq(network(), [pictures()], scheme, progress=False) for scheme in ("W3A3", "W8A8")}
    for report in reports.values():
        for name in BODY:
            found = report.details["subset"][name]
            assert found["chosen"] <= min(found["subset"], found["uniform"]) * (1 + 1e-12)
            assert found["channels"] == 6
            line = report.activation(name)
            assert line.error == pytest.approx(math.sqrt(found["chosen"]))
            assert line.quantizer.startswith("subset" if found["uniform channels"] < 6 else "uniform")
    assert sum(found["uniform channels"] for found in reports["W8A8"].details["subset"].values()) >= 20
    assert sum(found["uniform channels"] for found in reports["W3A3"].details["subset"].values()) <= 4


def test_exact_selection_is_below_the_published_one_on_every_layer():
    exact, published = (
        dfsq(network(), [pictures()], "W4A4", selector=selector, fallback=False, progress=False).details["subset"]
        for selector in ("exact", "kmeans")
    )
    assert all(exact[name]["subset"] < published[name]["subset"] for name in BODY)
    again = dfsq(network(), [pictures()], "W4A4", selector="kmeans", fallback=False, progress=False)
    assert again.details["subset"] == published


def test_static_normalization_does_not_look_at_the_input():
    model, wanted, x = network(), network(), pictures()
    dfsq(model, [x[:3], x[3:]], "W8A8", norm="static", progress=False)
    assert relative_error(model, wanted, x) < 0.03
    quantizer = model.body[0].conv1.input_quantizer
    kept = []
    hook = wanted.body[0].conv1.register_forward_pre_hook(lambda m, a: kept.append(a[0]))
    with torch.no_grad():
        wanted(x)
    hook.remove()
    channels = kept[0].movedim(1, 0).flatten(1)
    torch.testing.assert_close(quantizer.mean, channels.mean(1))
    torch.testing.assert_close(quantizer.magnitude, (channels - channels.mean(1, keepdim=True)).abs().amax(1))
    one = kept[0][:1]
    both = torch.cat([one, 0.1 * one])
    assert torch.equal(quantizer(both)[:1], quantizer(one))
    assert not model.body[0].conv2.input_quantizer.centre


def test_constant_and_dead_channels():
    model = network()
    with torch.no_grad():
        model.head.weight[0] = 0  # constant in front of the first block
        model.body[0].conv1.weight[1] = 0
        model.body[0].conv1.bias[1] = -1  # dead behind its ReLU
        model.body[0].conv1.weight[2] = 0
        model.body[0].conv1.bias[2] = 1  # constant behind its ReLU
    wanted, x = copy.deepcopy(model), pictures()
    dfsq(model, [x], "W4A4", progress=False)
    with torch.no_grad():
        first = wanted.head(x)
        quantized = model.body[0].conv1.input_quantizer(first)
        torch.testing.assert_close(quantized[:, 0], first[:, 0])
        inner = torch.zeros(1, 6, 4, 4)
        inner[:, 2] = 1
        torch.testing.assert_close(model.body[0].conv2.input_quantizer(inner), inner)
    assert torch.isfinite(model(x)).all() and relative_error(model, wanted, x) < 0.5


def test_script_and_export_give_the_same():
    model, x = network(), pictures(2)
    dfsq(model, [x], "W4A4", progress=False)
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(scripted(model)(x), wanted)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), wanted)


def test_other_weight_methods_and_repeatability():
    x = pictures()
    first, second, better = network(), network(), network()
    dfsq(first, [x], "W3A8", progress=False)
    dfsq(second, [x], "W3A8", progress=False)
    report = dfsq(better, [x], "W3A8", method="gptq+comq", progress=False)
    assert torch.equal(first(x), second(x))
    assert report.mean_ratio() < 0.9
    assert relative_error(better, network(), x) < relative_error(first, network(), x)


def test_errors_leave_the_model_alone():
    model, x = network(), pictures()
    before = copy.deepcopy(model.state_dict())
    for options, text in (
        ({"norm": "none"}, "dfsq: norm must be one of dynamic, static, got 'none'"),
        ({"max_values": 0}, "dfsq: max_values must be at least 1, got 0"),
        ({"scheme": "W4A16"}, "dfsq: activation_bits of the scheme must be 2..8, got W4A16"),
        ({"selector": "greedy"}, "choose_subset: selector must be one of exact, kmeans, got 'greedy'"),
    ):
        with pytest.raises(ValueError, match=text):
            dfsq(model, [x], progress=False, **options)
    with pytest.raises(ValueError, match="NaN or Inf"):
        dfsq(model, [x * torch.nan], progress=False)
    assert model.state_dict().keys() == before.keys() and type(model.body[0].conv1) is nn.Conv2d
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_levels_come_from_few_values_too():
    model = network()
    dfsq(model, [pictures()], "W4A4", max_values=50, progress=False)
    assert relative_error(model, network(), pictures()) < 0.5


@pytest.mark.parametrize("norm", ["dynamic", "static"])
def test_a_saved_model_comes_back(tmp_path, norm):
    model, x = network(), pictures()
    dfsq(model, [x], "W4A4", norm=norm, progress=False)
    torchquant.save(model, tmp_path)
    again = torchquant.load(tmp_path, network)
    assert torch.equal(again(x), model(x))
