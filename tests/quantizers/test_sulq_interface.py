"""The log family's operators: edge cases, layouts, threads, deployment, errors."""

import math

import pytest
import torch
from helpers import FLOAT_TYPES, assert_same, check_op, layouts, random, scripted, threads, tier
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizers.sulq_reference import VARIANTS, WITH_ZERO, attention, product_case

from torchquant import _C
from torchquant.quantizers import sulq_dequantize, sulq_error, sulq_fit, sulq_matmul, sulq_quantize, sulq_shift_matmul
from torchquant.statistics import histogram_accumulate_, new_histogram

OPS = torch.ops.torchquant


# --- edge cases ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_zero_and_all_equal(place, variant):
    for value in (0.0, 0.3, 1.0, 1 / 197, 2.0**-24, 1e-38):
        x = torch.full((4, 7), value, device=place)
        eta, thresholds, exponents = sulq_fit(x, bits=3, variant=variant)
        back = sulq_dequantize(sulq_quantize(x, thresholds), exponents, eta)
        assert eta.isfinite() and not exponents.isnan().any() and not thresholds.isnan().any()
        if value == 0 and variant in WITH_ZERO:
            assert (back == 0).all()
        if variant != "reference":  # its etas are absolute
            assert ((back - value).abs() <= 0.42 * value + 1e-38).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_subnormals(place, variant):
    """Multiples of 2^-24, as half has them below 2^-14: the range follows the data down."""
    x = (torch.arange(1024, device=place) * 2.0**-24).half()
    table = sulq_fit(x, bits=4, variant=variant)
    assert_same(table, sulq_fit(x.float(), bits=4, variant=variant))
    codes = sulq_quantize(x, table[1])
    assert_same(codes, sulq_quantize(x.float(), table[1]))
    if variant != "reference":
        value = sulq_dequantize(codes, table[2], table[0])
        assert (value - x.float()).square().mean() < 0.05 * x.float().square().mean()


@pytest.mark.parametrize("variant", WITH_ZERO)  # the integral zero point of "paper" does not move with the data
def test_scaling_by_a_power_of_two_scales_the_table(variant):
    x = attention(2.0)
    eta, thresholds, exponents = sulq_fit(x, bits=4, variant=variant)
    small = sulq_fit(x * 2.0**-9, bits=4, variant=variant)
    torch.testing.assert_close(small[0], eta * 2.0**-9, rtol=0, atol=0)
    torch.testing.assert_close(small[2], exponents - 9, rtol=0, atol=1e-5)
    torch.testing.assert_close(small[1], thresholds * 2.0**-9, rtol=1e-6, atol=0)


def test_ones_and_infinities(place):
    x = torch.tensor([1.0, 0.0, 1.0], device=place)
    eta, thresholds, exponents = sulq_fit(x, bits=3, variant="log2")
    assert_same(sulq_dequantize(sulq_quantize(x, thresholds), exponents, eta), x)
    odd = torch.tensor([math.nan, math.inf, -math.inf, -1.0], device=place)
    last = thresholds.isfinite().sum().item()
    assert sulq_quantize(odd, thresholds).tolist() == [0, last, 0, 0]
    many = torch.linspace(-1, 1, 200, device=place)
    assert sulq_quantize(odd, many).tolist() == [0, 200, 0, 0]


def test_a_code_without_a_level_is_nan(place):
    codes = torch.tensor([0, 1, 255], dtype=torch.uint8, device=place)
    value = sulq_dequantize(codes, torch.tensor([-math.inf], device=place), torch.tensor(0.0, device=place))
    assert value[0] == 0 and value[1:].isnan().all()


def test_empty(place):
    thresholds, none = torch.tensor([0.5], device=place), torch.empty(0, device=place)
    for shape in ((0,), (3, 0), (0, 2, 5)):
        assert sulq_quantize(torch.empty(shape, device=place), thresholds).shape == shape
    assert sulq_quantize(torch.rand(3, device=place), none).tolist() == [0, 0, 0]
    codes = torch.empty((2, 0), dtype=torch.uint8, device=place)
    assert sulq_dequantize(codes, none, torch.tensor(0.0, device=place)).shape == (2, 0)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    count=st.integers(0, 255),
    kind=st.sampled_from(["normal", "octaves", "equal", "close", "tiny"]),
    shape=st.lists(st.integers(0, 40), min_size=0, max_size=3),
    dtype=st.sampled_from(FLOAT_TYPES),
    tier_name=st.sampled_from(_C.cpu_tiers()),
)
def test_codes_count_the_thresholds_below(count, kind, shape, dtype, tier_name):
    generator = random(count)
    draw = {
        "normal": lambda n: torch.randn(n, generator=generator),
        "octaves": lambda n: (
            torch.randn(n, generator=generator)
            * torch.exp2(torch.randint(-140, 120, (n,), generator=generator).float())
        ),
        "equal": lambda n: torch.randint(-3, 3, (n,), generator=generator).float(),
        "close": lambda n: (torch.randint(0, 300, (n,), generator=generator) + 0x3F800000).int().view(torch.float32),
        "tiny": lambda n: torch.randint(0, 300, (n,), generator=generator).int().view(torch.float32),
    }[kind]
    thresholds = draw(count).sort().values
    x = draw(math.prod(shape)).reshape(shape).to(dtype)
    with tier(tier_name):
        codes = sulq_quantize(x, thresholds)
    assert codes.shape == x.shape
    assert torch.equal(codes.long(), torch.bucketize(x.float(), thresholds))


# --- layouts, threads, deployment ---


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_layout_and_type_do_not_matter(place, dtype):
    x = attention(2.0, 20, 30).to(dtype).to(place)
    for bits in (3, 8):
        table = sulq_fit(x, bits=bits, variant="uniform")
        assert_same(table, sulq_fit(x.float(), bits=bits, variant="uniform"))
        codes = sulq_quantize(x, table[1])
        assert_same(codes, sulq_quantize(x.float(), table[1]))
        for name, view in layouts(x).items():
            assert not view.is_contiguous(), name
            assert_same(sulq_quantize(view, table[1]), codes)
            assert_same(sulq_fit(view, bits=bits, variant="uniform"), table)
    wide = codes.t().contiguous().t()
    assert_same(sulq_dequantize(wide, table[2], table[0]), sulq_dequantize(codes, table[2], table[0]))


def test_threads_and_tiers_give_the_same_bits(each_tier):
    x, (codes, exponents, eta, v) = attention(2.0, 600, 300), product_case("zero_exact", torch.device("cpu"))

    def everything():
        tables = [sulq_fit(x, bits=bits, variant=variant) for bits, variant in ((3, "zero_exact"), (8, "uniform"))]
        encoded = [sulq_quantize(x, t[1]) for t in tables]
        decoded = [sulq_dequantize(c, t[2], t[0]) for c, t in zip(encoded, tables, strict=True)]
        return [*tables[0], *tables[1], *encoded, *decoded, sulq_matmul(codes, exponents, eta, v)]

    with tier("scalar"), threads(1):
        wanted = everything()
    for count in (1, 2, 8):
        with threads(count):
            assert_same(everything(), wanted)


def test_opcheck(place):
    x = attention(2.0, 6, 20).to(place)
    for variant in VARIANTS:
        check_op(OPS.sulq_fit.default, (x,), {"bits": 3, "variant": variant})
    check_op(OPS.sulq_fit.default, (x,), {"bits": 8, "variant": "reference"})
    histogram = new_histogram(device=place)
    histogram_accumulate_(histogram, x)
    for bits, variant in ((3, "zero_exact"), (8, "uniform")):
        eta, thresholds, exponents = sulq_fit(x, bits=bits, variant=variant)
        check_op(OPS.sulq_error.default, (histogram, eta, thresholds, exponents))
        check_op(OPS.sulq_quantize.default, (x, thresholds))
        check_op(OPS.sulq_quantize.default, (x[:0], thresholds))
        check_op(OPS.sulq_dequantize.default, (sulq_quantize(x, thresholds), exponents, eta))
    codes, exponents, eta, v = product_case("zero_exact", place, (1, 2, 3, 4, 5))
    check_op(OPS.sulq_shift_matmul.default, (codes, exponents, v))
    check_op(OPS.sulq_matmul.default, (codes, exponents, eta, v))
    check_op(OPS.sulq_matmul.default, (codes[..., :0], exponents, eta, v[..., :0, :]))


def pipeline(x: torch.Tensor, v: torch.Tensor):
    eta, thresholds, exponents = torch.ops.torchquant.sulq_fit(x, bits=4)
    codes = torch.ops.torchquant.sulq_quantize(x, thresholds)
    value = torch.ops.torchquant.sulq_dequantize(codes, exponents, eta)
    return value, torch.ops.torchquant.sulq_matmul(codes, exponents, eta, v)


def test_torchscript_gives_the_same(place):
    x, v = attention(2.0, 9, 30).to(place), torch.arange(-60, 60, dtype=torch.int8, device=place).view(30, 4)
    assert_same(scripted(pipeline)(x, v), pipeline(x, v))


def test_export_gives_the_same():
    class Quantizer(torch.nn.Module):
        def __init__(self, x):
            super().__init__()
            for name, tensor in zip(("eta", "thresholds", "exponents"), sulq_fit(x, bits=4), strict=True):
                self.register_buffer(name, tensor)

        def forward(self, x, v):
            codes = sulq_quantize(x, self.thresholds)
            return sulq_dequantize(codes, self.exponents, self.eta), sulq_matmul(codes, self.exponents, self.eta, v)

    x, v = attention(2.0, 9, 30), torch.arange(-60, 60, dtype=torch.int8).view(30, 4)
    model = Quantizer(x)
    assert_same(torch.export.export(model, (x, v)).module()(x, v), model(x, v))


# --- errors ---


def test_fit_refuses():
    x = attention(1.0, 4, 5)
    cases = [
        ((x,), {"bits": 1}, ValueError, r"sulq_fit: bits must be 2..8, got 1"),
        ((x,), {"bits": 3, "variant": "log3"}, ValueError, r"sulq_fit: variant must be zero_exact, .* got 'log3'"),
        ((x.long(),), {"bits": 3}, TypeError, r"sulq_fit: x must be float32, .* or a float64 histogram, got Long"),
        ((x[:0],), {"bits": 3}, ValueError, r"sulq_fit: x must hold at least one value, got none"),
        ((new_histogram(),), {"bits": 3}, ValueError, r"sulq_fit: histogram must hold at least one value, got none"),
        ((x.double(),), {"bits": 3}, ValueError, r"sulq_fit: histogram must be \[3, B\]"),
        ((new_histogram(2),), {"bits": 3}, ValueError, r"sulq_fit: a histogram \(float64\) must be \[3, B\], got"),
        ((x - 0.1,), {"bits": 3}, ValueError, r"sulq_fit: x must not be negative, got \d+ negative values"),
        ((x.log() * math.nan,), {"bits": 3}, ValueError, r"sulq_fit: x must be finite, got 20 NaN or Inf"),
        ((x / 0,), {"bits": 3}, ValueError, r"sulq_fit: x must be finite, got 20 NaN or Inf"),
    ]
    for args, kwargs, error, text in cases:
        with pytest.raises(error, match=text):
            sulq_fit(*args, **kwargs)


def test_error_refuses():
    x, empty, eta = torch.tensor([0.25, 1.0]), new_histogram(), torch.tensor(0.5)
    full, negative = new_histogram(), new_histogram()
    histogram_accumulate_(full, x)
    histogram_accumulate_(negative, -x)
    cases = [
        ((x, eta, x[:1], x), TypeError, r"sulq_error: histogram must be float64, got Float"),
        ((new_histogram(2), eta, x[:1], x), ValueError, r"sulq_error: histogram must be \[3, B\], got \[2, 3, 4096\]"),
        ((empty, eta, x[:1], x), ValueError, r"sulq_error: histogram must hold at least one value, got none"),
        ((negative, eta, x[:1], x), ValueError, r"sulq_error: x must not be negative, got 2 negative values"),
        ((full, x, x[:1], x), ValueError, r"sulq_error: eta must hold one value, got shape \[2\]"),
        ((full, eta, x, x), ValueError, r"sulq_error: exponents must be one more than thresholds, got \[2\] and \[2\]"),
        ((full, eta, x[:1].half(), x), TypeError, r"sulq_error: thresholds must be float32, got Half"),
    ]
    for args, error, text in cases:
        with pytest.raises(error, match=text):
            sulq_error(*args)


def test_quantize_and_dequantize_refuse():
    x, codes, eta = torch.rand(4), torch.zeros(4, dtype=torch.uint8), torch.tensor(0.5)
    cases = [
        (sulq_quantize, (x.double(), x), TypeError, r"sulq_quantize: x must be float32, .* got Double"),
        (sulq_quantize, (x, x.double()), TypeError, r"sulq_quantize: thresholds must be float32, got Double"),
        (sulq_quantize, (x, torch.zeros(256)), ValueError, r"thresholds must be a vector of at most 255 entries"),
        (sulq_quantize, (x, torch.zeros(2, 2)), ValueError, r"thresholds must be a vector of .* got shape \[2, 2\]"),
        (sulq_quantize, (x, torch.tensor([1.0, 0.5])), ValueError, r"sulq_quantize: thresholds must rise, got"),
        (sulq_quantize, (x, torch.tensor([math.nan])), ValueError, r"sulq_quantize: thresholds must rise, got"),
        (sulq_dequantize, (x, x, eta), TypeError, r"sulq_dequantize: codes must be uint8, got Float"),
        (sulq_dequantize, (codes, x.half(), eta), TypeError, r"sulq_dequantize: exponents must be float32, got Half"),
        (sulq_dequantize, (codes, torch.zeros(257), eta), ValueError, r"exponents must be a vector of at most 256"),
        (sulq_dequantize, (codes, x, eta.double()), TypeError, r"sulq_dequantize: eta must be float32, got Double"),
        (sulq_dequantize, (codes, x, x), ValueError, r"sulq_dequantize: eta must hold one value, got shape \[4\]"),
    ]
    for op, args, error, text in cases:
        with pytest.raises(error, match=text):
            op(*args)


def test_products_refuse():
    codes, v = torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(4, 5, dtype=torch.int8)
    whole, halves, eta = torch.tensor([-3.0, 0.0]), torch.tensor([-0.5, 0.0]), torch.tensor(0.5)
    cases = [
        (sulq_shift_matmul, (v, whole, v), TypeError, r"sulq_shift_matmul: codes must be uint8, got Char"),
        (sulq_shift_matmul, (codes, whole, v.int()), TypeError, r"v must be int8, uint8 or int16, got Int"),
        (
            sulq_shift_matmul,
            (codes, whole, v.t()),
            ValueError,
            r"codes \[..., M, K\] and v \[..., K, N\] must fit",
        ),
        (sulq_shift_matmul, (codes[0], whole, v), ValueError, r"must fit, got \[4\] and \[4, 5\]"),
        (sulq_shift_matmul, (codes, halves, v), ValueError, r"sulq_shift_matmul: exponents must be integers or -inf"),
        (sulq_matmul, (codes, torch.tensor([0.3]), eta, v), ValueError, r"multiples of 1/2 or -inf, got 0.3"),
        (sulq_matmul, (codes, torch.tensor([math.nan]), eta, v), ValueError, r"multiples of 1/2 or -inf, got nan"),
        (sulq_matmul, (codes, torch.tensor([0.0, 32.0]), eta, v), ValueError, r"must span at most 31, got 32"),
        (sulq_matmul, (codes, whole, eta.double(), v), TypeError, r"sulq_matmul: eta must be float32, got Double"),
    ]
    for op, args, error, text in cases:
        with pytest.raises(error, match=text):
            op(*args)
    long = torch.zeros(1, 2**16 + 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"sulq_shift_matmul: K must be at most 65536, got 65537"):
        sulq_shift_matmul(long, whole, torch.zeros(2**16 + 1, 1, dtype=torch.int8))
