"""QLayerNorm: codes of its float layer's output, and that output itself wherever codes would not do."""

import copy
import io

import pytest
import torch
from helpers import FLOAT_TYPES, assert_same, random, scripted
from torch import nn

from torchquant.nn import QLayerNorm, QLinear
from torchquant.nn.quantizers import UniformQuantizer
from torchquant.quantizers import uniform_quantize
from torchquant.solvers import rtn_quantize

SCALE, ZERO_POINT = torch.tensor(0.025), torch.tensor(120.0)
AFFINE = {"affine": {}, "no bias": {"bias": False}, "plain": {"elementwise_affine": False}}


def float_norm(columns=48, **options):
    norm = nn.LayerNorm(columns, **options).eval()
    for parameter, seed in zip(norm.parameters(), (1, 2), strict=False):
        parameter.data = torch.rand(parameter.shape, generator=random(seed)) + 0.5
    return norm


def quantized(norm=None, bits=8):
    return QLayerNorm(float_norm() if norm is None else norm, SCALE, ZERO_POINT, bits)


def inputs(shape=(2, 9, 48), seed=0):
    return torch.randn(shape, generator=random(seed)) + 0.3


def codes_of(y, bits=8):
    return uniform_quantize(y, SCALE, ZERO_POINT, bits=bits)


def assert_codes(found, y, bits=8):
    """Those of the float output y, or of one beside it: a tie may fall the other way."""
    assert found.dtype == torch.uint8
    low, high = codes_of(y - 1e-5, bits), codes_of(y + 1e-5, bits)
    assert ((found == low) | (found == high)).all() and (low == high).double().mean() > 0.99


# --- codes ---


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("affine", AFFINE)
@torch.no_grad()
def test_codes_of_the_float_output(affine, bits):
    norm, x = float_norm(**AFFINE[affine]), inputs()
    assert_codes(quantized(norm, bits)(x), norm(x), bits)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@torch.no_grad()
def test_the_grid_stays_as_it_is_in_every_dtype(dtype):
    norm, x = quantized().to(dtype), inputs().to(dtype)
    assert norm.output_scale.dtype == norm.output_zero_point.dtype == torch.float32
    assert norm.output_scale == SCALE and norm.weight.dtype == dtype
    assert_codes(norm(x), copy.deepcopy(norm).float().train()(x.float()))


@torch.no_grad()
def test_a_linear_layer_takes_either():
    linear = nn.Linear(48, 20)
    layer = QLinear.from_float(linear, *rtn_quantize(linear.weight, bits=4), bits=4)
    layer.input_quantizer = UniformQuantizer(8, SCALE, ZERO_POINT)
    norm, x = quantized(), inputs()
    codes = norm(x)
    floats = layer.input_quantizer(norm.train()(x))
    torch.testing.assert_close(layer(codes), layer(floats), rtol=0, atol=0.02)
    assert_same(layer(codes), layer((codes - ZERO_POINT) * SCALE))


# --- floats ---


def assert_floats(norm, wanted, x):
    assert not norm.gives_codes(x)
    assert_same(norm(x), wanted(x))


def test_floats_in_training_and_where_a_gradient_is_wanted():
    norm, x = float_norm(), inputs()
    made = quantized(norm)
    assert_floats(made, norm, x)  # the parameters' gradients
    with torch.no_grad():
        assert made.gives_codes(x)
        assert_floats(made.train(), norm, x)
    made = made.eval().requires_grad_(False)
    assert made.gives_codes(x)
    assert_floats(made, norm, x.clone().requires_grad_())
    made.requires_grad_(True)(x).sum().backward()
    assert made.weight.grad is norm.weight.grad and norm.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_floats_where_the_operator_does_not_serve():
    several = nn.LayerNorm([9, 48]).eval()
    assert_floats(quantized(several), several, inputs())
    double = float_norm().double()
    assert_floats(quantized(double), double, inputs().double())
    for norm in (quantized(), quantized(float_norm(elementwise_affine=False))):
        with pytest.raises(RuntimeError, match="normalized_shape"):
            norm(inputs((2, 47)))


# --- as a module ---


@pytest.mark.parametrize("affine", AFFINE)
def test_parameters_are_those_of_the_float_layer(affine):
    norm = float_norm(**AFFINE[affine])
    made = quantized(norm)
    assert list(made.state_dict()) == list(norm.state_dict())
    assert made.weight is norm.weight and made.bias is norm.bias
    made.load_state_dict({key: value + 1 for key, value in norm.state_dict().items()})
    assert repr(made) == repr(norm).replace("LayerNorm", "QLayerNorm")[:-1] + ", output_bits=8)"
    assert made.training == norm.training and quantized(float_norm().train()).training


def test_copies_and_files():
    made, x = quantized().requires_grad_(False), inputs()
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(made), torch.load(buffer, weights_only=False)):
        assert_same(other(x), made(x))


@pytest.mark.parametrize("affine", AFFINE)
@torch.no_grad()
def test_script_and_export(affine):
    made, x = quantized(float_norm(**AFFINE[affine])), inputs()
    for other in (scripted(made), torch.export.export(made, (x,)).module()):
        assert_same(other(x), made(x))
    program = scripted(made)
    assert_same(program.train()(x), made.train()(x))


def test_export_where_gradients_are_enabled():
    """An exported graph is for inference."""
    made, x = quantized(), inputs()
    exported = torch.export.export(made, (x,))
    assert any("quantized_layer_norm" in str(node.target) for node in exported.graph.nodes)
    with torch.no_grad():
        assert_same(exported.module()(x), made(x))


def test_errors():
    with pytest.raises(ValueError, match=r"QLayerNorm: output_scale must be one number, got \[2\]"):
        QLayerNorm(float_norm(), torch.ones(2), ZERO_POINT)
    with pytest.raises(ValueError, match=r"QLayerNorm: output_zero_point must be one number, got \[0\]"):
        QLayerNorm(float_norm(), SCALE, torch.ones(0))
    with pytest.raises(ValueError, match=r"QLayerNorm: output_bits must be 2..8, got 9"):
        QLayerNorm(float_norm(), SCALE, ZERO_POINT, 9)
