"""Subset quantization on CUDA: equal to the CPU to the last bit. The kernels' own logic also runs without a GPU:
tests/cpp/test_cuda_subset.cpp."""

import pytest
import torch
from helpers import FLOAT_TYPES, assert_same, random

from torchquant.quantizers import subset_dequantize, subset_quantize, subset_select, subset_universe

pytestmark = pytest.mark.parametrize("place", ["cuda"], indirect=True)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("axis", [None, 1, 3])
@pytest.mark.parametrize("levels", [5, 16, 60])
def test_levels_codes_and_values_are_equal(place, dtype, axis, levels):
    x = (torch.randn(3, 4, 17, 70, generator=random(0)) * 0.4).to(dtype)
    universe, along = subset_universe("dfsq"), -1 if axis is None else axis
    chosen, error = subset_select(x, universe, levels=levels, axis=axis)
    there, error_there = subset_select(x.to(place), universe.to(place), levels=levels, axis=axis)
    assert_same([there.cpu(), error_there.cpu()], [chosen, error])
    codes = subset_quantize(x, chosen, axis=along)
    codes_there = subset_quantize(x.to(place), there, axis=along)
    assert codes_there.device.type == "cuda"
    assert_same(codes_there.cpu(), codes)
    values = subset_dequantize(codes_there, there, axis=along)
    assert_same(values.cpu(), subset_dequantize(codes, chosen, axis=along))
