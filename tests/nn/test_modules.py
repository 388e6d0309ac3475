"""The quantized layers: right numbers, and everything that PyTorch does to a module."""

import copy
import io
import pickle

import pytest
import torch
from nn.float_layers import LAYERS
from torch import nn

from torchquant.nn import QLinear, from_float, layout, swap_modules
from torchquant.nn.storage import pack_codes, unpack_codes
from torchquant.solvers import rtn_quantize


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 32, 33, 96])
def test_pack_round_trip_and_size(bits, columns):
    codes = torch.randint(0, 2**bits, (3, columns), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, -(-columns * bits // 32))
    assert torch.equal(unpack_codes(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_pack_is_one_little_endian_bit_string(bits):
    codes = torch.randint(0, 2**bits, (2, 21), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for row, words in zip(codes.tolist(), pack_codes(codes, bits).tolist(), strict=True):
        number = sum(code << (i * bits) for i, code in enumerate(row))
        assert [w & 0xFFFFFFFF for w in words] == [(number >> (32 * i)) & 0xFFFFFFFF for i in range(len(words))]


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
        torch.testing.assert_close(layer(x), same(x), rtol=1e-5, atol=1e-6)
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


def test_swap_reaches_every_place_of_a_shared_layer():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    layer, _ = quantized(shared)
    swap_modules(model, {shared: layer})
    assert model[0] is model[2][0] is layer


def test_unknown_layer_is_named():
    with pytest.raises(TypeError, match="no quantized form of Bilinear; known: Linear, Conv1d"):
        from_float(nn.Bilinear(2, 2, 2), torch.zeros(2, 2), torch.ones(2, 1), torch.zeros(2, 1), 4)
