"""CUDA against CPU. Where no matrix product decides, codes are equal to the last bit; elsewhere the two devices' BLAS
round differently, and a near tie may fall the other way and take the rest of its row with it. The kernels' own logic
also runs without a GPU: tests/cpp/test_cuda_kernels.cpp."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import FLOAT_TYPES, GRIDS, LAYERS, Layer, assert_same, heavy_tailed, random
from torch import Tensor

from torchquant.solvers import (
    comq_quantize,
    dequantize,
    gptq_quantize,
    magr_preprocess,
    quantization_error,
    rtn_quantize,
)
from torchquant.statistics import conv_gram_accumulate_, cross_gram_accumulate_, gram_accumulate_

pytestmark = pytest.mark.parametrize("place", ["cuda"], indirect=True)

ORDERS = ("shared", "greedy", "semi", "cyclic")
SHAPES = ((64, 96), (33, 45), (7, 200))  # blocks ragged and whole
# Seen with a Gram whose elements were moved by half a unit in the last place: 0.7 % of the codes, 0.2 % of the error.
CODES_THAT_MAY_DIFFER, ERROR_THAT_MAY_DIFFER = 0.02, 0.01


def on_both(op: Callable[..., Any], place: torch.device, *inputs: Tensor, **options: Any) -> tuple[Any, Any]:
    """The operator's result on the CPU, and on `place`, brought to the CPU."""
    moved = {k: v.to(place) if isinstance(v, Tensor) else v for k, v in options.items()}
    there = op(*(t.to(place) for t in inputs), **moved)
    outputs = [there] if isinstance(there, Tensor) else there
    assert all(t.device.type == place.type for t in outputs)
    return op(*inputs, **options), there.cpu() if isinstance(there, Tensor) else tuple(t.cpu() for t in there)


def assert_alike(here, there, weight: Tensor, gram: Tensor, group_size: int) -> None:
    assert (here[0] != there[0]).double().mean() <= CODES_THAT_MAY_DIFFER
    torch.testing.assert_close(there[2], here[2], rtol=0, atol=0)
    assert_same(there[3], here[3])
    wanted, got = (quantization_error(weight, gram, *q[:3], group_size=group_size).sum().item() for q in (here, there))
    assert got == pytest.approx(wanted, rel=ERROR_THAT_MAY_DIFFER, abs=1e-9)


def grouped(rows: int, columns: int, problems: int) -> tuple[Tensor, Tensor]:
    """The weight of `problems` layers, one under the other, and their Grams."""
    layers = [LAYERS["correlated"](rows, columns, seed=seed) for seed in range(problems)]
    return torch.cat([layer.weight for layer in layers]), torch.stack([layer.gram for layer in layers])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shrink", [[1.0], [1.0, 0.9, 0.8, 0.65, 0.5]], ids=len)
def test_rounding_is_equal_to_the_last_bit(place, name, grid, shrink):
    for shape in SHAPES:
        for group_size in (0, 1, 7, 16, 1000):
            options = {"bits": 3, "group_size": group_size, "grid": grid, "shrink": shrink}
            here, there = on_both(rtn_quantize, place, LAYERS[name](*shape).weight, **options)
            assert_same(there, here)
            assert_same(*reversed(on_both(dequantize, place, *here, group_size=group_size)))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("order", ORDERS)
def test_one_block_is_equal_to_the_last_bit(place, name, order):
    """One sweep over one block on a fixed grid, greedy over any width: no matrix product comes before a code."""
    for columns in (1, 31, 64) + ((128,) if order == "semi" else (200, 513) if order == "greedy" else ()):
        layer = LAYERS[name](33, columns)
        for group_size in (0, 20):
            options = {"bits": 3, "group_size": group_size, "order": order}
            once = {"sweeps": 1, "update_scale": False, "shrink": [0.9]}
            assert_same(*reversed(on_both(comq_quantize, place, layer.weight, layer.gram, **options, **once)))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group_size", [0, 20])
def test_comq(place, name, order, group_size):
    for shape, grid in zip(SHAPES, GRIDS, strict=True):
        layer = LAYERS[name](*shape)
        options = {"bits": 3, "group_size": group_size, "order": order, "grid": grid}
        here, there = on_both(comq_quantize, place, layer.weight, layer.gram, **options)
        assert_alike(here, there, layer.weight, layer.gram, group_size)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("group_size", [0, 20])
def test_gptq(place, name, order, group_size):
    for shape, grid in zip(SHAPES, GRIDS, strict=True):
        layer = LAYERS[name](*shape)
        options = {"bits": 3, "group_size": group_size, "order": order, "grid": grid}
        here, there = on_both(gptq_quantize, place, layer.weight, layer.gram, **options)
        assert_alike(here, there, layer.weight, layer.gram, group_size)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("solver", ["ista", "fista", "admm"])
@pytest.mark.parametrize("group_size", [0, 20])
def test_magr(place, name, solver, group_size):
    for shape in SHAPES:
        layer = LAYERS[name](*shape)
        options = {"solver": solver, "group_size": group_size, "iters": 60}
        here, there = on_both(magr_preprocess, place, layer.weight, layer.gram, **options)
        # Seen with a Gram moved by half a unit in the last place: 1e-4 (admm, rank-deficient), elsewhere below 4e-6.
        torch.testing.assert_close(there, here, rtol=0, atol=5e-4 * float(layer.weight.abs().max()))
    weight, gram = grouped(8, 36, 3)
    here, there = on_both(magr_preprocess, place, weight, gram, solver=solver, group_size=group_size)
    torch.testing.assert_close(there, here, rtol=0, atol=5e-4 * float(weight.abs().max()))


@pytest.mark.parametrize("op", [comq_quantize, gptq_quantize])
@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("shape", [(8, 36, 3), (1, 9, 16)], ids=["grouped", "depthwise"])
def test_one_gram_for_every_block_of_rows(place, op, group_size, shape):
    weight, gram = grouped(*shape)
    here, there = on_both(op, place, weight, gram, bits=3, group_size=group_size)
    assert_alike(here, there, weight, gram, group_size)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("gram_type", [torch.float32, torch.float64])
def test_types(place, dtype, gram_type):
    layer = LAYERS["correlated"](40, 70)
    weight, gram = layer.weight.to(dtype), layer.gram.to(gram_type)
    for op in (comq_quantize, gptq_quantize):
        assert_alike(*on_both(op, place, weight, gram, bits=4), weight, gram, 0)


def test_starts_and_targets(place):
    layer = LAYERS["correlated"](40, 70)
    other = layer.weight + 0.1 * heavy_tailed(40, 70, seed=5)
    start = dict(zip(("codes", "scale", "zero_point"), rtn_quantize(layer.weight, bits=3), strict=True))
    for options in (start, {"init": "rtn"}, {"init": "gptq"}, {"linear": other @ layer.gram}):
        here, there = on_both(comq_quantize, place, layer.weight, layer.gram, bits=3, **options)
        assert_alike(here, there, layer.weight, layer.gram, 0)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_layers(place, shape):
    weight, gram = torch.zeros(shape), torch.zeros(shape[1], shape[1])
    assert_same(*reversed(on_both(rtn_quantize, place, weight, bits=3)))
    for op in (comq_quantize, gptq_quantize):
        assert_same(*reversed(on_both(op, place, weight, gram, bits=3)))


def test_statistics(place):
    x, y = (torch.randn(3, 50, 24, generator=random(seed)) for seed in (1, 2))
    image = torch.randn(2, 6, 9, 8, generator=random(3))
    conv = {"kernel_size": [3, 3], "stride": [2, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 2}
    for op, shape, inputs, options in (
        (gram_accumulate_, (24, 24), (x,), {}),
        (cross_gram_accumulate_, (24, 24), (x, y), {}),
        (conv_gram_accumulate_, (2, 27, 27), (image,), conv),
    ):
        here, there = torch.ones(shape), torch.ones(shape, device=place)
        op(here, *inputs, **options)
        op(there, *(t.to(place) for t in inputs), **options)
        torch.testing.assert_close(there.cpu(), here, rtol=1e-5, atol=1e-4)


def on_device(layer: Layer, place: torch.device) -> tuple[Tensor, Tensor]:
    return layer.weight.to(place), layer.gram.to(place)


def test_tf32_is_never_used(place):
    weight, gram = on_device(LAYERS["correlated"](64, 300), place)
    inputs = torch.randn(500, 300, generator=random(4)).to(place)

    def everything() -> list[Tensor]:
        statistic = torch.zeros(300, 300, device=place)
        gram_accumulate_(statistic, inputs)
        results = [*comq_quantize(weight, gram, bits=3), *gptq_quantize(weight, gram, bits=3)]
        return [statistic, magr_preprocess(weight, gram), *results, quantization_error(weight, gram, *results[:3])]

    wanted = everything()
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert_same(everything(), wanted)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_work_goes_to_the_current_stream(place):
    weight, gram = on_device(LAYERS["correlated"](64, 300), place)
    wanted = comq_quantize(weight, gram, bits=3, order="greedy")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = comq_quantize(weight, gram, bits=3, order="greedy")
    stream.synchronize()
    assert_same(got, wanted)


def test_more_groups_than_warps_in_a_grid(place):
    """A grid has at most 2^20 blocks of 4 warps: some warps take two groups."""
    weight = torch.randn(1 << 12, (1 << 10) + 3, generator=random(6))
    assert_same(*reversed(on_both(rtn_quantize, place, weight, bits=4, group_size=1)))


def test_rows_too_wide_for_shared_memory(place):
    columns = 24_600
    if torch.cuda.get_device_properties(place).total_memory < 24 << 30:
        pytest.skip("the Gram and its copies need 12 GB of the GPU's memory")
    weight = torch.randn(3, columns, generator=random(7)).to(place)
    gram = torch.diag(torch.rand(columns, generator=random(8)).to(place) + 0.5)
    options = {"sweeps": 2, "update_scale": False, "shrink": [1.0]}
    got = comq_quantize(weight, gram, bits=4, order="greedy", **options)
    wanted = rtn_quantize(weight, bits=4)  # what uncorrelated inputs ask for
    assert (got[0] != wanted[0]).double().mean() < 1e-4


def test_tensors_on_two_devices_are_named(place):
    layer = LAYERS["correlated"](8, 12)
    with pytest.raises(ValueError, match="comq_quantize: gram must be on cuda:0, got cpu"):
        comq_quantize(layer.weight.to(place), layer.gram, bits=3)
