"""quantize_ on real small models: what is replaced, what is reported, and that a failure changes nothing."""

import copy
import logging

import pytest
import torch
from small_models import Cnn, Mlp, assert_unchanged, distance, make, pictures, rows, run
from torch import nn

import torchquant
from torchquant.config import COMQ, GPTQ, RTN, Auto, MagR, Scheme
from torchquant.nn import QConv1d, QConv2d, QConvTranspose2d, QLinear

METHODS = ["rtn", "comq", "gptq", "gptq+comq", "magr+comq", "magr+gptq+comq", "magr+rtn", "auto"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_replaces_every_layer(method):
    model, xs = make(Mlp), rows()
    report = run(model, "W3A16", xs, method=method)
    assert [layer.name for layer in report.layers] == ["blocks.0.0", "blocks.1.0", "blocks.2.0", "head"]
    assert all(isinstance(model.get_submodule(layer.name), QLinear) for layer in report.layers)
    assert {layer.status for layer in report.layers} == {"ok"}
    assert all(layer.tokens == 128 and layer.method == method and layer.bits == 3 for layer in report.layers)
    assert all(0 < layer.error <= layer.error_rtn * 1.0001 for layer in report.layers)
    assert distance(model, make(Mlp), xs) < 0.5


def test_reported_error_is_the_layer_s_output_error():
    model, xs = nn.Sequential(make(Mlp).head), rows()
    before = copy.deepcopy(model)
    report = run(model, "W3A16g8", xs, method="comq", ridge=0.0)
    x = torch.cat(xs)
    bias = before[0].bias
    with torch.no_grad():
        wanted = (model(x) - before(x)).norm() / (before(x) - bias).norm()
    assert report["0"].error == pytest.approx(float(wanted), rel=1e-3)


def test_a_ridge_helps_on_data_that_calibration_did_not_show():
    first, *unseen = rows(8)
    seen = [first[:12]]  # fewer tokens than inputs: half of the directions are free without a ridge
    errors = {}
    for ridge in (0.0, 0.01):
        model = nn.Sequential(make(Mlp).head)
        run(model, "W2A16", seen, ridge=ridge)
        errors[ridge] = distance(model, nn.Sequential(make(Mlp).head), unseen)
    assert errors[0.01] < 0.9 * errors[0.0]


def test_ridge_must_not_be_negative():
    with pytest.raises(ValueError, match=r"quantize_: ridge must not be negative, got -1"):
        run(make(Mlp), "W4A16", rows(), ridge=-1)


@pytest.mark.parametrize("scheme", ["W2A16", "W3A16", "W3A16g8", "W4A16", "W3A16-sym", "W2A16g10"])
@pytest.mark.parametrize("effort", ["fast", "standard"])
def test_auto_is_never_worse_than_its_members(scheme, effort):
    xs = rows()
    auto = run(make(Mlp), scheme, xs, effort=effort)
    for member in ("rtn", "gptq", "gptq+comq", *(() if effort == "fast" else ("comq",))):
        other = run(make(Mlp), scheme, xs, method=member)
        for layer in auto.layers:
            assert layer.error <= other[layer.name].error * (1 + 1e-5), (member, layer.name)
    assert all(sum(layer.winners.values()) == layer.shape[0] for layer in auto.layers)


def test_auto_tries_magr_at_two_bits_and_counts_its_rows():
    report = run(make(Mlp), "W2A16", rows(), effort="high")
    won = {name for layer in report.layers for name in layer.winners}
    assert any(name.startswith("magr") for name in won)
    assert set(report.details["magr"]) == {layer.name for layer in report.layers}
    before, after = report.details["magr"]["head"]
    assert after < before


@pytest.mark.parametrize("method", ["rtn", "gptq+comq", "magr+comq", "auto"])
@pytest.mark.parametrize("inputs", ["float", "quantized"])
def test_convolutions(method, inputs):
    model, xs = make(Cnn).eval(), pictures()
    report = run(model, "W4A16", xs, method=method, inputs=inputs)
    kinds = {name: type(module) for name, module in model.named_children()}
    assert kinds == {
        "stem": QConv2d,
        "depthwise": QConv2d,
        "grouped": QConv2d,
        "up": QConvTranspose2d,
        "line": QConv1d,
    }
    assert [layer.shape for layer in report.layers] == [(8, 27), (8, 9), (12, 18), (6, 54), (4, 18)]
    assert all(layer.status == "ok" and layer.error < 0.3 for layer in report.layers)
    assert distance(model, make(Cnn).eval(), xs) < 0.3


def test_quantized_inputs_beat_float_inputs_at_the_output():
    xs = rows(8)
    errors = {}
    for inputs in ("float", "quantized"):
        for method in ("comq", "gptq+comq", "auto", "magr+comq"):
            model = make(Mlp)
            report = run(model, "W2A16", xs, method=method, inputs=inputs, ridge=0.0)
            errors[method, inputs] = distance(model, make(Mlp), xs)
            x, bias = torch.cat(xs), make(Mlp).head.bias
            with torch.no_grad():
                wanted = (model(x) - make(Mlp)(x)).norm() / (make(Mlp)(x) - bias).norm()
            if inputs == "quantized":  # the last layer's error is the whole model's
                assert report["head"].error == pytest.approx(float(wanted), rel=2e-3)
    for method in ("comq", "gptq+comq", "auto"):
        assert errors[method, "quantized"] < errors[method, "float"]


def test_first_layer_is_the_same_with_quantized_inputs():
    xs = rows()
    one, two = make(Mlp), make(Mlp)
    run(one, "W3A16", xs, method="comq")
    run(two, "W3A16", xs, method="comq", inputs="quantized")
    change = (one.blocks[0][0].matrix() - two.blocks[0][0].matrix()).abs()
    assert (change < 1e-5).float().mean() > 0.95  # P is summed in another order


def test_step_lists_and_overrides():
    model = make(Mlp)
    overrides = {"re:blocks\\.[01].*": "W2A16g8", "head": None, "blocks.0.0": Scheme(8)}
    report = run(model, "W4A16", rows(), method=[MagR(alpha=1e-3), COMQ(sweeps=1)], overrides=overrides)
    assert {layer.name: layer.scheme for layer in report.layers} == {
        "blocks.0.0": "W8A16",
        "blocks.1.0": "W2A16g8",
        "blocks.2.0": "W4A16",
    }
    assert type(model.head) is nn.Linear
    assert model.blocks[1][0].group_size == 8


def test_grid_after_magr_is_midrise_at_low_bits_unless_told_otherwise():
    for scheme, method, half in [
        ("W2A16", [MagR(), COMQ()], True),
        ("W4A16", [MagR(), COMQ()], False),
        ("W3A16-sym", [MagR(), COMQ()], False),
        ("W3A16", [MagR(), COMQ(grid="asymmetric")], False),
        ("W4A16", [GPTQ(grid="midrise"), COMQ(grid="midrise")], True),
        ("W4A16", [RTN(grid="midrise")], True),
    ]:
        model = make(Mlp)
        run(model, scheme, rows(), method=method)
        zero = model.head.weight_zero_point
        assert bool((zero % 1 == 0.5).all()) == half, (scheme, method)


def test_ignore_and_class_names():
    model = make(Cnn)
    report = run(model, "W4A16", method="rtn", ignore=["stem", "ConvTranspose2d"], overrides={"Conv1d": "W8A16"})
    assert {layer.name: layer.bits for layer in report.layers} == {"depthwise": 4, "grouped": 4, "line": 8}
    embedding = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    assert len(run(embedding, "W4A16", method="rtn", ignore=["re:0"]).layers) == 1


def test_rounding_needs_no_data_and_has_no_error_without():
    model = make(Mlp)
    report = run(model, "W4A16g8", method="rtn")
    assert all(layer.error != layer.error and layer.tokens == 0 for layer in report.layers)
    assert report["head"].bytes_before == 24 * 5 * 4
    assert report["head"].bytes_after == 5 * (12 + 3 * 8)


def test_bfloat16_model():
    model = make(Mlp).to(torch.bfloat16)
    xs = [x.to(torch.bfloat16) for x in rows()]
    before = copy.deepcopy(model)
    run(model, "W4A16", xs, method="auto")
    assert model(xs[0]).dtype == torch.bfloat16
    assert distance(model, before, xs) < 0.2


def test_float64_model():
    model, xs = make(Mlp).double(), [x.double() for x in rows()]
    run(model, "W4A16", xs, method="comq", inputs="quantized")
    assert distance(model, make(Mlp).double(), xs) < 0.2


def test_dead_inputs_are_counted_and_harmless():
    model, xs = make(Mlp), rows()
    for x in xs:
        x[:, 3] = 0
    report = run(model, "W3A16", xs)
    assert report["blocks.0.0"].dead_channels == 1
    assert all(torch.isfinite(model.get_submodule(layer.name).matrix()).all() for layer in report.layers)


def test_mode_random_state_and_logging():
    model = make(Mlp).train()
    model.head.eval()
    before, level = torch.get_rng_state(), logging.getLogger("torchquant").level
    run(model, "W4A16", rows(), max_tokens=50, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and not model.head.training and model.blocks[0][0].training
    assert logging.getLogger("torchquant").level == level and not logging.getLogger("torchquant").handlers
    assert torch.is_grad_enabled()


def test_same_call_same_codes():
    models = [make(Mlp), make(Mlp)]
    for model in models:
        run(model, "W2A16", rows(), max_tokens=40, seed=5)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_one_calibration_serves_several_calls():
    model, xs = make(Functional), rows()
    found = torchquant.collect_statistics(model, xs, max_tokens=60, progress=False)
    for method in ("gptq", "comq"):
        one, two = copy.deepcopy(model), copy.deepcopy(model)
        first, second = run(one, "W3A16", found, method=method), run(two, "W3A16", xs, method=method, max_tokens=60)
        assert [layer.status for layer in first.layers] == [layer.status for layer in second.layers]
        assert torch.equal(one.called.matrix(), two.called.matrix())
    assert_unchanged(model, "collected statistics go with inputs='float'", calib=found, inputs="quantized")


# --- layers that stay ---


def test_tied_weights_are_reported():
    model = nn.Sequential(nn.Embedding(24, 24), nn.Linear(24, 24), nn.Linear(24, 24, bias=False))
    model[2].weight = model[0].weight
    report = run(model, "W4A16", [torch.arange(24)])
    assert report["2"].status == "skipped: weight tied with 0.weight"
    assert type(model[2]) is nn.Linear and type(model[1]) is QLinear
    assert "1 not ok" in str(report).splitlines()[-1]


def test_a_layer_used_twice_stays_one_layer():
    layer = nn.Linear(24, 24)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    report = run(model, "W4A16", rows())
    assert model[0] is model[2] and type(model[0]) is QLinear
    assert [layer.tokens for layer in report.layers] == [256]


class Functional(nn.Module):
    """One layer used past its call, one parameter used as a weight, one layer never reached."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.idle = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.stack = nn.Parameter(torch.randn(2, 24, 24))

    def forward(self, x):
        x = nn.functional.linear(self.called(x), self.read.weight, self.read.bias)
        return nn.functional.linear(x, self.stack[1])


@pytest.mark.parametrize("inputs", ["float", "quantized"])
def test_what_is_not_called_is_reported(inputs):
    report = run(make(Functional), "W4A16", rows(), inputs=inputs)
    assert {layer.name: layer.status for layer in report.layers} == {
        "called": "ok",
        "read": "skipped: its weight is used through F.linear, not by calling the layer",
        "idle": "skipped: calibration never reached it",
        "stack": "skipped: it is used through F.linear, not by a layer",
    }


def test_attention_and_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    xs = [x.view(4, 8, 24) for x in rows()]
    before = copy.deepcopy(model)
    report = run(model, "W4A16", xs)
    names = ["self_attn", "self_attn.out_proj", "linear1", "linear2"]
    assert [layer.name for layer in report.layers] == [f"layers.{i}.{name}" for i in (0, 1) for name in names]
    assert report["layers.0.self_attn"].status == "skipped: its in_proj_weight is used through F.linear, not by a layer"
    assert report["layers.0.self_attn.out_proj"].status.startswith("skipped: its weight is used through F.linear")
    assert report["layers.1.linear2"].status == "ok"
    assert distance(model, before, xs) < 0.2  # also on the fused path, which reads .weight


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Renamed(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def test_own_forward_is_checked_against_the_class():
    model = nn.Sequential(Doubled(24, 24), Renamed(24, 24))
    report = run(model, "W4A16", rows())
    assert report["0"].status == "skipped: Doubled.forward() computes something else than the class it derives from"
    assert type(model[1]) is QLinear
    report = run(nn.Sequential(Renamed(4, 4), nn.Linear(4, 4)), "W4A16", method="rtn")
    assert report["0"].status == "skipped: Renamed has a forward() of its own; pass calibration data to have it checked"


def test_parametrized_weight():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    report = run(model, "W4A16", method="rtn")
    assert report["0"].status == "skipped: its weight is computed by a parametrization"


def test_strict():
    model = make(Functional)
    assert_unchanged(model, "strict: 3 would stay in floating point: .*idle", calib=rows(), strict=True)


# --- Hugging Face ---


def byte_model(name, **sizes):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**sizes)
    torch.manual_seed(0)
    return {"Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel"}[name], config, transformers


def test_llama():
    cls, config, transformers = byte_model(
        "Llama",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = getattr(transformers, cls)(config).eval()
    tokens = torch.randint(0, 64, (4, 16))
    before = model(tokens).logits
    report = run(model, "W8A16g16", [{"input_ids": tokens}], inputs="quantized", method="comq", ignore=["lm_head"])
    assert len(report.layers) == 14 and all(layer.status == "ok" for layer in report.layers)
    assert (model(tokens).logits - before).norm() < 0.02 * before.norm()
    assert model.generate(tokens[:1, :4], max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_gpt2_has_transposed_layers_and_a_tied_head():
    cls, config, transformers = byte_model("GPT2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    model = getattr(transformers, cls)(config).eval()
    tokens = torch.randint(0, 64, (4, 16))
    before = model(tokens).logits
    report = run(model, "W8A16", [{"input_ids": tokens}], method="gptq+comq")
    assert report["lm_head"].status == "skipped: weight tied with transformer.wte.weight"
    assert report["transformer.h.0.attn.c_attn"].shape == (96, 32)
    assert isinstance(model.transformer.h[0].mlp.c_fc, QLinear)
    assert (model(tokens).logits - before).norm() < 0.02 * before.norm()


# --- the rest ---


def test_details_hold_what_plots_need():
    report = run(make(Mlp), "W3A16g8", rows(), method="comq")
    found = report.details["histograms"]["blocks.0.0"]
    assert found["levels"] == 8 and sum(found["counts"]) == 24 * 24
    inside = found["counts"][len(found["counts"]) // 9 : -len(found["counts"]) // 9]
    assert sum(inside) > 0.6 * 24 * 24


def test_estimate_memory():
    estimate = torchquant.estimate_memory(make(Cnn), "W4A16", ignore=["line"])
    assert estimate.weights_before == 4 * (8 * 27 + 8 * 9 + 12 * 18 + 6 * 54)
    assert estimate.grams == 4 * (27**2 + 8 * 9**2 + 4 * 18**2 + 2 * 54**2)
    assert estimate.weights_after < estimate.weights_before
    assert "Grams at most" in str(estimate)


def test_effort_is_part_of_the_method():
    report = run(make(Mlp), "W4A16", rows(), method=Auto("fast"))
    assert report.method == "auto" and report.scheme == "W4A16" and report.seconds > 0
