"""Packed linear layers whose group scales are integer multiples of one unit for each row."""

import pytest
import torch
from helpers import assert_same, check_deployed, check_op, random, threads, tier
from hypothesis import given, settings
from hypothesis import strategies as st

from torchquant import _C
from torchquant.kernels.linear import linear_prepack, quantized_linear
from torchquant.quantizers import uniform_quantize

CPU_TIERS = _C.cpu_tiers()
SPAN = {8: 1 << 16, 16: 512}  # columns whose sum is one integer, by the bits of the input


def largest_multiplier(bits, zero_point):
    """Such that ``(code - zero_point) * m`` is in [-128, 127] for every code."""
    fits = [m for m in range(1, 129) if -zero_point * m >= -128 and (2**bits - 1 - zero_point) * m <= 127]
    return max(fits)


class Weight:
    """Codes with scales ``unit * multiplier``; ``offset``: zero points other than the middle."""

    def __init__(self, rows, columns, bits, group_size, offset=False, seed=0):
        g, self.bits, self.group_size, self.shape = random(seed), bits, group_size, (rows, columns)
        groups = -(-columns // group_size)
        self.codes = torch.randint(0, 2**bits, (rows, columns), generator=g, dtype=torch.uint8)
        self.zeros = torch.full((rows, groups), 2 ** (bits - 1))
        if offset:
            self.zeros = torch.randint(0, 2**bits - 1, (rows, groups), generator=g)
        most = torch.tensor([largest_multiplier(bits, zero) for zero in range(2**bits - 1)])[self.zeros]
        self.multiplier = (torch.rand(rows, groups, generator=g) * (most + 1)).floor().long()
        self.multiplier[:, 0] = most[:, 0]
        self.unit = torch.rand(rows, 1, generator=g) + 0.01
        self.zero_point = self.zeros.float() if offset else None
        self.scale = self.unit * self.multiplier.float()
        if columns > group_size:  # the unit that is found may be a multiple
            self.unit = self.prepacked()[1][groups * (2 if offset else 1) + 1, :rows, None]
            self.multiplier = (self.scale / self.unit).round().long()

    def integers(self):
        """int64 ``[N, K]``: (code - zero point) * multiplier."""
        spread = lambda t: t.repeat_interleave(self.group_size, 1)[:, : self.shape[1]]  # noqa: E731
        return (self.codes.long() - spread(self.zeros)) * spread(self.multiplier)

    def prepacked(self):
        return linear_prepack(self.codes, self.scale, self.zero_point, bits=self.bits, group_size=self.group_size)[:2]

    def linear(self, x, bias=None, **options):
        rows, columns = self.shape
        own = {"bits": self.bits, "in_features": columns, "out_features": rows, "group_size": self.group_size}
        return quantized_linear(x, *self.prepacked(), bias, **own, **options)


def wanted_of(weight, x, input_bits=8):
    """The operator in int64 and, from each span's integer on, float32."""
    limit = 127 if input_bits == 8 else 32767
    largest = x.abs().amax(-1, keepdim=True)
    a = (x * (torch.full_like(largest, limit) / largest)).round().long()
    size = SPAN[input_bits] // weight.group_size * weight.group_size
    y = torch.zeros(len(x), weight.shape[0])
    for part, w in zip(a.split(size, 1), weight.integers().split(size, 1), strict=True):
        sums = part @ w.T
        assert int(sums.abs().max()) < 2**31
        y = y + sums.float() * weight.unit.T
    return y * (largest / limit)


def recognized(grid, group_size, columns, offset=False):
    groups = -(-columns // group_size)
    return bool(grid[groups * (2 if offset else 1) + 1, 0] > 0)


SHAPES = [
    (1, 64, 64),
    (3, 5, 100),
    (6, 70, 200),
    (5, 17, 257),
    (11, 130, 96),
    (23, 16, 1100),
    (50, 33, 384),
    (9, 79, 640),
]


@pytest.fixture(params=CPU_TIERS)
def on_tier(request):
    with tier(request.param):
        yield request.param


@pytest.mark.parametrize("input_bits", [8, 16])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_sums_are_integers_to_the_end_of_the_row(on_tier, bits, group_size, offset, input_bits):
    for rows, outputs, columns in SHAPES:
        if columns <= group_size:
            continue
        weight = Weight(outputs, columns, bits, group_size, offset)
        assert recognized(weight.prepacked()[1], group_size, columns, offset)
        x = torch.randn(rows, columns, generator=random(1))
        assert_same(weight.linear(x, input_bits=input_bits), wanted_of(weight, x, input_bits))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("zero", [0, 1, "middle", "last but one"])
def test_extreme_codes_and_activations_saturate_nowhere(on_tier, bits, zero):
    last = 2**bits - 1
    zero = {"middle": 2 ** (bits - 1), "last but one": last - 1}.get(zero, zero)
    weight = Weight(18, 1030, bits, 128)
    weight.zeros[:] = zero
    weight.zero_point = weight.zeros.float()
    weight.multiplier[:] = largest_multiplier(bits, zero)
    weight.unit[:] = 1
    weight.scale = weight.multiplier.float()
    weight.codes[0::2], weight.codes[1::2] = 0, last
    one = torch.tensor(1.0)
    for rows in (1, 3, 6, 40):
        for code in (0, 255):
            codes = torch.full((rows, 1030), code, dtype=torch.uint8)
            codes[:, 5::7] = 255 - code
            got = weight.linear(codes, input_scale=one, input_zero_point=one * 128)
            wanted = (codes.long() - 128) @ weight.integers().T
            assert_same(got, wanted.float() - 0.0)
        x = torch.ones(rows, 1030)
        assert_same(weight.linear(x, input_bits=16), wanted_of(weight, x, 16))
        assert_same(weight.linear(-x, input_bits=16), wanted_of(weight, -x, 16))


def test_rows_longer_than_a_span(on_tier):
    weight = Weight(3, 70000, 4, 128)
    weight.codes[:], weight.multiplier[:] = 0, 16
    weight.scale = weight.unit * 16
    weight.scale = weight.scale.expand(-1, weight.multiplier.shape[1]).contiguous()
    for rows in (2, 20):
        x = torch.ones(rows, 70000)
        for input_bits in (8, 16):
            assert_same(weight.linear(x, input_bits=input_bits), wanted_of(weight, x, input_bits))


@pytest.mark.parametrize("offset", [False, True])
def test_every_tier_and_thread_count_gives_the_same_bits(offset):
    for rows, outputs, columns, group_size in [
        (7, 150, 333, 64),
        (200, 70, 96, 32),
        (1, 257, 512, 128),
        (300, 40, 700, 512),
    ]:
        weight = Weight(outputs, columns, 4, group_size, offset)
        x = torch.randn(rows, columns, generator=random(2))
        bias, residual = torch.randn(outputs, generator=random(3)), torch.randn(rows, outputs, generator=random(4))
        grid = {"output_scale": torch.tensor(3.0), "output_zero_point": torch.tensor(128.0)}
        for options in (
            {},
            {"input_bits": 16},
            {"activation": "gelu"},
            {"activation": "silu", "residual": residual},
            grid,
        ):
            results = []
            for name in CPU_TIERS:
                for count in (1, 3):
                    with tier(name), threads(count):
                        results.append(weight.linear(x, bias, **options))
            for result in results[1:]:
                assert_same(result, results[0])


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("offset", [False, True])
def test_static_inputs_with_zero_points(on_tier, bits, offset):
    for rows in (1, 4, 9, 40):
        weight = Weight(40, 200, 4, 64, offset)
        x = torch.randn(rows, 200, generator=random(5))
        scale, zero_point = torch.tensor(3.0 / 2**bits), torch.tensor(float(2**bits // 3))
        codes = uniform_quantize(x, scale, zero_point, bits=bits)
        options = {"input_scale": scale, "input_zero_point": zero_point, "input_bits": bits}
        got = weight.linear(x, **options)
        assert_same(got, weight.linear(codes, **options))
        values = (codes.double() - zero_point) * scale @ (weight.integers().double() * weight.unit).T
        bound = 4e-7 * ((codes.double() + zero_point) * scale @ (weight.integers().abs().double() * weight.unit).T)
        assert ((got.double() - values).abs() <= bound).all()


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_outputs_as_codes(on_tier, rows):
    weight = Weight(33, 100, 4, 32)
    weight.scale, weight.unit = weight.scale / 128, weight.unit / 128
    x, residual = torch.randn(rows, 100, generator=random(20)), torch.randn(rows, 33, generator=random(22))
    grid = {"output_scale": torch.tensor([0.1, 0.2, 0.3]), "output_zero_point": torch.tensor([100.0, 128.0, 120.0])}
    each = [t.repeat_interleave(11) for t in grid.values()]
    for options in ({}, {"activation": "gelu"}, {"activation": "silu", "residual": residual}):
        wanted = uniform_quantize(weight.linear(x, **options), *each, bits=8)
        assert_same(weight.linear(x, **options, **grid), wanted)
        assert wanted.unique().numel() > 10


def test_scales_that_are_recognized():
    """Products that float32 rounds, zeros, and units whatever common divisor the multipliers have."""
    codes = torch.randint(0, 16, (64, 256), generator=random(30), dtype=torch.uint8)
    generator = random(31)
    for _ in range(20):
        unit = torch.rand(64, 1, generator=generator) * torch.tensor(10.0) ** torch.randint(-20, 20, (64, 1))
        multiplier = torch.randint(0, 17, (64, 4), generator=generator).float()
        _, grid, _ = linear_prepack(codes, unit * multiplier, bits=4, group_size=64)
        assert recognized(grid, 64, 256)
        assert_same(grid[:4, :64], (unit * multiplier).T)
    scale = torch.ones(64, 4)
    assert recognized(linear_prepack(codes, scale * 0, bits=4, group_size=64)[1], 64, 256)
    scale[5] = torch.tensor([8.0, 6.0, 4.0, 16.0])
    assert linear_prepack(codes, scale, bits=4, group_size=64)[1][5, :6].tolist() == [1.0] * 5 + [2.0]


BAD_SCALES = {
    "beyond the limit": torch.tensor([1.0, 17.0]),
    "one bit beside": torch.tensor([1.0, 3.0]).nextafter(torch.tensor([1.0, 4.0])),
    "no common unit": torch.tensor([1.0, 2.0**0.5]),
    "negative": torch.tensor([1.0, -1.0]),
}


@pytest.mark.parametrize("why", BAD_SCALES)
def test_scales_of_one_row_that_are_not_multiples_keep_all_as_they_are(why):
    codes = torch.ones(20, 64, dtype=torch.uint8)
    scale = torch.ones(20, 2)
    assert recognized(linear_prepack(codes, scale, bits=4, group_size=32)[1], 32, 64)
    scale[19] = BAD_SCALES[why]
    _, grid, _ = linear_prepack(codes, scale, bits=4, group_size=32)
    assert (grid[3:] == 0).all() and grid.shape == (5, 64)


def test_zero_points_that_do_not_fit():
    codes, scale = torch.ones(20, 64, dtype=torch.uint8), torch.tensor([[1.0, 10.0]]).repeat(20, 1)
    for zero, fits in (
        (8.0, True),
        (6.0, True),
        (12.0, True),
        (13.0, False),
        (2.0, False),
        (7.5, False),
        (-1.0, False),
    ):
        zero_point = torch.full((20, 2), 8.0)
        zero_point[3, 1] = zero
        _, grid, _ = linear_prepack(codes, scale, zero_point, bits=4, group_size=32)
        assert recognized(grid, 32, 64, offset=True) == fits


@pytest.mark.parametrize(
    "bits, columns, group_size, rows",
    [
        (4, 640, 128, 5 + 1 + 3),
        (4, 64, 64, 2),
        (8, 640, 128, 6),
        (4, 640, 24, 27 + 1),
        (4, 2048, 1024, 3),
        (3, 96, 32, 3 + 1 + 2),
    ],
)
def test_room_for_multipliers_depends_on_shapes_alone(bits, columns, group_size, rows):
    codes = torch.ones(3, columns, dtype=torch.uint8)
    for scale in (torch.ones(3, -(-columns // group_size)), torch.rand(3, -(-columns // group_size)) + 0.1):
        assert linear_prepack(codes, scale, bits=bits, group_size=group_size)[1].shape == (rows, 64)
        check_op(torch.ops.torchquant.linear_prepack.default, (codes, scale), {"bits": bits, "group_size": group_size})


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.packed, self.grid = Weight(6, 96, 4, 32).prepacked()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.torchquant.quantized_linear(
            x, self.packed, self.grid, None, bits=4, in_features=96, out_features=6, group_size=32
        )


def test_torchscript_and_export_give_the_same():
    check_deployed(Layer(), torch.randn(5, 96, generator=random(15)), torch.randn(9, 96, generator=random(16)))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 60),
    outputs=st.integers(1, 90),
    columns=st.integers(1, 700),
    bits=st.integers(2, 4),
    blocks=st.integers(1, 16),
    offset=st.booleans(),
    input_bits=st.sampled_from([8, 16]),
)
def test_any_shape_on_every_tier(rows, outputs, columns, bits, blocks, offset, input_bits):
    columns += 32 * blocks  # two groups at least
    weight = Weight(outputs, columns, bits, 32 * blocks, offset)
    x = torch.randn(rows, columns, generator=random(17))
    wanted = wanted_of(weight, x, input_bits)
    for name in CPU_TIERS:
        with tier(name):
            assert_same(weight.linear(x, input_bits=input_bits), wanted)
