"""torchquant.export: arguments, what it leaves alone, and one clear error for everything that cannot become a file."""

import logging
import sys

import pytest
import small_models
import torch
from torch import nn

import torchquant
from torchquant import quantize_
from torchquant.formats import onnx as format_onnx
from torchquant.nn import from_float
from torchquant.nn.quantizers import ActivationQuantizer

REASON = "pip install 'torchquant[onnx]'"
onnx = pytest.importorskip("onnx", reason=REASON)
runtime = pytest.importorskip("onnxruntime", reason=REASON)
pytest.importorskip("onnxscript", reason=REASON)


def export(model, path, example_inputs, **options):
    torchquant.export(model, path, format="onnx", example_inputs=example_inputs, **options)
    return onnx.load(path)


def session(path):
    """Without ONNX Runtime's own approximations."""
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def outputs(path, *inputs):
    found = session(path)
    names = [value.name for value in found.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(y) for y in found.run(None, feeds)]


def layer(bits=4):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = nn.Linear(24, 6)
    codes = torch.arange(6 * 24, dtype=torch.uint8).view(6, 24) % 2**bits
    return from_float(found, codes, torch.full((6, 1), 0.1), torch.full((6, 1), 8.0), bits).eval()


def test_the_model_stays_as_it_is(tmp_path):
    model = small_models.make(small_models.Mlp)
    quantize_(model, "W4A8", small_models.rows(), method="rtn", progress=False)
    model.train()
    modules, state = list(model.modules()), {key: value.clone() for key, value in model.state_dict().items()}
    export(model, tmp_path / "model.onnx", small_models.rows()[0])
    assert list(model.modules()) == modules and all(module.training for module in modules)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert b"site-packages" not in (tmp_path / "model.onnx").read_bytes()  # no trace of where it was made


class Two(nn.Module):
    """One layer in two places, two inputs, and one of them by name."""

    def __init__(self):
        super().__init__()
        self.first = self.second = layer()
        self.third = nn.Linear(6, 6)

    def forward(self, x, other):
        return self.first(x) - self.second(other), self.third.weight


def test_shared_layers_named_inputs_and_a_batch_of_one(tmp_path):
    model, path = Two().eval(), tmp_path / "model.onnx"
    graph = export(model, path, {"x": torch.randn(1, 24), "other": torch.randn(1, 24)})
    assert sum(i.name.endswith("weight_codes") for i in graph.graph.initializer) == 1
    assert [(v.name, v.shape) for v in session(path).get_inputs()] == [("x", ["batch", 24]), ("other", ["batch", 24])]
    assert [(v.name, v.shape) for v in session(path).get_outputs()] == [
        ("output_0", ["batch", 6]),
        ("output_1", [6, 6]),
    ]
    x, other = torch.randn(5, 24), torch.randn(5, 24)
    with torch.no_grad():
        wanted = model(x, other)[0]
    torch.testing.assert_close(outputs(path, x, other)[0], wanted, rtol=1e-4, atol=2e-4)
    export(model, path, {"other": torch.randn(2, 24), "x": torch.randn(2, 24)})


def test_a_layer_alone_and_fixed_shapes(tmp_path):
    path = tmp_path / "model.onnx"
    export(layer(), path, (torch.randn(3, 24),), dynamic_shapes=None)
    assert session(path).get_inputs()[0].shape == [3, 24]
    export(layer(), path, torch.randn(3, 5, 24), dynamic_shapes=({1: torch.export.Dim("tokens")},))
    assert isinstance(session(path).get_inputs()[0].shape[1], str)
    assert outputs(path, torch.randn(3, 7, 24))[0].shape == (3, 7, 6)


def test_weights_that_are_read(tmp_path):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = layer()
            codes, scale, zero_point = torch.ones(6, 8, dtype=torch.uint8), torch.ones(6, 1), torch.zeros(6, 1)
            self.up = from_float(nn.ConvTranspose2d(2, 6, 2), codes, scale, zero_point, 4)

        def forward(self, x):
            return x @ self.linear.weight.t() + self.up.weight.sum()

    model = Reads().eval()
    x, path = torch.randn(3, 24), tmp_path / "model.onnx"
    export(model, path, torch.randn(2, 24))
    torch.testing.assert_close(outputs(path, x)[0], model(x), rtol=1e-4, atol=2e-4)


# --- errors ---


def refused(kind, match, path, model=None, **options):
    with pytest.raises(kind, match=match):
        torchquant.export(model or layer(), path, **{"format": "onnx", "example_inputs": torch.randn(2, 24), **options})
    assert not list(path.parent.iterdir())


def test_arguments(tmp_path):
    path = tmp_path / "model.onnx"
    refused(ValueError, "export: format must be one of onnx.*, got 'tflite'", path, format="tflite")
    refused(
        ValueError, "export: format 'onnx' needs example_inputs: a tensor, a tuple or a dict", path, example_inputs=None
    )
    refused(ValueError, "export: dynamic_shapes must be 'batch', None or .*, got 'all'", path, dynamic_shapes="all")
    refused(TypeError, "unexpected keyword argument 'opset'", path, opset=17)


@pytest.mark.parametrize("name", ["onnx", "onnxscript"])
def test_missing_packages(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    refused(
        ImportError, rf"export: format 'onnx' needs {name}: pip install 'torchquant\[onnx\]'", tmp_path / "model.onnx"
    )


def test_without_onnxruntime_the_file_is_written_and_a_warning_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with caplog.at_level(logging.WARNING, logger="torchquant"):
        export(layer(), tmp_path / "model.onnx", torch.randn(2, 24))
    assert "onnxruntime is not installed, so the file was not run" in caplog.text


class Odd(ActivationQuantizer):
    def forward(self, x):
        return x


class Branches(nn.Module):
    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


def test_models_that_cannot_be_exported(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    refused(TypeError, "export: format 'onnx' has no form of Odd", path, nn.Sequential(Odd(4)))
    refused(RuntimeError, "(?s)export: the model cannot be traced: .*dynamic_shapes=", path, Branches())
    half = nn.Linear(24, 6).bfloat16()  # which ONNX Runtime does not multiply on the CPU
    message = "export: .*model.onnx: ONNX Runtime cannot run the file .*: NotImplemented"
    refused(ValueError, message, path, half, example_inputs=torch.randn(2, 24).bfloat16())
    monkeypatch.setattr(format_onnx, "LIMIT", 100)
    refused(ValueError, "export: .*model.onnx: tensors of .* bytes, an ONNX file holds at most 100", path)


def test_a_file_that_computes_something_else_does_not_take_the_name(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    export(layer(), path, torch.randn(2, 24))
    before = path.read_bytes()
    monkeypatch.setattr(format_onnx.OnnxLayer, "bias_for", lambda self, x: x.new_full((6,), 100.0))
    message = r"ONNX Runtime computes something else: output 0 differs by \d.* of its norm, allowed are 0.01"
    with pytest.raises(ValueError, match=message):
        export(layer(), path, torch.randn(2, 24))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    export(layer(), path, torch.randn(2, 24), check=False)
    assert path.read_bytes() != before


def test_a_damaged_graph_is_refused_by_the_checker(tmp_path, monkeypatch):
    def spoil(graph, names):
        graph.graph.node(0).op_type = "NoSuchOperator"

    monkeypatch.setattr(format_onnx, "narrow_and_optimize", spoil)
    refused(
        ValueError, "export: .*model.onnx: onnx.checker refuses the file: .*NoSuchOperator", tmp_path / "model.onnx"
    )
