"""The quantized layers: right numbers, and everything that PyTorch does to a module."""

import copy
import io
import pickle

import pytest
import torch
from nn.float_layers import LAYERS
from torch import nn

from torchquant.nn import QLinear, from_float, layout, swap_modules
from torchquant.nn.quantizers import DynamicQuantizer, UniformQuantizer
from torchquant.solvers import rtn_quantize


def quantized(module, bits=4, group_size=0):
    """The quantized layer, and a float copy that holds the same numbers."""
    matrix = layout.to_matrix(module)
    codes, scale, zero_point = rtn_quantize(matrix, bits=bits, group_size=group_size)
    layer = from_float(module, codes, scale, zero_point, bits, group_size)
    same = copy.deepcopy(module)
    with torch.no_grad():
        same.weight.copy_(layer.dequantized_weight())
    return layer, same


@pytest.mark.parametrize("name", LAYERS)
def test_forward_is_the_float_layer_with_rounded_weight(name):
    module, shape = LAYERS[name]
    layer, same = quantized(module, bits=3, group_size=4)
    x = torch.randn(shape)
    with torch.no_grad():
        # 16-bit integers of the input: half a unit of 1 / 32767 of its largest value.
        torch.testing.assert_close(layer(x), same(x), rtol=1e-4, atol=1e-4)
        assert 0 < (same.weight - module.weight).abs().max() < 0.5
    assert torch.equal(layer.weight, same.weight)
    assert list(layer.weight_shape) == list(module.weight.shape)


def test_hf_conv1d_becomes_linear():
    module = pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 6)
    nn.init.normal_(module.bias)
    matrix = layout.to_matrix(module)
    codes, scale, zero_point = rtn_quantize(matrix, bits=8)
    layer = from_float(module, codes, scale, zero_point, 8)
    x = torch.randn(2, 3, 6)
    assert isinstance(layer, QLinear)
    torch.testing.assert_close(layer(x), module(x), rtol=0.02, atol=0.02)


def test_state_dict_copy_pickle():
    layer, _ = quantized(nn.Linear(10, 6), bits=3, group_size=4)
    x = torch.randn(2, 10)
    keys = ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "bias"]
    assert list(layer.state_dict()) == keys
    assert not list(layer.parameters())
    fresh = QLinear(10, 6, bits=3, group_size=4)
    fresh.load_state_dict(layer.state_dict())
    for twin in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


def test_dtype_moves_bias_and_output_but_not_the_grid():
    layer, _ = quantized(nn.Linear(10, 6))
    before = layer.dequantized_weight()
    layer.to(torch.bfloat16)
    assert layer.weight_scale.dtype == torch.float32
    assert layer.bias.dtype == layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.dequantized_weight(), before)
    assert layer(torch.randn(2, 10, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer(torch.randn(2, 10)).dtype == torch.float32


def test_repr_shows_the_scheme():
    layer, _ = quantized(nn.Linear(10, 6), bits=3, group_size=4)
    assert repr(layer) == "QLinear(10, 6, group_size=4, bits=3, bias=True)"
    layer, _ = quantized(LAYERS["depthwise"][0], bits=2)
    assert "groups=4, bits=2, bias=True" in repr(layer)


@pytest.mark.parametrize("name", LAYERS)
def test_script_saved_and_loaded(name):
    module, shape = LAYERS[name]
    layer, _ = quantized(module, bits=3)
    x = torch.randn(shape)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x), layer(x))


@pytest.mark.parametrize("name", ["linear", "depthwise", "transposed", "tensorflow_same", "reflect"])
def test_export(name):
    module, shape = LAYERS[name]
    layer, _ = quantized(module, bits=3)
    x = torch.randn(shape)
    program = torch.export.export(layer, (x,))
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_compiles_in_one_graph(name):
    module, shape = LAYERS[name]
    layer, _ = quantized(module, bits=3)
    x = torch.randn(shape)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_packed_kernel_and_float_products_agree():
    """The kernel runs unless a gradient is wanted; both ways see the same codes."""
    layer, _ = quantized(nn.Linear(70, 40), bits=4, group_size=32)
    x = torch.randn(9, 70)
    floats = lambda: layer(x.clone().requires_grad_()).detach()  # noqa: E731
    assert layer.kernel_runs(x) and not layer.kernel_runs(x.clone().requires_grad_())
    torch.testing.assert_close(layer(x), floats(), rtol=1e-4, atol=1e-4)
    for quantizer in (
        UniformQuantizer(8, torch.tensor(0.02), torch.tensor(121.0)),
        UniformQuantizer(4, torch.tensor(0.3), torch.tensor(7.5)),
        DynamicQuantizer(8),
        DynamicQuantizer(8, symmetric=True),
        DynamicQuantizer(6, "tensor"),
    ):
        layer.input_quantizer = quantizer
        torch.testing.assert_close(layer(x), floats(), rtol=1e-5, atol=1e-5)
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    layer.input_quantizer = UniformQuantizer(8, torch.rand(70) + 0.1, torch.zeros(70))  # per channel: in floats
    torch.testing.assert_close(layer(x), floats())


def test_kernel_weight_follows_the_layer():
    layer, _ = quantized(nn.Linear(40, 20, bias=False), bits=3)
    x, wanted = torch.randn(4, 40), layer.kernel_weight.clone()
    y = layer(x)
    assert "kernel_weight" not in layer.state_dict()
    assert torch.equal(layer.to(torch.bfloat16).kernel_weight, wanted) and layer.kernel_grid.dtype == torch.float32
    assert torch.equal(layer.float()(x), y)
    meta = QLinear(40, 20, bits=3, bias=False).to("meta")
    assert meta.kernel_weight.numel() == 0
    other = meta.to_empty(device="cpu")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    assigned = QLinear(40, 20, bits=3, bias=False).to("meta")
    assigned.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(assigned.kernel_weight, wanted)


def test_swap_reaches_every_place_of_a_shared_layer():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    layer, _ = quantized(shared)
    swap_modules(model, {shared: layer})
    assert model[0] is model[2][0] is layer


def test_unknown_layer_is_named():
    with pytest.raises(TypeError, match="no quantized form of Bilinear; known: Linear, Conv1d"):
        from_float(nn.Bilinear(2, 2, 2), torch.zeros(2, 2), torch.ones(2, 1), torch.zeros(2, 1), 4)
