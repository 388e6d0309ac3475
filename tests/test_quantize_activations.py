"""quantize_ with activations: from a float model to W4A4, in the report, in a file, and back after a failure."""

import copy
import json
import math

import pytest
import torch
from helpers import random, scripted
from nn.attention_models import build, output
from torch import nn

from torchquant import formats, steps
from torchquant.config import Activations, Scheme
from torchquant.nn import QAttention, QConv2d, QLinear, QuantizedLayer
from torchquant.nn.quantizers import ActivationQuantizer, DynamicQuantizer, TableQuantizer, UniformQuantizer
from torchquant.quantize import collect_statistics, quantize_
from torchquant.report import Report
from torchquant.solve import correct

ATTENTION = ["demo ViT", "encoder", "timm ViT", "timm Swin", "torchvision ViT", "torchvision Swin", "HF ViT", "HF Swin"]


def run(model, scheme, calib, **options):
    return quantize_(model, scheme, calib, **{"progress": False, "method": "rtn", **options})


def distance(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, padding="same", groups=4, bias=False)
        self.up = nn.ConvTranspose2d(12, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.up(torch.relu(self.grouped(torch.relu(self.depthwise(torch.relu(self.stem(x)))))))
        return self.head(x.mean((2, 3)))


class Mlp(nn.Module):
    """Correlated inputs and a LayerNorm."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(24, 24), nn.LayerNorm(24), nn.Linear(24, 24, bias=False)
        self.third, self.head = nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, x):
        return self.head(self.third(self.second(self.norm(self.first(x))).relu()).relu())


def make(cls=Mlp, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls().eval()


def rows(count=4, seed=0):
    mix = torch.randn(24, 24, generator=random(seed)) * torch.logspace(0, -1.0, 24)
    return [torch.randn(64, 24, generator=random(seed + i + 1)) @ mix for i in range(count)]


def pictures(count=2):
    return [torch.randn(4, 3, 12, 12, generator=random(i)) for i in range(count)]


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_models(name):
    model, inputs = build(name)
    wanted = output(model, inputs)
    report = run(model, "W8A8", [inputs])
    assert report.not_ok == 0
    products = [module for module in model.modules() if isinstance(module, QAttention)]
    points = [point for product in products for point in product.children()]
    assert products and all(isinstance(point, ActivationQuantizer) for point in points)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    assert len(layers) == len(report.layers) and all(layer.input_quantizer is not None for layer in layers)
    assert len(report.activations) == len(layers) + 4 * len(products)
    assert distance(output(model, inputs), wanted) < 0.05


def test_bert_s_padding_and_what_a_norm_shares():
    model, inputs = build("HF BERT")
    wanted = output(model, inputs)
    report = run(model, "W8A8", [inputs])
    assert report.not_ok == 0 and distance(output(model, inputs), wanted) < 0.1


@pytest.mark.parametrize("inputs", ["float", "quantized"])
@pytest.mark.parametrize("method", ["rtn", "gptq+comq", "auto"])
def test_convolutions(method, inputs):
    model, xs = make(Cnn), pictures()
    report = run(model, "W4A4", xs, method=method, inputs=inputs)
    assert [layer.scheme for layer in report.layers] == ["W8A8", "W4A4", "W4A4", "W4A4", "W8A8"]
    assert isinstance(model.depthwise, QConv2d) and model.depthwise.input_quantizer.bits == 4
    assert all(0 < layer.error < 0.5 for layer in report.layers)
    with torch.no_grad():
        assert distance(model(xs[0]), make(Cnn)(xs[0])) < 0.5


def test_reported_error_is_the_layer_s_output_error():
    xs = rows()
    model = nn.Sequential(make().third)
    before = copy.deepcopy(model)
    report = run(model, "W3A3", xs, method="comq", ridge=0.0, first_last_bits=None)
    x = torch.cat(xs)
    with torch.no_grad():
        wanted = (model(x) - before(x)).norm() / (before(x) - before[0].bias).norm()
    assert report["0"].error == pytest.approx(float(wanted), rel=1e-3)
    activation = report.activation("0")
    assert (activation.kind, activation.quantizer, activation.bits) == ("input", "uniform", 3)
    values = model[0].input_quantizer(x)
    assert activation.error == pytest.approx(float((values - x).norm() / x.norm()), rel=0.05)
    assert activation.low == pytest.approx(float(values.min())) and activation.high == pytest.approx(
        float(values.max())
    )


def test_better_weights_for_quantized_inputs():
    xs = rows(8)
    wanted = make()(xs[0])
    plain, solved = make(), make()
    run(plain, "W3A3", xs)
    report = run(solved, "W3A3", xs, method="gptq+comq")
    assert all(layer.error <= layer.error_rtn * 1.001 for layer in report.layers)
    with torch.no_grad():
        assert distance(solved(xs[0]), wanted) < distance(plain(xs[0]), wanted)


def test_correction_lowers_the_error_and_moves_the_bias():
    xs = rows()
    with steps.preparing(make(), xs, "W8A3", progress=False, first_last_bits=None) as work:
        steps.observe(work)
        steps.choose_quantizers(work)
        steps.collect_inputs(work)
        stats = work.stats["third"]
        target = work.targets["third"].module
        weight, bias = target.weight.detach(), target.bias.detach()
        corrected, offset = correct(weight, bias, stats, 1e-4)
        same, still = correct(weight, bias, stats, 1e9)
        x = torch.cat([torch.relu(work.model.second(work.model.norm(work.model.first(x)))) for x in xs])
        quantized = work.quantizers["third"](x)
        wanted = x @ weight.T + bias
        errors = [
            distance(quantized @ w.T + b, wanted) for w, b in [(weight, bias), (corrected, offset), (same, still)]
        ]
        steps.solve_weights(work)
    assert errors[1] < errors[2] < errors[0]  # a huge ridge leaves the weight, but not the bias
    torch.testing.assert_close(same, weight, rtol=1e-5, atol=1e-6)
    assert torch.allclose((quantized @ corrected.T + offset).mean(0), wanted.mean(0), atol=1e-4)


def test_norms_are_reparameterized_and_layers_without_bias_get_one():
    xs, model = rows(), make()
    with torch.no_grad():
        model.norm.weight[:3] *= 30
    before = copy.deepcopy(model)
    report = run(model, "W8A4", xs)
    assert model.second.input_quantizer.scale.dim() == 0 and model.second.bias is not None
    spread = copy.deepcopy(before)
    run(spread, "W8A4", xs, activations=Activations(reparameterize=False))
    assert torch.equal(spread.norm.weight, before.norm.weight)
    with torch.no_grad():
        errors = [distance(m(xs[0]), before(xs[0])) for m in (model, spread)]
    assert errors[0] < 0.8 * errors[1]
    # The report's error is that of the LayerNorm's output as it was: x = r x' - d.
    with torch.no_grad():
        hidden = before.first(torch.cat(xs))
        x, moved = before.norm(hidden), model.norm(hidden)
        ratio = before.norm.weight / model.norm.weight
        values = model.second.input_quantizer(moved) * ratio - (model.norm.bias * ratio - before.norm.bias)
    assert report.activation("second").error == pytest.approx(distance(values, x), rel=0.03)


def test_layers_behind_one_norm_with_schemes_of_their_own():
    for scheme, bits in (("W4A6", 6), ("W4A16", None)):
        model, inputs = build("torchvision ViT")
        wanted = output(model, inputs)
        name = "encoder.layers.encoder_layer_0.self_attention.q_proj"
        run(model, "W8A8", [inputs], overrides={name: scheme})
        quantizer = model.get_submodule(name).input_quantizer
        assert quantizer.bits == bits if bits else quantizer is None
        assert distance(output(model, inputs), wanted) < 0.1


def test_first_and_last_layer():
    def schemes(**options):
        report = run(make(), "W4A4", rows(), **options)
        return {layer.name: layer.scheme for layer in report.layers}

    assert schemes() == {"first": "W8A8", "second": "W4A4", "third": "W4A4", "head": "W8A8"}
    assert set(schemes(first_last_bits=None).values()) == {"W4A4"}
    assert schemes(overrides={"head": "W3A5"})["head"] == "W3A5"
    assert schemes(overrides={"first": "W4A16"})["first"] == "W4A16"


def test_overrides_and_ignore_reach_attention():
    model, inputs = build("demo ViT")
    overrides = {"blocks.0.attn": "W4A6", "re:blocks.1.*fc.": "W4A16"}
    report = run(model, "W4A4", [inputs], overrides=overrides, ignore=["blocks.1.attn"])
    assert report.activation("blocks.0.attn.product.key").bits == 6
    assert report["blocks.0.attn.qkv"].scheme == "W4A4"
    assert model.blocks[1].fc1.input_quantizer is None and type(model.blocks[1].attn).__name__ == "Attention"
    assert report["blocks.1.attn.qkv"].status == "ok"
    with pytest.raises(ValueError, match="ignore: 'blocks.7.attn' matches no layer"):
        run(model, "W4A4", [inputs], ignore=["blocks.7.attn"])


def test_only_some_layers_by_overrides():
    model = make()
    run(model, "W4A16", rows(), overrides={"third": "W4A4"})
    assert model.third.input_quantizer is not None and model.second.input_quantizer is None


@pytest.mark.parametrize("softmax", ["auto", "sulq", "log2", "log_sqrt2", "uniform"])
def test_softmax_option(softmax):
    model, inputs = build("demo ViT")
    report = run(model, "W4A4", [inputs], activations=Activations(softmax=softmax))
    found = report.activation("blocks.0.attn.product.softmax")
    assert found.low == 0 and found.high > 0.05 and 0 < found.error < 0.6
    assert softmax == "auto" or found.quantizer == softmax
    kind = UniformQuantizer if found.quantizer == "uniform" else TableQuantizer
    assert isinstance(model.blocks[0].attn.product.softmax, kind)


@pytest.mark.parametrize("granularity", ["tensor", "token", "channel"])
def test_dynamic(granularity):
    model, xs = make(), rows()
    report = run(model, "W8A8", xs, activations=Activations(dynamic=True, granularity=granularity))
    assert isinstance(model.third.input_quantizer, DynamicQuantizer)
    assert report.activation("third").quantizer == "dynamic" and math.isnan(report.activation("third").error)
    with torch.no_grad():
        assert distance(model(10 * xs[0]), make()(10 * xs[0])) < 0.05  # a range that calibration never saw


class OwnAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x):
        return self.out(torch.softmax(x @ x.transpose(-2, -1), -1) @ self.mix(x))


def test_attention_that_stays_is_declared():
    def net():
        return nn.Sequential(make(OwnAttention), nn.Linear(24, 5))

    xs = [x.view(4, 16, 24) for x in rows()]
    model = net()
    report = run(model, "W4A4", xs)
    status = "skipped: OwnAttention computes attention in its own way, not by F.scaled_dot_product_attention"
    assert report["0"].status == status and report.not_ok == 1
    assert isinstance(model[0].mix, QLinear)
    with pytest.raises(ValueError, match="strict: 1 would stay in floating point: 0 .OwnAttention computes"):
        run(net(), "W4A4", xs, strict=True)


def test_layers_and_attention_never_reached():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.head, self.idle = make(), nn.Linear(5, 5), nn.MultiheadAttention(24, 4)

        def forward(self, x):
            return self.head(self.used(x))

    model = Idle()
    report = run(model, "W4A4", rows())
    assert report["idle"].status == "skipped: calibration never reached it"
    assert report["idle.q_proj"].status == "skipped: calibration never reached it"
    assert isinstance(model.idle.product.query, nn.Identity)


# --- the report and the file ---


def test_report_has_a_table_of_activations(tmp_path):
    model, inputs = build("demo ViT")
    report = run(model, "W4A4", [inputs])
    assert "activation" in str(report) and "blocks.0.attn.product.softmax  softmax" in str(report)
    report.to_json(tmp_path / "report.json")
    again = Report.from_json(tmp_path / "report.json")
    assert again.activations == report.activations
    with pytest.raises(KeyError, match="no quantized activation named 'x'"):
        report.activation("x")
    assert not run(make(), "W4A16", rows()).activations


@pytest.mark.parametrize("name", ATTENTION)
def test_save_and_load(name, tmp_path):
    model, inputs = build(name)
    run(model, "W4A4", [inputs])
    formats.save(model, tmp_path)
    wanted = output(model, inputs)
    assert torch.equal(output(formats.load(tmp_path, build(name)[0]), inputs), wanted)
    assert torch.equal(output(formats.load(tmp_path, model), inputs), wanted)


@pytest.mark.parametrize("options", [{}, {"activations": Activations(dynamic=True, granularity="token")}])
def test_save_and_load_layers_alone(options, tmp_path):
    model, xs = make(), rows()
    run(model, "W4A4", xs, **options)
    formats.save(model, tmp_path)
    assert torch.equal(formats.load(tmp_path, make(seed=1))(xs[0]), model(xs[0]))
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"]["second"]
    assert entry["input_quantizer"]["bits"] == 4


def test_a_file_that_does_not_fit_leaves_the_model(tmp_path):
    model, inputs = build("demo ViT")
    run(model, "W4A4", [inputs])
    formats.save(model, tmp_path)
    other = build("demo ViT")[0]
    other.blocks[1].attn = nn.Identity()
    modules = list(other.modules())
    with pytest.raises(ValueError, match=r"attention 'blocks.1.attn': Identity cannot be rewritten"):
        formats.load(tmp_path, other)
    assert list(other.modules()) == modules


def test_script_of_a_quantized_model():
    model, inputs = build("demo ViT")
    run(model, "W4A4", [inputs])
    for block in model.blocks:
        x = torch.randn(2, 5, 24, generator=random(0))
        torch.testing.assert_close(scripted(block)(x), block(x))
    torch.testing.assert_close(torch.export.export(model, (), inputs).module()(**inputs), model(**inputs))


# --- failures ---


def snapshot(model):
    return list(model.modules()), {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model, before):
    modules, state = before
    assert list(model.modules()) == modules
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@pytest.mark.parametrize("inputs", ["float", "quantized"])
def test_a_failure_half_way_changes_nothing(monkeypatch, inputs):
    model, data = build("demo ViT")
    before, solve, calls = snapshot(model), steps.solve, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of luck")
        return solve(*arguments)

    monkeypatch.setattr(steps, "solve", failing)
    with pytest.raises(RuntimeError, match="layer 'blocks.0.fc1': out of luck"):
        run(model, "W4A4", [data], inputs=inputs)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calib": None}, r"activations \(W4A4\) need calibration data, got none"),
        ({"calib": []}, "calibration reached no layer with a single token: is calib empty"),
        ({"calib": [torch.full((2, 24), float("nan"))]}, "the input of layer 'first' holds NaN or Inf"),
        ({"scheme": "W4A12"}, r"activation_bits must be 2..8, or 16 .* got 12"),
    ],
)
def test_wrong_arguments(options, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        run(model, options.get("scheme", "W4A4"), options.get("calib", rows()))
    assert_unchanged(model, before)


def test_collected_statistics_are_of_weights_only():
    found = collect_statistics(make(), rows(), progress=False)
    with pytest.raises(ValueError, match="need calibration data, got collected statistics"):
        run(make(), "W4A4", found)


@pytest.mark.parametrize("inputs", ["float", "quantized"])
def test_a_stopped_run_goes_on(tmp_path, monkeypatch, inputs):
    options = {"inputs": inputs, "method": "gptq"}
    whole, xs = make(), rows()
    run(whole, "W4A4", xs, **options)
    solve_layer, solved = steps.solve_layer, []

    def counting(work, target, stats):
        if len(solved) == 2:
            raise KeyboardInterrupt
        solve_layer(work, target, stats)
        solved.append(target.name)

    monkeypatch.setattr(steps, "solve_layer", counting)
    model = make()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        run(model, "W4A4", xs, checkpoint_dir=tmp_path, **options)
    assert_unchanged(model, before)
    monkeypatch.setattr(steps, "solve_layer", lambda w, t, s: (solve_layer(w, t, s), solved.append(t.name)))
    run(model, "W4A4", xs, checkpoint_dir=tmp_path, **options)
    assert solved == ["first", "second", "third", "head"]
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="belongs to another run: activations changed"):
        run(make(), "W4A4", xs, checkpoint_dir=tmp_path, activations=Activations(range="minmax"), **options)


def test_steps_let_a_recipe_train_on_its_own_copies():
    model, xs = make(), rows()
    weight = model.third.weight
    before = weight.detach().clone()
    with steps.preparing(model, xs, Scheme(4, 4), method="rtn", progress=False) as work:
        steps.own_weights(work)
        steps.observe(work)
        steps.choose_quantizers(work)
        with torch.enable_grad(), steps.quantizing_inputs(model, work.quantizers, straight_through=True):
            model(xs[0]).sum().backward()
        model.third.weight.sub_(0.1 * model.third.weight.grad)
        steps.reparameterize_layernorms(work)
        steps.collect_inputs(work)
        steps.solve_weights(work)
    assert torch.equal(weight, before) and work.report["third"].status == "ok"
    assert isinstance(model.third, QLinear) and (model.third.matrix() - before).abs().max() > 0.01
