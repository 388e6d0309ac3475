"""quantize_ when something goes wrong: a failure leaves the model as it was, a stopped run goes on."""

import pytest
import torch
from small_models import Mlp, assert_unchanged, make, rows, run
from torch import nn

from torchquant import checkpoint as checkpoints
from torchquant import steps
from torchquant.nn import QuantizedLayer

# --- failures ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "method 'auto' needs calibration data; only 'rtn' goes without"),
        ({"calib": []}, "calibration reached no layer with a single token: is calib empty"),
        ({"calib": [], "inputs": "quantized"}, "calibration reached no layer with a single token"),
        ({"calib": [torch.zeros(0, 24)]}, "calibration reached no layer with a single token"),
        ({"calib": [torch.full((2, 24), float("nan"))]}, "the input of layer 'blocks.0.0' holds NaN or Inf"),
        ({"calib": 5}, "calib: expected a DataLoader"),
        ({"inputs": "both"}, "inputs must be one of float, quantized, got 'both'"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"scheme": "W4A8", "method": "rtn"}, "activations \\(W4A8\\) need calibration data, got none"),
        ({"method": "awq"}, "unknown step 'awq'"),
        ({"method": "rtn", "ignore": ["tail"]}, "ignore: 'tail' matches no layer; .* layers: blocks.0.0, blocks.1.0"),
        ({"method": "rtn", "overrides": {"re:x.*": "W4A16"}}, "overrides: 're:x.*' matches no layer"),
        ({"method": "rtn", "overrides": {"GELU": "W4A16"}}, "overrides: 'GELU' matches no layer"),
        ({"method": "rtn", "overrides": {"re:(": None}}, "overrides: 're:\\(' is not a regular expression"),
        ({"method": "rtn", "overrides": {"head": "4bit"}}, "Scheme: expected W<bits>A<bits>"),
        ({"method": "rtn", "ignore": "head"}, "ignore must be a sequence of patterns, got the string 'head'"),
    ],
)
def test_wrong_arguments(options, message):
    assert_unchanged(make(Mlp), message, **options)


def test_root_layer_nothing_to_do_and_meta():
    assert_unchanged(nn.Linear(4, 4), "the model is itself a Linear .* wrap it in nn.Sequential", method="rtn")
    assert_unchanged(nn.Sequential(nn.ReLU()), "Sequential has no layer to quantize", method="rtn")
    with torch.device("meta"), pytest.raises(ValueError, match="the weight of 0 is on the meta device"):
        run(nn.Sequential(nn.Linear(4, 4)), "W4A16", method="rtn")


@pytest.mark.parametrize("inputs", ["float", "quantized"])
def test_a_failure_half_way_changes_nothing(monkeypatch, inputs):
    calls = []
    solve = steps.solve

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return solve(*arguments)

    monkeypatch.setattr(steps, "solve", failing)
    options = {"calib": rows(), "inputs": inputs, "method": "comq", "error": RuntimeError}
    assert_unchanged(make(Mlp), "layer 'blocks.2.0': out of luck", **options)


def test_bad_weight_names_the_layer():
    model = make(Mlp)
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 'head': .*(NaN|finite)"):
        run(model, "W4A16", method="rtn")


# --- resume ---


class Stop(Exception):
    pass


@pytest.mark.parametrize("inputs", ["float", "quantized"])
def test_a_stopped_run_goes_on(tmp_path, monkeypatch, inputs):
    whole = make(Mlp)
    run(whole, "W3A16", rows(), inputs=inputs)
    solved = []
    solve_layer = steps.solve_layer

    def counting(run_, target, stats):
        if len(solved) == 2:
            raise Stop
        solve_layer(run_, target, stats)
        solved.append(target.name)

    options = {"inputs": inputs, "checkpoint_dir": tmp_path / "run"}
    monkeypatch.setattr(steps, "solve_layer", counting)
    model = make(Mlp)
    with pytest.raises(Stop):
        run(model, "W3A16", rows(), **options)
    assert solved == ["blocks.0.0", "blocks.1.0"]
    assert not any(isinstance(module, QuantizedLayer) for module in model.modules())
    monkeypatch.setattr(steps, "solve_layer", lambda r, t, s: (solve_layer(r, t, s), solved.append(t.name)))
    report = run(model, "W3A16", rows(), **options)
    assert solved == ["blocks.0.0", "blocks.1.0", "blocks.2.0", "head"]
    assert [layer.name for layer in report.layers] == solved
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in model.state_dict().items())
    again = make(Mlp)
    run(again, "W3A16", rows(), **options)  # everything is done
    assert len(solved) == 4 and torch.equal(again(rows()[0]), model(rows()[0]))


def test_a_changed_run_is_refused(tmp_path):
    run(make(Mlp), "W3A16", rows(), method="comq", checkpoint_dir=tmp_path)
    for changed, options in {
        "layers, scheme": {"scheme": "W4A16"},
        "method": {"method": "gptq"},
        "seed": {"seed": 1},
        "data": {"calib": rows(seed=1)},
    }.items():
        arguments = {"calib": rows(), "method": "comq", "scheme": "W3A16", **options}
        assert_unchanged(make(Mlp), f"belongs to another run: {changed} changed", checkpoint_dir=tmp_path, **arguments)
    model, options = make(Mlp, seed=1), {"scheme": "W3A16", "calib": rows(), "method": "comq"}
    assert_unchanged(model, "belongs to another run: weights changed", checkpoint_dir=tmp_path, **options)


def test_a_damaged_checkpoint_is_named(tmp_path):
    options = {"calib": rows(), "method": "comq", "checkpoint_dir": tmp_path}
    run(make(Mlp), "W4A16", **options)
    file = next(path for path in tmp_path.iterdir() if path.name.startswith("head-"))
    file.write_bytes(file.read_bytes()[:40])
    assert_unchanged(make(Mlp), f"{file.name} cannot be read", **options)
    (tmp_path / checkpoints.FINGERPRINT).write_text("{")
    assert_unchanged(make(Mlp), "fingerprint.json cannot be read", **options)
