"""Activation quantizers as modules, alone, in layers and in attention; simulated against integer arithmetic."""

import copy
import io
import pickle

import pytest
import torch
from helpers import random, scripted
from hypothesis import given, settings
from hypothesis import strategies as st
from nn.float_layers import LAYERS
from torch import nn

from torchquant.nn import QAttention, QLinear, from_float, layout
from torchquant.nn.quantizers import (
    DynamicQuantizer,
    SubsetQuantizer,
    TableQuantizer,
    UniformQuantizer,
    quantizer_from,
)
from torchquant.quantizers import subset_select, subset_universe, sulq_fit
from torchquant.solvers import rtn_quantize

SHAPE = (2, 6, 5, 4)  # [B, C, H, W] or [B, heads, tokens, channels]


def activations(seed=0, shape=SHAPE):
    return torch.randn(shape, generator=random(seed)) * 2 + 0.3


def probabilities():
    return activations().softmax(-1)


def table(variant="zero_exact", bits=3):
    eta, thresholds, exponents = sulq_fit(probabilities(), bits=bits, variant=variant)
    return TableQuantizer(bits, thresholds, exponents, eta, variant)


def subset(channels=None, **options):
    x = activations()
    x = x / x.abs().max()
    levels, _ = subset_select(x, subset_universe("dfsq"), levels=16, axis=None if channels is None else 1)
    return SubsetQuantizer(4, levels, **options)


SCALES = torch.rand(6, generator=random(5)) + 0.1
QUANTIZERS = {
    "tensor": (lambda: UniformQuantizer(4, torch.tensor(0.5), torch.tensor(6.0)), activations),
    "channel": (lambda: UniformQuantizer(3, SCALES, torch.arange(6.0), axis=1), activations),
    "dynamic token": (lambda: DynamicQuantizer(4), activations),
    "dynamic tensor": (lambda: DynamicQuantizer(8, "tensor", symmetric=True), activations),
    "dynamic channel": (lambda: DynamicQuantizer(2, "channel", axis=1), activations),
    "sulq": (table, probabilities),
    "log_sqrt2": (lambda: table("log_sqrt2", 4), probabilities),
    "subset": (subset, activations),
    "subset channels": (lambda: subset(6), activations),
    "subset relu": (lambda: subset(centre=False), lambda: activations().relu()),
    "subset static": (
        lambda: subset(mean=torch.arange(6) / 10, magnitude=torch.arange(6) + 2.0),
        activations,
    ),
}
each = pytest.mark.parametrize("name", QUANTIZERS)


def make(name):
    quantizer, x = QUANTIZERS[name]
    return quantizer(), x()


@each
def test_values_are_few_near_and_in_the_input_s_dtype(name):
    quantizer, x = make(name)
    y, codes = quantizer(x), quantizer.codes(x)
    assert codes.dtype == torch.uint8 and codes.shape == y.shape == x.shape
    assert int(codes.max()) < 2**quantizer.bits
    assert float((y - x).norm() / x.norm()) < (0.9 if quantizer.bits == 2 else 0.6)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert quantizer(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(quantizer(x.double()).float(), y)


@each
def test_state_description_and_copies(name):
    quantizer, x = make(name)
    wanted = quantizer(x)
    fresh = quantizer_from(quantizer.describe())
    assert not list(quantizer.parameters())
    fresh.load_state_dict(quantizer.state_dict())
    for twin in (fresh, copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), quantizer.copy()):
        assert type(twin) is type(quantizer) and twin.describe() == quantizer.describe()
        assert torch.equal(twin(x), wanted) and repr(twin) == repr(quantizer)


@each
def test_dtype_does_not_round_the_buffers(name):
    quantizer, x = make(name)
    wanted = quantizer(x)
    assert torch.equal(quantizer.to(torch.bfloat16)(x), wanted)
    assert all(buffer.dtype == torch.float32 for buffer in quantizer.buffers())


@each
def test_script(name):
    quantizer, x = make(name)
    loaded = scripted(quantizer)
    assert torch.equal(loaded(x), quantizer(x)) and torch.equal(loaded.codes(x), quantizer.codes(x))


@each
def test_export_and_compile(name):
    quantizer, x = make(name)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(quantizer, (x,), dynamic_shapes=({0: batch},))
    assert torch.equal(program.module()(torch.cat([x, x])), quantizer(torch.cat([x, x])))
    assert torch.equal(torch.compile(quantizer, fullgraph=True, backend="aot_eager")(x), quantizer(x))


@each
def test_without_values(name):
    quantizer, x = make(name)
    assert quantizer(x[:0]).shape == x[:0].shape


@each
def test_gradient_passes_but_for_clipped_values(name):
    quantizer, x = make(name)
    x.requires_grad_()
    y = quantizer.straight_through(x)
    torch.testing.assert_close(y.detach(), quantizer(x.detach()), rtol=0, atol=2e-6)
    y.sum().backward()
    assert torch.equal(x.grad, quantizer.inside(x.detach()).float())
    assert 0.5 < float(x.grad.mean()) <= 1


def test_what_is_clipped():
    quantizer = UniformQuantizer(2, torch.tensor(1.0), torch.tensor(1.0))  # -1, 0, 1, 2
    x = torch.tensor([-3.0, -1.4, 0.2, 2.4, 2.6])
    assert quantizer.inside(x).tolist() == [False, True, True, True, False]
    assert quantizer.bounds() == (-1.0, 2.0)
    assert table().bounds()[0] == 0.0
    assert all(torch.isnan(torch.tensor(DynamicQuantizer(4).bounds())))


@given(bits=st.integers(2, 8), scale=st.floats(1e-3, 10), zero=st.integers(-3, 260), seed=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_quantizing_twice_changes_nothing(bits, scale, zero, seed):
    quantizer = UniformQuantizer(bits, torch.tensor(scale), torch.tensor(float(zero)))
    once = quantizer(activations(seed))
    assert torch.equal(quantizer.codes(once), quantizer.codes(activations(seed)))
    torch.testing.assert_close(quantizer(once), once)


def test_wrong_settings():
    with pytest.raises(ValueError, match=r"UniformQuantizer: bits must be 2..8, got 9"):
        UniformQuantizer(9, torch.tensor(1.0), torch.tensor(0.0))
    with pytest.raises(ValueError, match="granularity must be one of tensor, token, channel, got 'row'"):
        DynamicQuantizer(4, "row")
    with pytest.raises(ValueError, match=r"levels must be at most 2\^bits = 4, got 5"):
        SubsetQuantizer(2, torch.arange(5.0))
    with pytest.raises(ValueError, match="class must be one of UniformQuantizer, .*, got 'Other'"):
        quantizer_from({"class": "Other"})


@pytest.mark.parametrize("centre", [True, False])
def test_subset_zero_and_constant_channels(centre):
    x = activations(shape=(2, 3, 4, 4))
    x[0, 1], x[1, 2] = 0.0, 0.7
    levels, _ = subset_select(x / x.abs().max(), subset_universe("dfsq"), levels=16)
    y = SubsetQuantizer(4, levels, centre=centre)(x)
    assert torch.equal(y[0, 1], torch.zeros(4, 4))
    torch.testing.assert_close(y[1, 2], x[1, 2], rtol=0.1 if not centre else 1e-6, atol=0)


# --- in layers ---


def quantized_layer(name, quantizer=None, bits=3):
    module, shape = LAYERS[name]
    matrix = layout.to_matrix(module)
    layer = from_float(module, *rtn_quantize(matrix, bits=bits), bits)
    plain = copy.deepcopy(layer)
    axis = layout.channel_axis(module)
    layer.input_quantizer = quantizer or UniformQuantizer(4, torch.tensor(0.3), torch.tensor(7.0), axis)
    return layer, plain, torch.randn(shape, generator=random(1))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_quantize_their_input(name):
    layer, plain, x = quantized_layer(name)
    # Without a quantizer a layer takes 16-bit integers of its input.
    torch.testing.assert_close(layer(x), plain(layer.input_quantizer(x)), rtol=1e-4, atol=1e-4)
    assert not torch.equal(layer(x), plain(x))
    torch.testing.assert_close(scripted(layer)(x), layer(x))


@pytest.mark.parametrize("name", ["linear", "depthwise", "transposed"])
def test_layers_with_a_quantizer_export_and_keep_their_state(name):
    layer, plain, x = quantized_layer(name)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))
    assert set(layer.state_dict()) - set(plain.state_dict()) == {"input_quantizer.scale", "input_quantizer.zero_point"}
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(layer)
    other.input_quantizer.scale.fill_(1.0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), layer(x))
    assert "(input_quantizer): UniformQuantizer(bits=4" in repr(layer)


# --- simulated and integer arithmetic ---


def powers_of_two(like):
    """Scales with which float32 arithmetic on codes is exact, so that nothing has to be rounded to compare."""
    return torch.exp2(torch.floor(torch.log2(like)))


def integer_linear(layer: QLinear, quantizer: UniformQuantizer, x):
    """``sum (c_x - z_x) (c_w - z_w)`` in int64, with zero points doubled because half-integral ones are allowed."""
    inputs = 2 * quantizer.codes(x).long() - (2 * quantizer.zero_point).long()
    codes = ((layer.matrix() / layer.weight_scale) + layer.weight_zero_point).round().long()
    weights = 2 * codes - (2 * layer.weight_zero_point).long()
    return inputs @ weights.t(), quantizer.scale.double() * layer.weight_scale[:, 0].double() / 4


@pytest.mark.parametrize("grid", ["asymmetric", "symmetric", "midrise"])
@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 8), (8, 8)])
@pytest.mark.parametrize("exact", [True, False])
def test_linear_is_an_integer_product(grid, bits, exact):
    module = nn.Linear(40, 12, bias=False)
    codes, scale, zero_point = rtn_quantize(module.weight.detach(), bits=bits[0], grid=grid)
    x = torch.randn(9, 40, generator=random(3))
    step = torch.tensor(6.0 / 2 ** bits[1])
    if exact:
        scale, step = powers_of_two(scale), powers_of_two(step)
    layer = from_float(module, codes, scale, zero_point, bits[0])
    quantizer = UniformQuantizer(bits[1], step, torch.tensor(float(2 ** (bits[1] - 1) - 1)))
    layer.input_quantizer = quantizer
    integers, factor = integer_linear(layer, quantizer, x)
    simulated = layer(x).double() / factor
    if exact:
        assert torch.equal(simulated, integers.double())
    assert torch.equal(simulated.round().long(), integers)


def test_attention_products_are_integer_products():
    q, k, v = (UniformQuantizer(4, torch.tensor(0.25), torch.tensor(float(z))) for z in (7, 8, 5))
    weights = UniformQuantizer(4, torch.tensor(1 / 16), torch.tensor(0.0))
    product, seen = QAttention(), {}
    product.query, product.key, product.value, product.softmax = q, k, v, weights
    weights.register_forward_pre_hook(lambda m, args: seen.update(softmax=args[0]))
    x = [activations(seed, (2, 3, 7, 8)) for seed in range(3)]
    mixed, _ = product(*x, scale=0.125)
    integers = [
        (quantizer.codes(t).long() - int(quantizer.zero_point)) for quantizer, t in zip((q, k, v), x, strict=True)
    ]
    scores = (integers[0] @ integers[1].transpose(-2, -1)).float() * (0.25 * 0.25 * 0.125)
    assert torch.equal(seen["softmax"], scores.softmax(-1))
    codes = weights.codes(seen["softmax"]).long()
    assert torch.equal(mixed, (codes @ integers[2]).float() * (0.25 / 16))
