"""Packed linear layers on CUDA: equal to the CPU to the last bit, but where floats are multiplied. The kernels' own
logic also runs without a GPU: tests/cpp/test_cuda_linear.cpp, test_cuda_quantize_rows.cpp."""

import math

import pytest
import torch
from helpers import FLOAT_TYPES, assert_same, random
from torch import nn

from torchquant.kernels import linear_prepack, quantized_linear
from torchquant.nn import QLinear
from torchquant.nn.quantizers import UniformQuantizer
from torchquant.solvers import rtn_quantize

pytestmark = pytest.mark.parametrize("place", ["cuda"], indirect=True)

SHAPES = [(1, 1, 1), (3, 5, 7), (1, 64, 64), (6, 70, 200), (16, 130, 96), (0, 4, 4), (2, 64, 0), (1, 80, 4096)]
KINDS = ["uniform", "offset", "levels", "row_levels"]
KINDS_AND_BITS = [(kind, bits) for kind in KINDS for bits in (2, 3, 4, 6, 8) if bits <= 4 or kind[-6:] != "levels"]


def packed_layer(rows, columns, bits, group_size=0, kind="uniform", device="cpu"):
    """What `linear_prepack` makes of random codes, and its options."""
    g = random(0)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=g, dtype=torch.uint8)
    groups = 1 if group_size == 0 else -(-columns // group_size)
    scale = torch.rand(rows, groups, generator=g) + 0.01
    zero_point = torch.randint(0, 2**bits, (rows, groups), generator=g) + 0.5 if kind == "offset" else None
    levels = None
    if kind.endswith("levels"):
        shape = (2**bits,) if kind == "levels" else (rows, 2**bits)
        levels = torch.randint(-128, 128, shape, generator=g, dtype=torch.int8)
    on = lambda t: None if t is None else t.to(device)  # noqa: E731
    packed, grid, table = linear_prepack(
        on(codes), on(scale), on(zero_point), bits=bits, group_size=group_size, levels=on(levels)
    )
    options = {"bits": bits, "in_features": columns, "out_features": rows, "group_size": group_size, "levels": table}
    return (packed, grid), options


def on_both(x, layer, place, *arguments, **more):
    """The result on the CPU, and on `place`, brought to the CPU."""
    (packed, grid), options = layer
    move = lambda value: value.to(place) if isinstance(value, torch.Tensor) else value  # noqa: E731
    here = quantized_linear(x, packed, grid, *arguments, **options, **more)
    tensors = [move(t) for t in (x, packed, grid, *arguments)]
    there = quantized_linear(*tensors, **{k: move(v) for k, v in {**options, **more}.items()})
    assert there.device.type == place.type
    return here, there.cpu()


@pytest.mark.parametrize("kind, bits", KINDS_AND_BITS)
def test_packed_weights_are_equal(place, kind, bits):
    for group_size in (0, 24):
        here, options = packed_layer(70, 200, bits, group_size, kind)
        there, there_options = packed_layer(70, 200, bits, group_size, kind, place)
        assert all(t.device.type == place.type for t in there)
        assert_same([t.cpu() for t in there], here)
        assert_same(there_options["levels"].cpu(), options["levels"])


@pytest.mark.parametrize("input_bits", [8, 16])
@pytest.mark.parametrize("group_size", [0, 24, 32, 128])
@pytest.mark.parametrize("kind, bits", KINDS_AND_BITS)
def test_dynamic_inputs_are_equal(place, kind, bits, group_size, input_bits):
    for rows, outputs, columns in SHAPES:
        layer = packed_layer(outputs, columns, bits, group_size, kind)
        x = torch.randn(rows, columns, generator=random(1))
        here, there = on_both(x, layer, place, input_bits=input_bits)
        assert_same(there, here)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_grids_codes_and_epilogues_are_equal(place, dtype):
    layer = packed_layer(70, 200, 4, 64, "offset")
    x, bias = torch.randn(40, 200, generator=random(2)), torch.randn(70, generator=random(3))
    grid = {"input_scale": torch.tensor(0.03), "input_zero_point": torch.tensor(120.0)}
    codes = torch.randint(0, 256, (40, 200), generator=random(4), dtype=torch.uint8)
    rows = {"input_scale": torch.rand(40, 1, generator=random(5)), "input_zero_point": torch.full((40, 1), 99.0)}
    residual = torch.randn(40, 70, generator=random(6))
    for activation in ("none", "gelu", "silu"):
        more = {"activation": activation, "residual": residual}
        for inputs, options in ((x.to(dtype), grid), (codes, grid), (codes, rows), (x.to(dtype), {})):
            here, there = on_both(inputs, layer, place, bias, **options, **more)
            assert_same(there, here)


@pytest.mark.parametrize("rows", [1, 40])
def test_outputs_as_codes_are_equal(place, rows):
    layer = packed_layer(72, 200, 4, 64, "offset")
    x, bias = torch.randn(rows, 200, generator=random(13)), torch.randn(72, generator=random(14))
    for parts in (1, 3):
        scale = torch.rand(parts, generator=random(15)) + 0.5
        grid = {"output_scale": scale, "output_zero_point": torch.full((parts,), 120.0)}
        for activation in ("none", "gelu", "silu"):
            here, there = on_both(x, layer, place, bias, activation=activation, **grid)
            assert there.dtype == torch.uint8 and here.unique().numel() > 12
            assert_same(there, here)
        here, there = on_both(x, layer, place, bias, input_bits=16, **grid)
        assert (here.int() - there.int()).abs().max() <= (0 if rows == 1 else 1)


def weight_of(rows, columns, bits, group_size, kind):
    """The float64 weight of `packed_layer`, as a product with the unit matrix gives it."""
    (packed, grid), options = packed_layer(rows, columns, bits, group_size, kind)
    return quantized_linear(torch.eye(columns), packed, grid, **options, input_bits=16).double().T


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind, bits", KINDS_AND_BITS)
def test_halves_meet_the_weight_in_registers(place, kind, bits, dtype):
    """Within roundings of the output and, where they are not exact, of the weight's codes."""
    for columns, group_size in ((200, 0), (203, 0), (256, 32), (200, 24), (203, 24), (300, 128)):
        (packed, grid), options = packed_layer(70, columns, bits, group_size, kind, place)
        weight = weight_of(70, columns, bits, group_size, kind)
        bias = torch.randn(70, generator=random(16)).to(dtype)
        for rows in (1, 3, 16, 40, 64, 100):
            x = torch.randn(rows, columns, generator=random(17)).to(dtype)
            residual = torch.randn(rows, 70, generator=random(18)).to(dtype)
            arguments = (x.to(place), packed, grid, bias.to(place))
            got = quantized_linear(*arguments, **options, input_bits=16, residual=residual.to(place))
            assert got.dtype == dtype and got.shape == (rows, 70)
            wanted = x.double() @ weight.T + bias.double() + residual.double()
            magnitude = x.double().abs() @ weight.abs().T + bias.double().abs() + residual.double().abs()
            eps = torch.finfo(dtype).eps
            rounded = eps / 2 if (kind, bits, dtype) == ("offset", 8, torch.bfloat16) else 0
            assert ((got.cpu().double() - wanted).abs() <= eps * wanted.abs() + (rounded + 1e-5) * magnitude).all()


@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
def test_halves_to_codes(place, activation):
    layer = packed_layer(72, 200, 4, 64, "offset")
    x, bias = torch.randn(40, 200, generator=random(20)).half(), torch.randn(72, generator=random(21))
    for parts in (1, 3):
        scale = torch.rand(parts, generator=random(22)) + 0.5
        grid = {"output_scale": scale, "output_zero_point": torch.full((parts,), 120.0)}
        here, there = on_both(x, layer, place, bias, input_bits=16, activation=activation, **grid)
        assert there.dtype == torch.uint8 and here.unique().numel() > 12
        assert (here.int() - there.int()).abs().max() <= 1


@pytest.mark.parametrize("rows, columns, group_size", [(100, 700, 0), (100, 700, 32), (100, 700, 128), (150, 2100, 0)])
@pytest.mark.parametrize("kind, bits", KINDS_AND_BITS)
def test_many_rows_of_bytes_are_equal(place, kind, bits, rows, columns, group_size):
    layer = packed_layer(200, columns, bits, group_size, kind)
    x = torch.randn(rows, columns, generator=random(23))
    here, there = on_both(x, layer, place)
    assert_same(there, here)


def test_halves_anywhere_in_memory(place):
    (packed, grid), options = packed_layer(70, 64, 4, device=place)
    x = torch.randn(4, 66, generator=random(19)).to(place, torch.float16)
    for part in (x[:, 1:65], x[1:3, :64], x.reshape(-1)[1:65]):
        got = quantized_linear(part, packed, grid, **options, input_bits=16)
        assert_same(got, quantized_linear(part.clone(), packed, grid, **options, input_bits=16))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_many_rows_of_floats(place, dtype):
    """Within roundings of the output's dtype and of the CPU's 16-bit integers."""
    for kind, bits in KINDS_AND_BITS:
        layer = packed_layer(70, 200, bits, 48, kind)
        x = torch.randn(2, 70, 200, generator=random(7)).to(dtype)
        bias, residual = torch.randn(70, generator=random(8)), torch.randn(2, 70, 70, generator=random(9))
        here, there = on_both(x, layer, place, bias.to(dtype), input_bits=16, activation="silu", residual=residual)
        assert there.dtype == dtype and there.shape == here.shape
        scale = here.float().abs().max()
        assert (there.float() - here.float()).abs().max() <= (4 * torch.finfo(dtype).eps + 1e-4) * scale


def test_rows_that_are_not_finite_give_nan(place):
    layer = packed_layer(20, 40, 4)
    x = torch.randn(3, 40, generator=random(10))
    x[1, 7] = math.nan
    (packed, grid), options = layer
    grids = {"input_scale": torch.tensor(0.1, device=place), "input_zero_point": torch.tensor(128.0, device=place)}
    for more in ({}, {"input_bits": 16}, grids):
        options = {**options, "levels": None}
        for dtype in FLOAT_TYPES:
            got = quantized_linear(x.to(place, dtype), packed.to(place), grid.to(place), **options, **more)
            assert torch.isnan(got[1]).all() and torch.isfinite(got[[0, 2]]).all()


def test_a_product_can_be_captured_in_a_graph(place):
    """Nothing waits for the device."""
    (packed, grid), options = packed_layer(64, 128, 4, 32, device=place)
    x = torch.randn(1, 128, generator=random(11)).to(place)
    wanted = quantized_linear(x, packed, grid, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = quantized_linear(x, packed, grid, **options)
    got.zero_()
    graph.replay()
    assert_same(got, wanted)


def test_tensors_elsewhere_are_refused(place):
    (packed, grid), options = packed_layer(64, 128, 4, device=place)
    x = torch.ones(2, 128, device=place)
    cases = {
        "quantized_linear: packed must be on cuda:0, got cpu": (packed.cpu(), grid, None),
        "quantized_linear: grid must be on cuda:0, got cpu": (packed, grid.cpu(), None),
        "quantized_linear: bias must be on cuda:0, got cpu": (packed, grid, torch.ones(64)),
    }
    for text, tensors in cases.items():
        with pytest.raises(ValueError, match=text):
            quantized_linear(x, *tensors, **options)
    with pytest.raises(ValueError, match="linear_prepack: scale must be on cuda:0, got cpu"):
        linear_prepack(torch.ones(4, 8, dtype=torch.uint8, device=place), torch.ones(4, 1), bits=4)


@pytest.mark.parametrize("bits", [None, 8])
def test_layers_take_their_packed_weight_along(place, bits):
    module = nn.Linear(100, 30)
    layer = QLinear.from_float(module, *rtn_quantize(module.weight.detach(), bits=4, group_size=20)[:3], 4, 20)
    if bits is not None:
        layer.input_quantizer = UniformQuantizer(bits, torch.tensor(0.03), torch.tensor(100.0))
    x = torch.randn(5, 100, generator=random(12))
    here = layer(x)
    before = layer.kernel_weight
    layer.to(place)
    assert layer.kernel_weight.device.type == place.type and layer.kernel_grid.device.type == place.type
    assert_same(layer.kernel_weight.cpu(), before)
    assert_same(layer(x.to(place)).cpu(), here)
    assert_same(layer.to("meta").kernel_weight, torch.zeros(0, dtype=torch.uint8, device="meta"))
