"""Attention times values by shifts and sums: exact in integers."""

import math

import pytest
import torch
from helpers import assert_same, random
from quantizers.sulq_reference import product_case

from torchquant.quantizers import sulq_dequantize, sulq_matmul, sulq_shift_matmul


@pytest.mark.parametrize("variant", ["zero_exact", "paper", "log2"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16])
def test_shifted_sums_are_exact(place, variant, dtype):
    codes, exponents, eta, v = product_case(variant, place, dtype=dtype)
    sums = sulq_shift_matmul(codes, exponents, v)
    least = exponents[exponents.isfinite()].min().double()
    power = torch.exp2(exponents.double())[codes.long()]
    assert sums.dtype == torch.int64
    assert torch.equal(sums.double() * torch.exp2(least), power @ v.double())
    # eta is a power of two (or 0): the whole identity holds in integers, so exactly in float64.
    values = sulq_dequantize(codes, exponents, eta).double()
    identity = sums.double() * torch.exp2(least) - eta.double() * v.sum(-2, keepdim=True).double()
    assert torch.equal(identity, values @ v.double())
    assert_same(sulq_matmul(codes, exponents, eta, v), identity.float())


@pytest.mark.parametrize("variant", ["reference", "log_sqrt2"])
def test_product_where_eta_or_levels_are_not_powers_of_two(place, variant):
    codes, exponents, eta, v = product_case(variant, place)
    wanted = (torch.exp2(exponents.double()) - eta.double())[codes.long()] @ v.double()
    torch.testing.assert_close(sulq_matmul(codes, exponents, eta, v).double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_every_width_and_both_accumulators(place, dtype):
    """Small shifts fit 32 bit sums, large ones do not; columns come in blocks of 64, of 8 and one by one."""
    for columns in (1, 7, 8, 9, 63, 64, 65, 136, 143):
        codes = torch.randint(0, 6, (3, 40), generator=random(columns), dtype=torch.uint8)
        info = torch.iinfo(dtype)
        v = torch.randint(info.min, info.max + 1, (40, columns), generator=random(1), dtype=dtype)
        for largest in (3, 31):
            exponents = torch.tensor([-math.inf, 0, 1, 2, 3, largest])
            power = torch.exp2(exponents.double())[codes.long()]
            sums = sulq_shift_matmul(codes.to(place), exponents.to(place), v.to(place))
            assert torch.equal(sums.double().cpu(), power @ v.double())


def test_product_at_its_limits(place):
    """The longest sum of the largest shift of the largest value fits."""
    inner = 2**16
    codes = torch.ones(1, inner, dtype=torch.uint8, device=place)
    exponents = torch.tensor([0.0, 31.0], device=place)
    v = torch.full((inner, 1), -(2**15), dtype=torch.int16, device=place)
    assert sulq_shift_matmul(codes, exponents, v).item() == -(2**62)
    eta = torch.tensor(0.0, device=place)
    nothing = torch.tensor([-math.inf, -math.inf], device=place)
    assert sulq_matmul(codes, nothing, eta, v).item() == 0
    assert sulq_shift_matmul(codes, nothing, v).item() == 0


@pytest.mark.parametrize("shape", [(0, 1, 3, 4, 5), (1, 1, 0, 4, 5), (1, 1, 3, 0, 5), (1, 1, 3, 4, 0), (1, 1, 1, 1, 1)])
def test_products_of_nothing(place, shape):
    b, h, m, k, n = shape
    codes = torch.zeros(b, h, m, k, dtype=torch.uint8, device=place)
    v = torch.ones(b, h, k, n, dtype=torch.int8, device=place)
    eta, exponents = torch.tensor(0.25, device=place), torch.tensor([-2.0, 0.0], device=place)
    assert_same(sulq_matmul(codes, exponents, eta, v), torch.zeros(b, h, m, n, device=place))
