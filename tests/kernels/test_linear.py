"""Packed linear layers against exact integers in int64 and float64."""

import math

import pytest
import torch
from helpers import FLOAT_TYPES, assert_same, check_deployed, check_op, layouts, random, threads, tier
from hypothesis import given, settings
from hypothesis import strategies as st

from torchquant import _C
from torchquant.kernels.linear import linear_prepack, quantized_linear
from torchquant.quantizers import dynamic_quantize, uniform_quantize

PREPACK = torch.ops.torchquant.linear_prepack.default
LINEAR = torch.ops.torchquant.quantized_linear.default
CPU_TIERS = _C.cpu_tiers()
LEVELS = {"small_levels": (-32, 33), "small_row_levels": (-63, 64)}  # what kernels without dot products take apart


class Weight:
    """Codes of ``kind`` uniform (symmetric), offset (with zero points) or ...levels, and their values."""

    def __init__(self, rows, columns, bits, group_size=0, kind="uniform", seed=0, extreme=False):
        g, self.bits, self.group_size, self.shape = random(seed), bits, group_size, (rows, columns)
        self.codes = torch.randint(0, 2**bits, (rows, columns), generator=g, dtype=torch.uint8)
        if extreme:
            self.codes = torch.where(self.codes % 2 == 0, 0, 2**bits - 1).to(torch.uint8)
        groups = 1 if group_size == 0 else -(-columns // group_size)
        self.scale = torch.rand(rows, groups, generator=g) + 0.01
        self.zero_point, self.levels = None, None
        if kind == "offset":
            self.zero_point = torch.randint(0, 2**bits, (rows, groups), generator=g) + 0.5
        elif kind.endswith("levels"):
            shape = (rows, 2**bits) if kind.endswith("row_levels") else (2**bits,)
            self.levels = torch.randint(*LEVELS.get(kind, (-128, 128)), shape, generator=g, dtype=torch.int8)

    def values(self):
        """float64 ``[N, K]``."""
        spread = lambda t: t.repeat_interleave(self.group_size or self.shape[1], 1)[:, : self.shape[1]].double()  # noqa: E731
        if self.levels is not None:
            table = self.levels.double().expand(self.shape[0], -1)
            return torch.gather(table, 1, self.codes.long()) * spread(self.scale)
        zero = torch.full_like(self.scale, 2 ** (self.bits - 1)) if self.zero_point is None else self.zero_point
        return (self.codes.double() - spread(zero)) * spread(self.scale)

    def prepacked(self):
        packed, grid, levels = linear_prepack(
            self.codes, self.scale, self.zero_point, bits=self.bits, group_size=self.group_size, levels=self.levels
        )
        rows, columns = self.shape
        options = {"bits": self.bits, "in_features": columns, "out_features": rows, "group_size": self.group_size}
        return (packed, grid), {**options, "levels": levels}

    def linear(self, x, bias=None, **options):
        weight, own = self.prepacked()
        return quantized_linear(x, *weight, bias, **own, **options)


def integers(x, limit=127):
    """Each row's symmetric integers, as the operator defines them in float32, and their scale."""
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else torch.zeros(len(x), 1)
    factor = torch.full_like(largest, limit) / largest  # not limit / largest: torch multiplies by the reciprocal
    a = (x * torch.where(largest > 0, factor, 0)).round()
    return a.double(), (largest / limit).double()


def wanted_of(weight, x, limit=127):
    a, scale = integers(x, limit)
    return scale * (a @ weight.values().T)


def assert_close(got, wanted, weight, x):
    """Float32 summation error: relative to what the sum would be without cancellation."""
    bound = x.double().abs() @ weight.values().abs().T + 1e-30
    assert ((got.double() - wanted).abs() <= 4e-7 * bound + 1e-30).all()


SHAPES = [
    (1, 1, 1),
    (3, 5, 7),
    (1, 64, 64),
    (6, 70, 200),
    (5, 17, 33),
    (11, 130, 96),
    (23, 16, 300),
    (2, 64, 0),
    (0, 4, 4),
]
KINDS = ["uniform", "offset", "levels", "row_levels", *LEVELS]
KINDS_AND_BITS = [
    (kind, bits) for kind in KINDS for bits in (2, 3, 4, 6, 8) if bits <= 4 or not kind.endswith("levels")
]


@pytest.fixture(params=CPU_TIERS)
def on_tier(request):
    with tier(request.param):
        yield request.param


@pytest.mark.parametrize("input_bits", [8, 16])
@pytest.mark.parametrize("group_size", [0, 24, 32, 64])
@pytest.mark.parametrize("kind, bits", KINDS_AND_BITS)
def test_products_are_exact_up_to_float_summation(on_tier, kind, bits, group_size, input_bits):
    for rows, outputs, columns in SHAPES:
        weight = Weight(outputs, columns, bits, group_size, kind)
        x = torch.randn(rows, columns, generator=random(1))
        got = weight.linear(x, input_bits=input_bits)
        assert got.shape == (rows, outputs) and got.dtype == torch.float32
        assert_close(got, wanted_of(weight, x, 127 if input_bits == 8 else 32767), weight, x)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("input_bits", [2, 4, 7, 8])
@pytest.mark.parametrize(
    "kind, bits, group_size", [("uniform", 4, 0), ("offset", 3, 24), ("uniform", 8, 32), ("levels", 4, 0)]
)
def test_grids_of_rows_are_those_of_dynamic_quantize(on_tier, kind, bits, group_size, input_bits, symmetric):
    for rows, outputs, columns in SHAPES:
        weight = Weight(outputs, columns, bits, group_size, kind)
        x = torch.randn(rows, columns, generator=random(1)) * torch.logspace(-30, 30, max(rows, 1))[:rows, None]
        if rows > 3:
            x[0], x[1], x[2] = 0, 3.5, x[2].abs() + 1e4  # constant, and far from zero
        for dtype in FLOAT_TYPES if rows == 6 else (torch.float32,):
            own = (x.clamp(-6e4, 6e4)).to(dtype)
            codes, scale, zero_point = dynamic_quantize(own, bits=input_bits, symmetric=symmetric)
            grid = {"input_scale": scale, "input_zero_point": zero_point, "input_bits": input_bits}
            grid, codes = (grid, codes) if columns else ({}, own)
            got = weight.linear(own, input_bits=input_bits, input_symmetric=symmetric, activation="silu")
            assert_same(got, weight.linear(codes, activation="silu", **grid).to(dtype))


@pytest.mark.parametrize("kind, bits", KINDS_AND_BITS)
def test_extreme_codes_and_activations_saturate_nowhere(on_tier, bits, kind):
    """Integers of equal sign everywhere, in outputs that a float32 holds exactly."""
    weight = Weight(19, 96, bits, kind=kind, extreme=True)
    weight.codes[0], weight.codes[1] = 0, 2**bits - 1
    weight.scale[:] = 1
    for signs in (1, -1):
        codes = torch.full((5, 96), 255 if signs > 0 else 0, dtype=torch.uint8)
        scale, zero_point = torch.tensor(1.0), torch.tensor(128.0)
        got = weight.linear(codes, input_scale=scale, input_zero_point=zero_point)
        assert_same(got.double(), (codes.double() - 128) @ weight.values().T)


def test_long_rows_do_not_overflow(on_tier):
    for bits, columns, kind in ((4, 20000, "uniform"), (8, 3000, "uniform"), (4, 3000, "levels")):
        weight = Weight(3, columns, bits, kind=kind, extreme=True)
        weight.codes[:] = 0
        x = torch.ones(2, columns)
        assert_close(weight.linear(x, input_bits=16), x.double() @ weight.values().T, weight, x)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tier_and_thread_count_gives_the_same_bits(kind):
    cases = [(7, 150, 333, 64), (200, 70, 96, 0), (1, 257, 512, 128)]
    for rows, outputs, columns, group_size in cases:
        weight = Weight(outputs, columns, 4, group_size, kind)
        x = torch.randn(rows, columns, generator=random(2))
        bias, residual = torch.randn(outputs, generator=random(3)), torch.randn(rows, outputs, generator=random(4))
        for options in ({}, {"input_bits": 16}, {"activation": "gelu"}, {"activation": "silu", "residual": residual}):
            results = []
            for name in CPU_TIERS:
                for count in (1, 3):
                    with tier(name), threads(count):
                        results.append(weight.linear(x, bias, **options))
            for result in results[1:]:
                assert_same(result, results[0])


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_static_inputs_are_those_of_uniform_quantize(on_tier, bits):
    weight = Weight(40, 100, 4, 32, "offset")
    x = torch.randn(9, 100, generator=random(5))
    scale, zero_point = torch.tensor(3.0 / 2**bits), torch.tensor(float(2**bits // 3))
    codes = uniform_quantize(x, scale, zero_point, bits=bits)
    options = {"input_scale": scale, "input_zero_point": zero_point, "input_bits": bits}
    got = weight.linear(x, **options)
    assert_same(got, weight.linear(codes, **options))
    values = (codes.double() - zero_point) * scale
    assert_close(got, values @ weight.values().T, weight, values.abs() + zero_point * scale)


def test_codes_with_a_grid_for_each_row(on_tier):
    weight = Weight(20, 40, 3)
    codes = torch.randint(0, 256, (2, 3, 40), generator=random(6), dtype=torch.uint8)
    scale, zero_point = torch.rand(2, 3, 1, generator=random(7)) + 0.1, torch.full((2, 3, 1), 100.0)
    got = weight.linear(codes, input_scale=scale, input_zero_point=zero_point)
    values = (codes.double() - zero_point) * scale
    assert got.shape == (2, 3, 20)
    assert_close(got.view(6, 20), values.view(6, 40) @ weight.values().T, weight, 100 + values.view(6, 40).abs())


@pytest.mark.parametrize("rows", [5, 40])
def test_epilogues(on_tier, rows):
    weight = Weight(33, 64, 4)
    weight.scale[:] = 0.05
    x, bias = torch.randn(rows, 64, generator=random(8)), torch.randn(33, generator=random(9))
    x[0] = 0
    residual = torch.randn(rows, 33, generator=random(10))
    plain = weight.linear(x, bias)
    assert_same(plain[0], bias)
    torch.testing.assert_close(plain, weight.linear(x) + bias)
    for name, function in (("gelu", torch.nn.functional.gelu), ("silu", torch.nn.functional.silu)):
        got = weight.linear(x, bias, activation=name, residual=residual)
        torch.testing.assert_close(got, function(plain) + residual, rtol=2e-6, atol=2e-6)


def test_outputs_larger_than_caches(on_tier):
    weight = Weight(528, 33, 4)
    x, residual = torch.randn(3000, 33, generator=random(8)), torch.randn(3000, 528, generator=random(10))
    for options in ({}, {"residual": residual}, {"activation": "gelu", "residual": residual}):
        parts = [
            {name: t[i : i + 100] if name == "residual" else t for name, t in options.items()}
            for i in range(0, 3000, 100)
        ]
        wanted = [weight.linear(rows, **part) for rows, part in zip(x.split(100), parts, strict=True)]
        assert_same(weight.linear(x, **options), torch.cat(wanted))


@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_output_codes_are_those_of_uniform_quantize(on_tier, rows, parts, activation):
    weight = Weight(33, 100, 4, 32, "offset")
    weight.scale[:] = 0.05
    x, bias = torch.randn(rows, 100, generator=random(20)), torch.randn(33, generator=random(21))
    residual = torch.randn(rows, 33, generator=random(22))
    for bits in (2, 4, 8):
        scale = (torch.rand(parts, generator=random(23)) + 1) * 8 / 2**bits
        zero_point = torch.randint(2**bits, (parts,), generator=random(24)) + 0.25
        options = {"activation": activation, "residual": residual}
        each = [t.repeat_interleave(33 // parts) for t in (scale, zero_point)]
        wanted = uniform_quantize(weight.linear(x, bias, **options), *each, bits=bits)
        grid = {"output_scale": scale, "output_zero_point": zero_point, "output_bits": bits}
        assert_same(weight.linear(x, bias, **options, **grid), wanted)
        assert bits < 8 or rows < 5 or wanted.unique().numel() > 40


def test_output_codes_beyond_the_range_of_floats():
    weight = Weight(16, 40, 8)
    bias = torch.tensor([math.inf, -math.inf, math.nan, 3e38] * 4)
    for scale in (1e-3, 1e-30):
        grid = {"output_scale": torch.tensor(scale), "output_zero_point": torch.tensor(7.0)}
        for name in CPU_TIERS:
            with tier(name):
                codes = weight.linear(torch.zeros(1, 40), bias, **grid)
            assert codes[0].tolist() == [255, 0, 0, 255] * 4


def test_activation_functions_far_out():
    """GELU and SiLU from -100 to 100, through a layer of one weight."""
    codes, scale = torch.full((1, 1), 9, dtype=torch.uint8), torch.ones(1, 1)
    packed, grid, levels = linear_prepack(codes, scale, bits=4)
    x = torch.linspace(-100, 100, 4001)[:, None]
    for name, function in (("gelu", torch.nn.functional.gelu), ("silu", torch.nn.functional.silu)):
        options = {"bits": 4, "in_features": 1, "out_features": 1, "levels": levels}
        got = quantized_linear(x, packed, grid, **options, activation=name)
        torch.testing.assert_close(got.double(), function(x.double()), rtol=1e-6, atol=1.5e-6)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_dtypes_and_shapes(on_tier, dtype):
    weight = Weight(18, 48, 4)
    x = torch.randn(2, 3, 48, generator=random(11)).to(dtype)
    got = weight.linear(x, torch.ones(18).to(dtype))
    assert got.dtype == dtype and got.shape == (2, 3, 18)
    assert_same(got, weight.linear(x.float(), torch.ones(18)).to(dtype))
    assert weight.linear(x[0, 0]).shape == (18,)


def test_layout_does_not_matter(on_tier):
    weight = Weight(20, 36, 4, 12, "offset")
    x = torch.randn(12, 36, generator=random(12))
    wanted = weight.linear(x)
    for view in layouts(x).values():
        assert_same(weight.linear(view), wanted)
    packed, own = weight.prepacked()
    for codes in layouts(weight.codes).values():
        other = linear_prepack(codes, weight.scale, weight.zero_point, bits=4, group_size=12)
        assert_same(other[:2], packed)
    assert own["levels"].numel() == 0


def test_tiny_and_huge_rows(on_tier):
    weight = Weight(5, 40, 4)
    x = torch.randn(4, 40, generator=random(13))
    x[0] *= 1e-42
    x[1] *= 1e-30
    x[2] *= 1e30
    got = weight.linear(x)
    assert torch.isfinite(got).all() and (got[0] == 0).all()
    assert_close(got[1:], wanted_of(weight, x[1:]), weight, x[1:])


ONE = torch.tensor(1.0)
X = torch.ones(2, 8)
LINEAR_ERRORS = {
    r"quantized_linear: x must be \[..., 8\], got \[2, 7\]": (torch.ones(2, 7), {}),
    "quantized_linear: x must be float32, float16, bfloat16 or uint8 codes, got Double": (X.double(), {}),
    "quantized_linear: x must be finite, got 2 NaN or Inf": (X.clone().index_fill_(1, torch.tensor(3), math.nan), {}),
    "quantized_linear: x of codes needs input_scale": (X.byte(), {}),
    "input_scale and input_zero_point must be given together": (X, {"input_scale": ONE}),
    "input_bits must be 8 or 16 where the scale comes from x, got 4": (X, {"input_bits": 4}),
    "quantized_linear: bits must be 2..8, got 9": (X, {"input_bits": 9, "input_scale": ONE, "input_zero_point": ONE}),
    "input_scale must be positive, got 0": (X, {"input_scale": ONE * 0, "input_zero_point": ONE}),
    r"input_scale must be one number, got \[2\]": (
        X,
        {"input_scale": torch.ones(2), "input_zero_point": torch.ones(2)},
    ),
    "input_scale must be float32, got Double": (X, {"input_scale": ONE.double(), "input_zero_point": ONE}),
    "activation must be none, gelu or silu, got 'relu'": (X, {"activation": "relu"}),
    r"bias must have shape \[4\], got \[5\]": (X, {"bias": torch.ones(5)}),
    "output_scale and output_zero_point must be given together": (X, {"output_scale": ONE}),
    "output_scale must be positive, got 0": (X, {"output_scale": ONE * 0, "output_zero_point": ONE}),
    "output_scale must be float32, got Double": (X, {"output_scale": ONE.double(), "output_zero_point": ONE}),
    r"output_scale must be one number, or one for each of equal parts of the 4 outputs, got \[3\]": (
        X,
        {"output_scale": torch.ones(3), "output_zero_point": torch.ones(3)},
    ),
    "output_zero_point must be one number, .*, got \\[2\\]": (
        X,
        {"output_scale": ONE, "output_zero_point": torch.ones(2)},
    ),
    "quantized_linear: bits must be 2..8, got 1": (
        X,
        {"output_scale": ONE, "output_zero_point": ONE, "output_bits": 1},
    ),
    r"residual must have shape \[2, 4\], got \[4\]": (X, {"residual": torch.ones(4)}),
    r"packed must have shape \[1, 1, 4, 64\], got \[1, 1, 2, 64\]": (
        X,
        {"packed": torch.zeros(1, 1, 2, 64, dtype=torch.uint8)},
    ),
    r"grid must be \[2 or 3, 64\] as linear_prepack gives, got \[4, 64\]": (X, {"grid": torch.zeros(4, 64)}),
    "packed must be uint8 and grid float32, got Byte and Double": (X, {"grid": torch.zeros(2, 64).double()}),
    "input_symmetric must be None with input_scale": (
        X,
        {"input_scale": ONE, "input_zero_point": ONE, "input_symmetric": True},
    ),
    "quantized_linear: bits must be 2..8, got 16": (X, {"input_symmetric": True, "input_bits": 16}),
    "x must be finite, got 2 NaN or Inf": (
        X.clone().index_fill_(1, torch.tensor(5), math.inf),
        {"input_symmetric": False},
    ),
    r"levels must have shape \[16\], got \[3\]": (X, {"levels": torch.zeros(3, dtype=torch.int8)}),
}


@pytest.mark.parametrize("text", LINEAR_ERRORS)
def test_bad_input_is_refused(text):
    x, options = LINEAR_ERRORS[text]
    packed, grid, _ = linear_prepack(torch.ones(4, 8, dtype=torch.uint8), torch.ones(4, 1), bits=4)
    arguments = {"packed": packed, "grid": grid, "bits": 4, "in_features": 8, "out_features": 4, **options}
    with pytest.raises((ValueError, TypeError), match=text):
        quantized_linear(x, **arguments)


CODES = torch.ones(4, 8, dtype=torch.uint8)
PREPACK_ERRORS = {
    "linear_prepack: codes must be uint8, got Int": {"codes": CODES.int()},
    r"linear_prepack: codes must be \[N, K\], got \[8\]": {"codes": CODES[0]},
    "linear_prepack: codes of 2 bits must be below 4, got 5": {"codes": CODES * 5, "bits": 2},
    "linear_prepack: bits must be 2..8, got 1": {"bits": 1},
    "linear_prepack: group_size must be 0": {"group_size": -1},
    r"linear_prepack: scale must have shape \[4, 2\], got \[4, 1\]": {"group_size": 4},
    "linear_prepack: scale must be float32, got Double": {"scale": torch.ones(4, 1).double()},
    "linear_prepack: scale must be finite, got 4 NaN or Inf": {"scale": torch.ones(4, 1) / 0},
    r"linear_prepack: zero_point must have shape \[4, 1\], got \[4\]": {"zero_point": torch.ones(4)},
    "linear_prepack: levels must be int8, got Float": {"levels": torch.ones(16)},
    r"linear_prepack: levels must be \[2\^bits\] or \[N, 2\^bits\] with bits <= 4, got \[7\] for 4 bits": {
        "levels": torch.ones(7, dtype=torch.int8)
    },
    "linear_prepack: zero_point must be None where levels are given": {
        "levels": torch.ones(16, dtype=torch.int8),
        "zero_point": torch.ones(4, 1),
    },
}


@pytest.mark.parametrize("text", PREPACK_ERRORS)
def test_weights_that_cannot_be_packed_are_refused(text):
    with pytest.raises((ValueError, TypeError), match=text):
        linear_prepack(**{"codes": CODES, "scale": torch.ones(4, 1), "bits": 4, **PREPACK_ERRORS[text]})


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    weight = Weight(20, 70, 4, 32, kind)
    own = {"bits": 4, "group_size": 32, "levels": weight.levels}
    check_op(PREPACK, (weight.codes, weight.scale, weight.zero_point), own)
    packed, options = weight.prepacked()
    check_op(LINEAR, (torch.randn(3, 70, generator=random(14)), *packed, torch.ones(20)), options)
    options |= {"output_scale": torch.ones(2), "output_zero_point": torch.ones(2)}
    check_op(LINEAR, (torch.randn(3, 70, generator=random(14)), *packed, torch.ones(20)), options)


@pytest.mark.parametrize(
    "bits, columns, group_size", [(8, 1500, 0), (4, 10000, 0), (8, 2000, 1000), (3, 40, 100), (5, 0, 0)]
)
def test_fake_shapes_are_the_real_ones(bits, columns, group_size):
    weight = Weight(3, columns, bits, group_size)
    check_op(PREPACK, (weight.codes, weight.scale), {"bits": bits, "group_size": group_size})


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.packed, self.grid, _ = linear_prepack(
            *[t for t in (Weight(6, 12, 4).codes, Weight(6, 12, 4).scale)], bits=4
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.torchquant.quantized_linear(
            x, self.packed, self.grid, None, bits=4, in_features=12, out_features=6, activation="gelu"
        )


def test_torchscript_and_export_give_the_same():
    check_deployed(Layer(), torch.randn(5, 12, generator=random(15)), torch.randn(9, 12, generator=random(16)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 14),
    outputs=st.integers(1, 90),
    columns=st.integers(1, 150),
    bits=st.integers(2, 8),
    group_size=st.integers(0, 80),
    kind=st.sampled_from(KINDS),
    input_bits=st.sampled_from([8, 16]),
)
def test_any_shape_on_every_tier(rows, outputs, columns, bits, group_size, kind, input_bits):
    bits = min(bits, 4) if kind.endswith("levels") else bits
    weight = Weight(outputs, columns, bits, group_size, kind)
    x = torch.randn(rows, columns, generator=random(17))
    results = []
    for name in CPU_TIERS:
        with tier(name):
            results.append(weight.linear(x, input_bits=input_bits))
    assert_close(results[0], wanted_of(weight, x, 127 if input_bits == 8 else 32767), weight, x)
    for result in results[1:]:
        assert_same(result, results[0])
