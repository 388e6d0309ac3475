"""Packed convolutions that give codes in place of values."""

import math

import pytest
import torch
from helpers import assert_same, check_op, random, threads, tier
from kernels.test_conv import CASES, CONV, CPU_TIERS, ONE, Conv, X, image

from torchquant.quantizers import uniform_quantize

LAST = torch.channels_last


def grid(scale, zero_point, bits=8):
    numbers = {"output_scale": torch.tensor(scale), "output_zero_point": torch.tensor(zero_point)}
    return {**numbers, "output_bits": bits}


def quantized(y, given):
    return uniform_quantize(y, given["output_scale"], given["output_zero_point"], bits=given["output_bits"])


@pytest.mark.parametrize("case", CASES)
def test_output_codes_are_those_of_the_float32_outputs(case):
    shape, conv = CASES[case]
    x, bias = image(*shape), image(conv.shape[0], seed=2)
    fractional = {"input_scale": torch.tensor(0.02), "input_zero_point": torch.tensor(121.5)}
    integral = {**fractional, "input_zero_point": torch.tensor(3.0)}
    codes = torch.randint(0, 256, shape, generator=random(3), dtype=torch.uint8)
    for source, options in ((x, {}), (x, {"input_bits": 16}), (x, integral), (codes, integral), (codes, fractional)):
        for more in ({}, {"activation": "gelu"}):
            values = conv(source, bias, **options, **more)
            spread = max(float(values.std()), 0.01)
            for given in (grid(spread / 40, 100.25), grid(spread / 4, 0.0, 4)):
                wanted = quantized(values, given)
                for name in CPU_TIERS:
                    for count in (1, 3):
                        with tier(name), threads(count):
                            got = conv(source, bias, **options, **more, **given)
                            assert_same(got, wanted)
                            assert got.is_contiguous(memory_format=LAST)
                            last = source.to(memory_format=LAST)
                            assert_same(conv(last, bias, **options, **more, **given), wanted)


@pytest.mark.parametrize("case", ["1x1", "3x3", "depthwise", "depthwise multiplied"])
def test_output_codes_beyond_the_range_of_floats(case):
    shape, conv = CASES[case]
    bias = torch.tensor([math.inf, -math.inf, math.nan, 3e38, 0.0] * 7)[: conv.shape[0]]
    for scale in (1e-3, 1e-30, 1e-38):
        for name in CPU_TIERS:
            with tier(name):
                codes = conv(torch.zeros(shape), bias, **grid(scale, 7.0)).permute(1, 0, 2, 3).flatten(1)
            assert codes[:5].unique(dim=1).flatten().tolist() == [255, 0, 0, 255, 7]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_codes_of_halves_are_not_rounded_to_halves(dtype):
    shape, conv = CASES["3x3"]
    x = image(*shape).to(dtype)
    given = grid(0.1, 120.0)
    assert_same(conv(x, **given), quantized(conv(x.float()), given))


ERRORS = {
    "output_scale and output_zero_point must be given together": {"output_scale": ONE},
    "output_scale must be positive, got 0": grid(0.0, 1.0),
    "output_scale must be float32, got Double": {**grid(1.0, 1.0), "output_scale": ONE.double()},
    r"output_scale must be one number, got \[2\]": {
        "output_scale": torch.ones(2),
        "output_zero_point": torch.ones(2),
    },
    "bits must be 2..8, got 1": grid(1.0, 1.0, 1),
}


@pytest.mark.parametrize("text", ERRORS)
def test_bad_grids_are_refused(text):
    with pytest.raises((ValueError, TypeError), match=f"quantized_conv2d: {text}"):
        Conv(4, 4, (3, 3))(X, **ERRORS[text])


@pytest.mark.parametrize("case", ["1x1", "3x3", "groups", "depthwise"])
def test_opcheck(case):
    shape, conv = CASES[case]
    weight, options = conv.prepacked()
    check_op(CONV, (image(*shape), *weight, torch.ones(conv.shape[0])), {**options, **grid(0.1, 9.0)})
