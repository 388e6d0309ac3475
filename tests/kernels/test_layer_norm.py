"""quantized_layer_norm against LayerNorm in float64, and its codes against those of uniform_quantize."""

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOAT_TYPES, assert_same, check_op, layouts, random, threads, tier

from torchquant import _C
from torchquant.kernels import quantized_layer_norm
from torchquant.quantizers import uniform_quantize

OP = torch.ops.torchquant.quantized_layer_norm.default
SHAPES = [(1, 1), (5, 1), (3, 2), (7, 31), (2, 3, 32), (4, 33), (2, 197, 384), (1, 1000), (2, 3, 5, 97), (70, 64)]
# Scale, zero point, bits: in the middle, at the ends, no integer, coarse; the last two grids divide.
GRIDS = [(0.03, 128.0, 8), (0.02, 0.0, 8), (0.5, 7.5, 4), (1.0, 1.0, 2), (0.031, 2.0**21, 8), (2.0**-70, 100.0, 8)]
TIE = 1e-4  # how far from a tie rounding can move a value, in steps of a grid


def inputs(shape, dtype=torch.float32, seed=0, offset=0.5):
    x = torch.randn(shape, generator=random(seed)) + offset
    weight = torch.rand(shape[-1], generator=random(seed + 1)) + 0.5
    bias = torch.randn(shape[-1], generator=random(seed + 2))
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def grid(scale=0.03, zero_point=128.0, bits=8, place="cpu"):
    return {
        "output_scale": torch.tensor(scale, device=place),
        "output_zero_point": torch.tensor(zero_point, device=place),
        "output_bits": bits,
    }


def exact(x, weight=None, bias=None, eps=1e-5):
    weight, bias = (None if t is None else t.double() for t in (weight, bias))
    return F.layer_norm(x.double(), x.shape[-1:], weight, bias, eps)


def assert_codes(found, y, options, tie=TIE):
    """The codes of y (float64), or the other neighbour beside a tie."""
    place = y / options["output_scale"].double().cpu() + options["output_zero_point"].double().cpu()
    top = 2 ** options["output_bits"] - 1
    low, high = ((place + d).round().clamp(0, top) for d in (-tie, tie))
    found = found.cpu().double()
    assert ((found == low) | (found == high)).all()


# --- values ---


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_those_of_the_exact_values(place, shape, dtype):
    x, weight, bias = inputs(shape, dtype)
    for scale, zero_point, bits in GRIDS[:4]:
        options = grid(scale, zero_point, bits, place)
        for pair in ((weight, bias), (weight, None), (None, bias), (None, None)):
            given = [None if t is None else t.to(place) for t in pair]
            found = quantized_layer_norm(x.to(place), *given, **options)
            assert found.dtype == torch.uint8 and found.shape == x.shape
            assert_codes(found, exact(x, *pair), options)


@pytest.mark.parametrize("scale, zero_point, bits", GRIDS)
def test_codes_are_those_of_uniform_quantize(each_tier, scale, zero_point, bits):
    """Rows whose values are known: normal values of 1 and -1, times a weight that meets and misses ties."""
    weight = torch.arange(-600, 600).float() * scale / 4 + zero_point * scale * (zero_point > 255)
    x = torch.ones(1200)
    x[1::2] = -1
    options = grid(scale, zero_point, bits)
    wanted = uniform_quantize(x * weight, options["output_scale"], options["output_zero_point"], bits=bits)
    assert_same(quantized_layer_norm(x, weight, eps=0.0, **options), wanted)


@pytest.mark.parametrize("offset", [0.0, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("columns", [2, 17, 96, 384, 768, 4096])
def test_values_are_as_near_as_those_of_torch(each_tier, columns, offset):
    """With the exact values for a bias, codes of fine steps say how far from them the operator is."""
    x, _, _ = inputs((64, columns), offset=offset)
    wanted, step = exact(x), 2.0**-26
    errors = []
    for row, y in zip(x, wanted, strict=True):
        codes = quantized_layer_norm(row, None, -y.float(), **grid(step, 128.0))
        errors.append((codes.double() - 128) * step + (y.float().double() - y))
    error = torch.stack(errors).abs()
    of_torch = (F.layer_norm(x, (columns,)).double() - wanted).abs()
    assert (error <= 5 * 2.0**-24 * wanted.abs().clamp_min(0.25)).all()
    assert error.max() <= 1.5 * of_torch.max() + 2.0**-25
    assert error.square().mean().sqrt() <= 1.2 * of_torch.square().mean().sqrt() + 2.0**-27


def test_constant_rows_are_the_bias(each_tier):
    bias = torch.linspace(-3, 3, 50)
    options = grid()
    wanted = uniform_quantize(bias, options["output_scale"], options["output_zero_point"], bits=8)
    for value in (0.0, 1.0, -0.1, 1e4, 12345.678, 1e-30):
        assert_same(quantized_layer_norm(torch.full((50,), value), None, bias, **options), wanted)


def test_eps_is_added_to_the_variance(place):
    x, weight, bias = inputs((20, 40))
    for eps in (0.0, 1e-12, 1e-3, 2.0):
        found = quantized_layer_norm(*(t.to(place) for t in (1e-2 * x, weight, bias)), eps=eps, **grid(place=place))
        assert_codes(found, exact(1e-2 * x, weight, bias, eps), grid())


# --- the same bits ---


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (3000, 33)])
def test_the_same_codes_on_every_tier_and_with_any_threads(shape, dtype):
    x, weight, bias = inputs(shape, dtype, offset=3.0)
    for numbers in GRIDS:
        found = []
        for name in _C.cpu_tiers():
            for count in (1, 2, 5) if name == _C.cpu_tiers()[-1] else (1,):
                with tier(name), threads(count):
                    found.append(quantized_layer_norm(x, weight, bias, **grid(*numbers)))
        for other in found[1:]:
            assert_same(other, found[0])


def test_rows_do_not_depend_on_each_other(each_tier):
    x, weight, bias = inputs((300, 70))
    together = quantized_layer_norm(x, weight, bias, **grid())
    alone = [quantized_layer_norm(row, weight, bias, **grid()) for row in x]
    assert_same(together, torch.stack(alone))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_half_types_are_widened(each_tier, dtype):
    x, weight, bias = inputs((300, 70), dtype)
    wanted = quantized_layer_norm(x.float(), weight.float(), bias.float(), **grid())
    assert_same(quantized_layer_norm(x, weight, bias, **grid()), wanted)
    assert_same(quantized_layer_norm(x, weight.float(), bias.double(), **grid()), wanted)


def test_any_layout(place):
    x, weight, bias = (t.to(place) for t in inputs((30, 48)))
    options = grid(place=place)
    wanted = quantized_layer_norm(x, weight, bias, **options)
    wide = torch.stack([weight, bias], 1)
    for view in layouts(x).values():
        assert_same(quantized_layer_norm(view, wide[:, 0], wide[:, 1], **options), wanted)
    assert_same(quantized_layer_norm(x.view(2, 3, 5, 48), weight, bias, **options), wanted.view(2, 3, 5, 48))
    options["output_scale"] = options["output_scale"].view(1)
    options["output_zero_point"] = options["output_zero_point"].view(1, 1, 1)
    assert_same(quantized_layer_norm(x, weight, bias, **options), wanted)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 7), (0,)])
def test_nothing_in_nothing_out(place, shape):
    options = grid(place=place)
    found = quantized_layer_norm(torch.zeros(shape, device=place), **options)
    assert found.shape == shape and found.dtype == torch.uint8


# --- what is not finite ---


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_x_must_be_finite(each_tier, value, dtype):
    for columns in (1, 5, 40, 384):
        for column in {0, columns // 2, columns - 1}:
            x = torch.zeros(50, columns, dtype=dtype)
            x[37, column] = value
            with pytest.raises(ValueError, match="quantized_layer_norm: x must be finite, got 1 NaN or Inf"):
                quantized_layer_norm(x, **grid())


def test_both_infinities_are_found(each_tier):
    x = torch.zeros(2, 40)
    x[0, 3], x[0, 35] = float("inf"), -float("inf")
    with pytest.raises(ValueError, match="x must be finite, got 2 NaN or Inf"):
        quantized_layer_norm(x, **grid())


def test_codes_of_nan_are_zero(each_tier):
    """Sums beyond float32, and NaN from the weight; other rows and columns are as ever."""
    x, weight, _ = inputs((3, 40))
    wanted = quantized_layer_norm(x, weight, **grid())
    x[1] = 3e38
    wanted[1] = 0
    weight[7] = float("nan")
    wanted[:, 7] = 0
    assert_same(quantized_layer_norm(x, weight, **grid()), wanted)


# --- errors ---

ERRORS = {
    "x must be float32, float16 or bfloat16, got Double": (TypeError, {"x": torch.zeros(2, 4).double()}),
    "x must be float32, float16 or bfloat16, got Byte": (TypeError, {"x": torch.zeros(2, 4).byte()}),
    r"x must be \[..., K\], got \[\]": (ValueError, {"x": torch.zeros(())}),
    r"weight must have shape \[4\], got \[3\]": (ValueError, {"weight": torch.zeros(3)}),
    r"bias must have shape \[4\], got \[1, 4\]": (ValueError, {"bias": torch.zeros(1, 4)}),
    "output_scale must be float32, got Half": (TypeError, {"output_scale": torch.ones(()).half()}),
    r"output_scale must be one number, got \[2\]": (ValueError, {"output_scale": torch.ones(2)}),
    "output_scale must be positive, got 0": (ValueError, {"output_scale": torch.tensor(0.0)}),
    "output_scale must be positive, got -1": (ValueError, {"output_scale": torch.tensor(-1.0)}),
    "output_scale must be positive, got nan": (ValueError, {"output_scale": torch.tensor(float("nan"))}),
    "output_scale must be positive, got inf": (ValueError, {"output_scale": torch.tensor(float("inf"))}),
    "output_zero_point must be float32, got Int": (TypeError, {"output_zero_point": torch.tensor(3).int()}),
    r"output_zero_point must be one number, got \[0\]": (ValueError, {"output_zero_point": torch.ones(0)}),
    "output_zero_point must be finite": (ValueError, {"output_zero_point": torch.tensor(float("inf"))}),
    "bits must be 2..8, got 1": (ValueError, {"output_bits": 1}),
    "bits must be 2..8, got 9": (ValueError, {"output_bits": 9}),
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors_name_operator_and_argument(text):
    error, changed = ERRORS[text]
    arguments = {"x": torch.zeros(2, 4), **grid(), **changed}
    with pytest.raises(error, match="quantized_layer_norm: " + text):
        quantized_layer_norm(**arguments)


# --- interfaces ---


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 17)])
def test_opcheck(shape, dtype):
    x, weight, bias = inputs(shape, dtype)
    check_op(OP, (x, weight, bias), grid())
    check_op(OP, (x,), {**grid(), "eps": 1e-3})
