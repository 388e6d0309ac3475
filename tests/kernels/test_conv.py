"""Packed convolutions against float64 convolutions of exact integers."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOAT_TYPES, assert_same, check_op, random, scripted, strided, threads, tier
from hypothesis import given, settings
from hypothesis import strategies as st

from torchquant import _C
from torchquant.kernels import conv_prepack, quantized_conv2d
from torchquant.quantizers import uniform_quantize

PREPACK = torch.ops.torchquant.conv_prepack.default
CONV = torch.ops.torchquant.quantized_conv2d.default
CPU_TIERS = _C.cpu_tiers()
KINDS = ["uniform", "integral", "offset", "levels", "row_levels", "mixed_row_levels"]


class Conv:
    """Codes of ``kind`` uniform (symmetric), integral or offset (zero points), or ...levels, and geometry."""

    def __init__(self, channels, outputs, kernel, bits=4, kind="uniform", groups=1, group_size=0, seed=0, **geometry):
        g, self.shape = random(seed), (outputs, channels // groups, *kernel)
        self.geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), **geometry}
        self.groups, self.bits, self.group_size, self.channels = groups, bits, group_size, channels
        columns = math.prod(self.shape[1:])
        self.codes = torch.randint(0, 2**bits, (outputs, columns), generator=g, dtype=torch.uint8)
        parts = 1 if group_size == 0 else -(-columns // group_size)
        self.scale = torch.rand(outputs, parts, generator=g) + 0.01
        self.zero_point, self.levels = None, None
        if kind in ("integral", "offset"):
            zero = torch.randint(0, 2**bits, (outputs, parts), generator=g)
            self.zero_point = zero + (0.5 if kind == "offset" else 0.0)
        elif kind.endswith("levels"):
            shape = (2**bits,) if kind == "levels" else (outputs, 2**bits)
            self.levels = torch.randint(-128, 128, shape, generator=g, dtype=torch.int8)
            if kind == "mixed_row_levels":  # of the first half small enough for other kernels
                self.levels[: outputs // 2] //= 4

    def values(self):
        """float64 ``[N, C / groups, kh, kw]``."""
        columns = self.codes.shape[1]
        spread = lambda t: t.repeat_interleave(self.group_size or columns, 1)[:, :columns].double()  # noqa: E731
        if self.levels is not None:
            table = self.levels.double().expand(len(self.codes), -1)
            return (torch.gather(table, 1, self.codes.long()) * spread(self.scale)).view(self.shape)
        zero = torch.full_like(self.scale, 2 ** (self.bits - 1)) if self.zero_point is None else self.zero_point
        return ((self.codes.double() - spread(zero)) * spread(self.scale)).view(self.shape)

    def prepacked(self):
        own = {"bits": self.bits, "kernel_size": self.shape[2:], "groups": self.groups, "group_size": self.group_size}
        packed, grid, levels = conv_prepack(self.codes, self.scale, self.zero_point, **own, levels=self.levels)
        sizes = {"in_channels": self.channels, "out_channels": self.shape[0], "levels": levels}
        return (packed, grid), {**own, **sizes, **self.geometry}

    def __call__(self, x, bias=None, **options):
        weight, own = self.prepacked()
        return quantized_conv2d(x, *weight, bias, **own, **options)

    def exact(self, x):
        """The float64 convolution of values x, and the same of magnitudes: what rounding errors are relative to."""
        padding = self.geometry["padding"]
        if len(padding) == 4:
            top, bottom, left, right = padding
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        rest = (self.geometry["stride"], padding, self.geometry["dilation"], self.groups)
        weight = self.values()
        return F.conv2d(x, weight, None, *rest), F.conv2d(x.abs(), weight.abs(), None, *rest)


def sample_values(x, limit=127):
    """Each sample's symmetric integers, as the operator defines them in float32, times their scale."""
    largest = x.abs().amax((1, 2, 3), keepdim=True)
    factor = torch.full_like(largest, limit) / largest
    return (x * torch.where(largest > 0, factor, 0)).round().double() * (largest / limit).double()


def assert_close(got, conv, values, extra=0.0):
    """Float32 summation error, relative to the sums of magnitudes. ``extra``: magnitude of a zero point, which cancels
    inside and does so on padding too."""
    wanted, bound = conv.exact(values)
    assert got.shape == wanted.shape
    if extra and got.numel():
        bound = bound + extra * conv.values().abs().sum((1, 2, 3)).view(-1, 1, 1)
    assert ((got.double() - wanted).abs() <= 4e-7 * bound + 1e-30).all()


def image(*shape, seed=1):
    return torch.randn(*shape, generator=random(seed))


# Name: input [B, C, H, W] and the convolution.
CASES = {
    "1x1": ((2, 32, 5, 7), Conv(32, 20, (1, 1))),
    "1x1 odd channels": ((1, 13, 4, 4), Conv(13, 70, (1, 1), 3)),
    "1x1 strided": ((1, 40, 9, 6), Conv(40, 16, (1, 1), 2, stride=(2, 3))),
    "1x1 groups of scales": ((2, 96, 3, 5), Conv(96, 24, (1, 1), 4, "offset", group_size=24)),
    "3x3": ((2, 16, 9, 11), Conv(16, 33, (3, 3), padding=(1, 1))),
    "3x3 offset": ((1, 5, 8, 8), Conv(5, 7, (3, 3), 8, "offset", padding=(1, 1))),
    "image": ((1, 3, 21, 18), Conv(3, 24, (3, 3), 8, stride=(2, 2), padding=(1, 1))),
    "sides": ((2, 6, 10, 7), Conv(6, 8, (3, 3), stride=(2, 2), padding=(0, 1, 1, 2))),
    "no padding": ((1, 8, 7, 6), Conv(8, 8, (2, 5), 3)),
    "dilated": ((1, 8, 17, 15), Conv(8, 8, (3, 3), padding=(2, 3), dilation=(2, 3), stride=(1, 2))),
    "groups of scales": ((1, 20, 6, 6), Conv(20, 18, (3, 3), 4, "offset", padding=(1, 1), group_size=50)),
    "long rows": ((1, 150, 5, 5), Conv(150, 9, (3, 3), 8, "integral", padding=(1, 1))),
    "levels": ((1, 12, 6, 6), Conv(12, 17, (3, 3), 4, "levels", padding=(1, 1))),
    "row levels": ((1, 12, 6, 6), Conv(12, 17, (3, 3), 3, "row_levels", padding=(1, 1))),
    "groups": ((2, 24, 7, 7), Conv(24, 36, (3, 3), padding=(1, 1), groups=3)),
    "groups with levels": ((2, 12, 7, 7), Conv(12, 14, (3, 3), 4, "row_levels", padding=(1, 1), groups=2)),
    "groups with small and large levels": ((1, 12, 7, 7), Conv(12, 14, (3, 3), 4, "mixed_row_levels", groups=2)),
    "many outputs": ((1, 8, 3, 3), Conv(8, 150, (3, 3), padding=(1, 1))),
    "depthwise": ((2, 10, 9, 13), Conv(10, 10, (3, 3), padding=(1, 1), groups=10)),
    "depthwise wide": ((1, 3, 5, 70), Conv(3, 3, (5, 5), 8, padding=(2, 2), groups=3)),
    "depthwise strided": ((1, 6, 15, 14), Conv(6, 6, (5, 3), padding=(2, 1), groups=6, stride=(2, 3))),
    "depthwise dilated": ((1, 6, 15, 14), Conv(6, 6, (3, 4), 3, padding=(4, 2), groups=6, dilation=(3, 2))),
    "depthwise strided dilated": (
        (1, 4, 15, 19),
        Conv(4, 4, (3, 3), padding=(2, 2), groups=4, stride=(3, 2), dilation=(2, 3)),
    ),
    "depthwise offset": ((1, 6, 8, 8), Conv(6, 6, (3, 3), 4, "offset", padding=(1, 1), groups=6)),
    "depthwise integral": ((1, 6, 8, 8), Conv(6, 6, (3, 3), 8, "integral", padding=(1, 1), groups=6)),
    "depthwise levels": ((1, 6, 8, 8), Conv(6, 6, (3, 3), 4, "levels", padding=(1, 1), groups=6)),
    "depthwise row levels": ((1, 6, 8, 8), Conv(6, 6, (2, 2), 4, "row_levels", padding=(1, 1), groups=6)),
    "depthwise multiplied": ((2, 5, 6, 6), Conv(5, 15, (3, 3), 4, "offset", padding=(1, 1), groups=5)),
    "depthwise groups of scales": ((1, 6, 8, 8), Conv(6, 6, (3, 3), padding=(1, 1), groups=6, group_size=4)),
}
cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture(params=CPU_TIERS)
def on_tier(request):
    with tier(request.param):
        yield request.param


@pytest.mark.parametrize("input_bits", [8, 16])
@cases
def test_convolutions_are_exact_up_to_float_summation(on_tier, case, input_bits):
    shape, conv = CASES[case]
    x = image(*shape)
    assert_close(conv(x, input_bits=input_bits), conv, sample_values(x, 127 if input_bits == 8 else 32767))


@pytest.mark.parametrize("zero_point", [0.0, 5.0, 7.5, 15.0, -3.0, 300.0])
@cases
def test_padding_is_zero_whatever_the_zero_point(on_tier, case, zero_point):
    shape, conv = CASES[case]
    x = image(*shape)
    scale, zero = torch.tensor(0.3), torch.tensor(zero_point)
    codes = uniform_quantize(x, scale, zero, bits=4)
    given = {"input_scale": scale, "input_zero_point": zero, "input_bits": 4}
    got = conv(x, **given)
    assert_same(got, conv(codes, **given))
    assert_close(got, conv, (codes.double() - zero.double()) * scale.double(), 0.3 * (16 + abs(zero_point)))


@cases
def test_every_tier_layout_and_thread_count_gives_the_same_bits(case):
    shape, conv = CASES[case]
    x, bias = image(*shape), image(conv.shape[0], seed=2)
    given = {"input_scale": torch.tensor(0.1), "input_zero_point": torch.tensor(2.5), "input_bits": 4}
    for options in ({}, {"input_bits": 16}, {"activation": "gelu"}, {**given, "activation": "silu"}):
        results = []
        for name in CPU_TIERS:
            for count in (1, 3):
                with tier(name), threads(count):
                    results += [
                        conv(x, bias, **options),
                        conv(x.to(memory_format=torch.channels_last), bias, **options),
                    ]
                    results.append(conv(strided(x), bias, **options))
        for result in results[1:]:
            assert_same(result, results[0])
        assert results[0].is_contiguous() and results[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", ["3x3", "groups", "depthwise"])
def test_codes_with_a_grid_for_each_sample(on_tier, case):
    shape, conv = CASES[case]
    codes = torch.randint(0, 256, shape, generator=random(3), dtype=torch.uint8)
    scale, zero = torch.tensor([0.5, 0.1]).view(2, 1, 1, 1), torch.tensor([100.0, 7.25]).view(2, 1, 1, 1)
    got = conv(codes, input_scale=scale, input_zero_point=zero)
    assert got.dtype == torch.float32
    assert_close(got, conv, (codes.double() - zero) * scale.double(), 128.0)


@pytest.mark.parametrize("case", ["3x3", "depthwise", "depthwise offset"])
def test_epilogues(on_tier, case):
    shape, conv = CASES[case]
    x, bias = image(*shape), image(conv.shape[0], seed=4)
    for source in ({}, {"input_scale": torch.tensor(0.1), "input_zero_point": torch.tensor(-2.0), "input_bits": 4}):
        plain = conv(x, bias, **source)
        torch.testing.assert_close(plain, conv(x, **source) + bias.view(-1, 1, 1), rtol=1e-5, atol=1e-5)
        for name, function in (("gelu", F.gelu), ("silu", F.silu)):
            got = conv(x, bias, activation=name, **source)
            torch.testing.assert_close(got, function(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["3x3", "depthwise"])
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_dtypes(on_tier, dtype, case):
    shape, conv = CASES[case]
    x, bias = image(*shape).to(dtype), image(conv.shape[0], seed=5).to(dtype)
    got = conv(x, bias)
    assert got.dtype == dtype
    assert_same(got, conv(x.float(), bias.float()).to(dtype))


@pytest.mark.parametrize("case", ["3x3", "depthwise"])
def test_tiny_huge_and_missing_samples(on_tier, case):
    shape, conv = CASES[case]
    x = image(4, *shape[1:])
    x[0], x[1], x[2] = 0, x[1] * 1e-30, x[2] * 1e30
    got = conv(x)
    assert (got[0] == 0).all() and torch.isfinite(got).all()
    assert_close(got[1:], conv, sample_values(x[1:]))
    assert conv(x[:0]).shape == (0, *got.shape[1:])


def test_extreme_integers_saturate_nowhere(on_tier):
    """Integers of equal sign everywhere, in outputs that a float32 holds exactly."""
    for groups, bits in ((1, 8), (1, 4), (8, 8)):
        conv = Conv(8, 8, (3, 3), bits, groups=groups)
        conv.codes[:], conv.scale[:] = 0, 1
        codes = torch.full((1, 8, 5, 5), 255, dtype=torch.uint8)
        given = {"input_scale": torch.tensor(1.0), "input_zero_point": torch.tensor(0.0)}
        assert_same(conv(codes, **given).double(), conv.exact(codes.double())[0])
        x = torch.ones(1, 8, 5, 5)
        assert_close(conv(x, input_bits=16), conv, x.double())


ONE = torch.tensor(1.0)
X = torch.ones(1, 4, 5, 5)
CONV_ERRORS = {
    r"quantized_conv2d: x must be \[B, 4, H, W\], got \[1, 3, 5, 5\]": {"x": X[:, :3]},
    r"quantized_conv2d: x must be \[B, 4, H, W\], got \[4, 5, 5\]": {"x": X[0]},
    "quantized_conv2d: x must be float32, float16, bfloat16 or uint8 codes, got Double": {"x": X.double()},
    "quantized_conv2d: x must be finite, got 20 NaN or Inf": {"x": X.index_fill(2, torch.tensor(1), math.nan)},
    "quantized_conv2d: x must be finite, got 5 NaN or Inf": {
        "x": torch.cat([X[:, :3], torch.cat([X[:, 3:, :4], X[:, 3:, 4:] / 0], 2)], 1),
        "input_scale": ONE,
        "input_zero_point": ONE,
    },
    "quantized_conv2d: x of codes needs input_scale": {"x": X.byte()},
    "input_scale and input_zero_point must be given together": {"input_scale": ONE},
    "input_bits must be 8 or 16 where the scale comes from x, got 4": {"input_bits": 4},
    "quantized_conv2d: bits must be 2..8, got 9": {"input_bits": 9, "input_scale": ONE, "input_zero_point": ONE},
    "input_scale must be positive, got 0": {"input_scale": ONE * 0, "input_zero_point": ONE},
    r"input_scale must be one number, got \[2\]": {"input_scale": torch.ones(2), "input_zero_point": torch.ones(2)},
    r"input_zero_point must be one number or one for each sample, got \[3\]": {
        "x": X.byte(),
        "input_scale": ONE,
        "input_zero_point": torch.ones(3),
    },
    "input_scale must be float32, got Double": {"input_scale": ONE.double(), "input_zero_point": ONE},
    "activation must be none, gelu or silu, got 'relu'": {"activation": "relu"},
    r"bias must have shape \[4\], got \[5\]": {"bias": torch.ones(5)},
    "groups must divide in_channels=4 and out_channels=4, got 3": {"groups": 3},
    r"kernel_size must be positive, got \[0, 3\]": {"kernel_size": (0, 3)},
    r"stride must be positive, got \[1, 0\]": {"stride": (1, 0)},
    r"dilation must be positive, got \[0, 1\]": {"dilation": (0, 1)},
    r"padding must not be negative, got \[-1, 0\]": {"padding": (-1, 0)},
    r"padding must be \[h, w\] or \[top, bottom, left, right\], got \[1, 1, 1\]": {"padding": (1, 1, 1)},
    "x with its padding must be at least 7 x 7, got 5 x 5": {"dilation": (3, 3)},
    r"packed must have shape \[1, 2, 4, 64\], got \[1, 1, 4, 64\]": {
        "packed": torch.zeros(1, 1, 4, 64, dtype=torch.uint8)
    },
    r"packed must be a stack for 2 groups as conv_prepack gives, got \[1, 2, 4, 64\]": {"groups": 2},
    "packed must be int16 and grid float32 of a depthwise convolution, got Byte and Float": {"groups": 4},
    r"packed must have shape \[4, 6, 2\], got \[4, 5, 2\]": {
        "groups": 4,
        "packed": torch.zeros(4, 5, 2, dtype=torch.int16),
    },
    r"grid must have shape \[3, 4\], got \[2, 64\]": {"groups": 4, "packed": torch.zeros(4, 6, 2, dtype=torch.int16)},
}


@pytest.mark.parametrize("text", CONV_ERRORS)
def test_bad_input_is_refused(text):
    codes, scale = torch.ones(4, 36, dtype=torch.uint8), torch.ones(4, 1)
    packed, grid, _ = conv_prepack(codes, scale, bits=4, kernel_size=(3, 3))
    sizes = {"bits": 4, "in_channels": 4, "out_channels": 4, "kernel_size": (3, 3)}
    with pytest.raises((ValueError, TypeError), match=text):
        quantized_conv2d(**{"x": X, "packed": packed, "grid": grid, **sizes, **CONV_ERRORS[text]})


CODES = torch.ones(4, 18, dtype=torch.uint8)
PREPACK_ERRORS = {
    r"conv_prepack: codes must be \[N, K\], got \[18\]": {"codes": CODES[0]},
    r"conv_prepack: codes must be \[N, C \* 4\], got \[4, 18\]": {"kernel_size": (2, 2)},
    r"conv_prepack: kernel_size must be positive, got \[3, -1\]": {"kernel_size": (3, -1)},
    "conv_prepack: groups must divide N=4, got 3": {"groups": 3},
    r"conv_prepack: levels must be \[2\^bits\] or \[N, 2\^bits\], got \[3, 16\]": {
        "levels": torch.zeros(3, 16, dtype=torch.int8)
    },
    "linear_prepack: codes of 2 bits must be below 4, got 5": {"codes": CODES * 5, "bits": 2},
    "linear_prepack: scale must be finite, got 4 NaN or Inf": {
        "codes": CODES[:, :9],
        "groups": 4,
        "scale": torch.ones(4, 1) / 0,
    },
}


@pytest.mark.parametrize("text", PREPACK_ERRORS)
def test_weights_that_cannot_be_packed_are_refused(text):
    given = {"codes": CODES, "scale": torch.ones(4, 1), "bits": 4, "kernel_size": (3, 3), **PREPACK_ERRORS[text]}
    with pytest.raises((ValueError, TypeError), match=text):
        conv_prepack(**given)


@cases
def test_opcheck(case):
    shape, conv = CASES[case]
    own = {"bits": conv.bits, "kernel_size": conv.shape[2:], "groups": conv.groups, "group_size": conv.group_size}
    check_op(PREPACK, (conv.codes, conv.scale, conv.zero_point), {**own, "levels": conv.levels})
    weight, options = conv.prepacked()
    check_op(CONV, (image(*shape), *weight, torch.ones(conv.shape[0])), options)
    last = image(*shape).to(memory_format=torch.channels_last)
    torch.library.opcheck(CONV, (last, *weight), options)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        (self.packed, self.grid), _ = Conv(6, 8, (3, 3)).prepacked()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.torchquant.quantized_conv2d(
            x, self.packed, self.grid, None, bits=4, in_channels=6, out_channels=8, kernel_size=[3, 3], padding=[1, 1]
        )


def test_torchscript_and_export_give_the_same():
    layer, x = Layer(), image(2, 6, 7, 9)
    assert_same(scripted(layer)(x), layer(x))
    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=4)}
    exported = torch.export.export(layer, (x,), dynamic_shapes=(dims,))
    more = image(3, 6, 12, 9)
    assert_same(exported.module()(more), layer(more))


pairs = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    size=pairs(1, 20),
    kernel=pairs(1, 5),
    stride=pairs(1, 3),
    dilation=pairs(1, 3),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
    channels=st.integers(1, 20),
    outputs=st.integers(1, 20),
    groups=st.integers(1, 6),
    depthwise=st.booleans(),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([0, 0, 7, 40]),
    kind=st.sampled_from(KINDS),
    input_bits=st.sampled_from([8, 16]),
)
def test_any_geometry_on_every_tier(
    size, kernel, stride, dilation, padding, channels, outputs, groups, depthwise, bits, group_size, kind, input_bits
):
    bits = min(bits, 4) if kind.endswith("levels") else bits
    groups = groups if depthwise or kernel[0] < 3 else 1
    channels, outputs = groups if depthwise else groups * channels, groups * outputs
    height, width = (max(s, d * (k - 1) + 1) for s, d, k in zip(size, dilation, kernel, strict=True))
    conv = Conv(
        channels, outputs, kernel, bits, kind, groups, group_size, stride=stride, dilation=dilation, padding=padding
    )
    x = image(2, channels, height, width)
    results = []
    for name in CPU_TIERS:
        with tier(name):
            results.append(conv(x, input_bits=input_bits))
    assert_close(results[0], conv, sample_values(x, 127 if input_bits == 8 else 32767))
    for result in results[1:]:
        assert_same(result, results[0])
