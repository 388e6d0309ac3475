"""The log family on CUDA: equal to the CPU to the last bit. The kernels' own logic also runs without a GPU:
tests/cpp/test_cuda_quantizers.cpp."""

import pytest
import torch
from helpers import FLOAT_TYPES, assert_same
from quantizers.sulq_reference import CASES, VARIANTS, product_case

from torchquant.quantizers import (
    sulq_dequantize,
    sulq_fit,
    sulq_matmul,
    sulq_quantize,
    sulq_shift_matmul,
)

pytestmark = pytest.mark.parametrize("place", ["cuda"], indirect=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_tables_codes_and_values_are_equal(place, case, variant):
    for bits in (3, 8):
        for dtype in FLOAT_TYPES:
            x = CASES[case]().to(dtype)
            table = sulq_fit(x, bits=bits, variant=variant)
            there = sulq_fit(x.to(place), bits=bits, variant=variant)
            assert_same([t.cpu() for t in there], table)
            codes = sulq_quantize(x, table[1])
            codes_there = sulq_quantize(x.to(place), there[1])
            assert codes_there.device.type == "cuda"
            assert_same(codes_there.cpu(), codes)
            value = sulq_dequantize(codes, table[2], table[0])
            assert_same(sulq_dequantize(codes_there, there[2], there[0]).cpu(), value)


@pytest.mark.parametrize("variant", ["zero_exact", "paper", "log2", "log_sqrt2"])
def test_products_are_equal(place, variant):
    here, there = (product_case(variant, device) for device in (torch.device("cpu"), place))
    assert_same(sulq_matmul(*there).cpu(), sulq_matmul(*here))
    if variant != "log_sqrt2":
        sums = [sulq_shift_matmul(codes, exponents, v).cpu() for codes, exponents, _, v in (here, there)]
        assert_same(sums[1], sums[0])
