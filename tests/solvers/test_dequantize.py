"""dequantize and quantization_error: values of codes, and how far they move a layer's output."""

import pytest
import torch
from helpers import BITS, GRIDS, LAYERS, assert_same, check_op, layouts, scripted, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from solvers import reference

from torchquant.solvers import dequantize, quantization_error, rtn_quantize

DEQUANTIZE = torch.ops.torchquant.dequantize.default
ERROR = torch.ops.torchquant.quantization_error.default


def case(rows: int, columns: int, group_size: int, place: torch.device, bits: int = 3) -> tuple[torch.Tensor, ...]:
    layer = LAYERS["correlated"](rows, columns)
    weight, gram = layer.weight.to(place), layer.gram.to(place)
    return weight, gram, *rtn_quantize(weight, bits=bits, group_size=group_size)


@pytest.mark.parametrize("group_size", [0, 16, 7, 1, 100])
def test_values_are_code_minus_zero_point_times_scale(place, group_size):
    _, _, codes, scale, zero_point = case(9, 45, group_size, place)
    got = dequantize(codes, scale, zero_point, group_size=group_size)
    assert got.dtype == torch.float32 and got.is_contiguous()
    wanted = reference.dequantize(codes, scale, zero_point, group_size)
    torch.testing.assert_close(got.double().cpu(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", BITS)
def test_every_code_survives_the_way_to_its_value_and_back(place, bits, grid):
    codes = torch.arange(2**bits, dtype=torch.uint8, device=place).repeat(5, 1)
    scale = torch.tensor([[1e-6], [0.013], [1.0], [7.7], [3e5]], device=place)
    zero = {"asymmetric": 1.0, "symmetric": 2.0 ** (bits - 1), "midrise": (2**bits - 1) / 2}[grid]
    zero_point = torch.full_like(scale, zero)
    value = dequantize(codes, scale, zero_point)
    assert torch.equal(torch.round(value / scale + zero_point), codes.float())


@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize("group_size", [0, 16])
def test_error_is_the_row_objective(place, name, group_size):
    layer = LAYERS[name](9, 45)
    weight, gram = layer.weight.to(place), layer.gram.to(place)
    quantized = rtn_quantize(weight, bits=3, group_size=group_size)
    got = quantization_error(weight, gram, *quantized, group_size=group_size)
    assert got.shape == (weight.shape[0],) and got.dtype == torch.float32
    wanted = reference.objective(weight, gram, reference.dequantize(*quantized, group_size))
    torch.testing.assert_close(got.double().cpu(), wanted, rtol=1e-3, atol=1e-5 * wanted.max().item() + 1e-30)


def test_error_is_the_squared_change_of_the_outputs(place):
    layer = LAYERS["correlated"](6, 30)
    quantized = rtn_quantize(layer.weight.to(place), bits=2)
    change = layer.x @ (layer.weight.double() - reference.dequantize(*quantized)).T
    got = quantization_error(layer.weight.to(place), layer.gram.to(place), *quantized)
    torch.testing.assert_close(got.double().cpu(), change.square().sum(0), rtol=1e-4, atol=0)


def test_one_gram_for_every_block_of_rows(place):
    layers = [LAYERS["correlated"](4, 9, seed=seed) for seed in range(3)]
    weight, grams = torch.cat([x.weight for x in layers]).to(place), torch.stack([x.gram for x in layers]).to(place)
    quantized = rtn_quantize(weight, bits=2)
    got = quantization_error(weight, grams, *quantized)
    for b in range(3):
        rows = slice(4 * b, 4 * b + 4)
        alone = quantization_error(weight[rows], grams[b], *(t[rows] for t in quantized))
        torch.testing.assert_close(got[rows], alone, rtol=1e-6, atol=0)


def test_values_on_the_grid_have_no_error(place):
    _, gram, *quantized = case(6, 30, 0, place)
    assert quantization_error(dequantize(*quantized), gram, *quantized).abs().max() == 0


def test_threads_and_layouts(each_tier):
    weight, gram, codes, scale, zero_point = case(130, 33, 8, torch.device("cpu"))
    wanted = quantization_error(weight, gram, codes, scale, zero_point, group_size=8)
    for count in (1, 2, 8):
        with threads(count):
            assert_same(quantization_error(weight, gram, codes, scale, zero_point, group_size=8), wanted)
    values = dequantize(codes, scale, zero_point, group_size=8)
    for view in layouts(codes).values():
        assert_same(dequantize(view, scale, zero_point, group_size=8), values)
        assert_same(quantization_error(weight, gram, view, scale, zero_point, group_size=8), wanted)


def test_opcheck(place):
    weight, gram, codes, scale, zero_point = case(6, 20, 8, place)
    check_op(DEQUANTIZE, (codes, scale, zero_point), {"group_size": 8})
    check_op(ERROR, (weight, gram, codes, scale, zero_point), {"group_size": 8})
    for rows, columns in ((0, 5), (3, 0)):
        empty = torch.empty(rows, columns, device=place)
        codes, scale, zero_point = rtn_quantize(empty, bits=3)
        check_op(DEQUANTIZE, (codes, scale, zero_point))
        check_op(ERROR, (empty, torch.zeros(columns, columns, device=place), codes, scale, zero_point))
        error = quantization_error(empty, torch.zeros(columns, columns, device=place), codes, scale, zero_point)
        assert torch.equal(error, torch.zeros(rows, device=place))


def script_dequantize(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor):
    return torch.ops.torchquant.dequantize(codes, scale, zero_point, group_size=8)


def test_torchscript_gives_the_same(place):
    _, _, *quantized = case(5, 30, 8, place)
    assert_same(scripted(script_dequantize)(*quantized), script_dequantize(*quantized))


def test_errors_name_the_argument(place):
    weight, gram, codes, scale, zero_point = case(4, 8, 0, place)
    for operator, head in ((dequantize, ()), (quantization_error, (weight, gram))):
        name = operator.__name__
        with pytest.raises(TypeError, match=f"{name}: codes must be uint8, got Int"):
            operator(*head, codes.int(), scale, zero_point)
        with pytest.raises(ValueError, match=rf"{name}: scale must have shape \[4, 1\], got \[4, 2\]"):
            operator(*head, codes, scale.repeat(1, 2), zero_point)
        with pytest.raises(ValueError, match=rf"{name}: zero_point must have shape \[4, 2\], got \[4, 1\]"):
            operator(*head, codes, scale.repeat(1, 2), zero_point, group_size=4)
        with pytest.raises(ValueError, match=f"{name}: group_size must be 0 .* or positive, got -3"):
            operator(*head, codes, scale, zero_point, group_size=-3)
    with pytest.raises(ValueError, match=r"dequantize: codes must be a matrix \[N, K\], got shape \[8\]"):
        dequantize(codes[0], scale, zero_point)
    with pytest.raises(ValueError, match=r"quantization_error: codes must have shape \[4, 8\], got \[4, 7\]"):
        quantization_error(weight, gram, codes[:, :7], scale, zero_point)
    with pytest.raises(ValueError, match="quantization_error: gram must be square of size K=8"):
        quantization_error(weight, gram[:7], codes, scale, zero_point)
    with pytest.raises(ValueError, match="quantization_error: weight must be finite, got 32 NaN or Inf"):
        quantization_error(weight * float("nan"), gram, codes, scale, zero_point)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 12), st.integers(0, 40)),
    bits=st.integers(2, 8),
    group_size=st.integers(0, 45),
    layout=st.sampled_from(["transposed", "sliced", "strided"]),
    scale_type=st.sampled_from([torch.float32, torch.float16, torch.float64]),
)
def test_any_codes(shape, bits, group_size, layout, scale_type):
    generator = torch.Generator().manual_seed(2)
    groups = 1 if group_size == 0 else -(-shape[1] // group_size)
    codes = torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)
    scale = torch.rand(shape[0], groups, generator=generator).to(scale_type)
    zero_point = torch.randint(2**bits, (shape[0], groups), generator=generator).to(scale_type)
    got = dequantize(layouts(codes)[layout], scale, zero_point, group_size=group_size)
    wanted = reference.dequantize(codes, scale, zero_point, group_size)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=0)
