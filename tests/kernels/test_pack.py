"""pack_codes and unpack_codes against the bit string written out as one Python integer."""

import pytest
import torch
from helpers import assert_same, check_op, layouts, random, scripted, threads, tier
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchquant.kernels import pack_codes, unpack_codes

PACK = torch.ops.torchquant.pack_codes.default
UNPACK = torch.ops.torchquant.unpack_codes.default
BITS = range(1, 9)
# Around the eight codes of a group, the vectors of every tier, the words, and the end of a row's whole blocks.
COLUMNS = (1, 2, 7, 8, 9, 15, 16, 31, 32, 33, 63, 64, 65, 72, 96, 127, 128, 131, 257)


def some_codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**bits, (rows, columns), generator=random(seed + bits), dtype=torch.uint8)


def as_words(number: int, words: int) -> list[int]:
    """The words of a bit string, as int32 has them."""
    unsigned = [number >> (32 * i) & 0xFFFFFFFF for i in range(words)]
    return [word - 2**32 if word >= 2**31 else word for word in unsigned]


def slow_pack(codes: Tensor, bits: int) -> Tensor:
    words = -(-codes.shape[1] * bits // 32)
    rows = [as_words(sum(code << (i * bits) for i, code in enumerate(row)), words) for row in codes.tolist()]
    return torch.tensor(rows, dtype=torch.int32).view(codes.shape[0], words)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_is_one_little_endian_bit_string_and_comes_back(place, bits, columns):
    for rows in (1, 3, 8):
        codes = some_codes(rows, columns, bits)
        packed = pack_codes(codes.to(place), bits=bits)
        assert_same(packed.cpu(), slow_pack(codes, bits))
        assert_same(unpack_codes(packed, bits=bits, columns=columns).cpu(), codes)


@pytest.mark.parametrize("bits", BITS)
def test_all_ones_and_all_zeros(place, bits):
    for columns in COLUMNS:
        full = torch.full((2, columns), 2**bits - 1, dtype=torch.uint8, device=place)
        for codes in (full, torch.zeros_like(full)):
            packed = pack_codes(codes, bits=bits)
            assert_same(packed.cpu(), slow_pack(codes, bits))
            assert_same(unpack_codes(packed, bits=bits, columns=columns), codes)


GOLDEN = {  # bits -> codes, words as the formats write them
    "zeros of symmetric GPTQ, v1": (4, [7] * 8, [0x77777777]),
    "zeros of symmetric GPTQ, v2": (4, [8] * 8, [0x88888888]),
    "channels 0..7 in the order of AWQ": (4, [0, 2, 4, 6, 1, 3, 5, 7], [0x75316420]),
    "four bytes": (8, [1, 2, 3, 4], [0x04030201]),
    "three bits cross a word": (3, [0] * 10 + [7], [0xC0000000, 0x1]),
    "five bits cross a word": (5, [1, 2, 3, 4, 5, 6, 31], [0xC0000000 | 0x0C520C41, 0x7]),
    "flags": (1, [1, 0, 1, 1], [0b1101]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_words(place, name):
    bits, codes, words = GOLDEN[name]
    row = torch.tensor([codes], dtype=torch.uint8, device=place)
    packed = pack_codes(row, bits=bits)
    assert [word & 0xFFFFFFFF for word in packed[0].tolist()] == words
    assert_same(unpack_codes(packed, bits=bits, columns=len(codes)), row)


def test_sizes_of_the_dense_layout():
    sizes = {bits: pack_codes(some_codes(1, 96, bits), bits=bits).shape[1] for bits in (3, 5, 6, 7)}
    assert sizes == {3: 9, 5: 15, 6: 18, 7: 21}
    zero_points = some_codes(24, 4, bits=4)  # compressed-tensors packs these along the rows
    assert pack_codes(zero_points.t(), bits=4).t().shape == (3, 4)


def test_bits_behind_the_last_code_are_zero_and_not_read(place):
    codes = some_codes(5, 7, bits=3).to(place)
    packed = pack_codes(codes, bits=3)
    assert (packed >> 21 == 0).all()
    assert_same(unpack_codes(packed | -(1 << 21), bits=3, columns=7), codes)


@pytest.mark.parametrize("bits", BITS)
def test_layout_does_not_matter(place, bits):
    codes = some_codes(12, 40, bits).to(place)
    packed = pack_codes(codes, bits=bits)
    for view in layouts(codes).values():
        assert_same(pack_codes(view, bits=bits), packed)
    for view in layouts(packed).values():
        assert_same(unpack_codes(view, bits=bits, columns=40), codes)


def test_threads_and_tiers_give_the_same_bits(each_tier):
    codes = some_codes(700, 331, bits=5)  # several chunks

    def run():
        packed = pack_codes(codes, bits=5)
        return packed, unpack_codes(packed, bits=5, columns=331)

    with threads(1):
        wanted = run()
    assert_same(wanted[1], codes)
    with threads(4):
        assert_same(run(), wanted)
    with tier("scalar"):
        assert_same(run(), wanted)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_empty(place, shape):
    codes = torch.zeros(shape, dtype=torch.uint8, device=place)
    packed = pack_codes(codes, bits=3)
    assert packed.shape == (shape[0], -(-shape[1] * 3 // 32))
    assert_same(unpack_codes(packed, bits=3, columns=shape[1]), codes)
    check_op(PACK, (codes,), {"bits": 3})
    check_op(UNPACK, (packed,), {"bits": 3, "columns": shape[1]})


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("where", [0, 63, 64, 130, 299])
def test_a_code_that_does_not_fit_is_refused(place, bits, where):
    codes = torch.zeros(600, 300, dtype=torch.uint8, device=place)
    codes[599, where] = 2**bits
    largest = 2**bits - 1
    text = f"pack_codes: codes must be at most {largest} for {bits} bits, got {largest + 1}"
    with pytest.raises(ValueError, match=text):
        pack_codes(codes, bits=bits)


def codes_of(shape, dtype=torch.uint8):
    return torch.zeros(shape, dtype=dtype)


ERRORS = {
    "pack_codes: bits must be 1..8, got 0": lambda: pack_codes(codes_of((2, 3)), bits=0),
    "pack_codes: bits must be 1..8, got 9": lambda: pack_codes(codes_of((2, 3)), bits=9),
    r"pack_codes: codes must be a matrix \[N, K\], got shape \[3\]": lambda: pack_codes(codes_of(3), bits=4),
    "pack_codes: codes must be uint8, got Int": lambda: pack_codes(codes_of((2, 3), torch.int32), bits=4),
    "unpack_codes: bits must be 1..8, got 9": lambda: unpack_codes(codes_of((2, 1), torch.int32), bits=9, columns=3),
    "unpack_codes: columns must be 0 or more, got -1": lambda: unpack_codes(
        codes_of((2, 1), torch.int32), bits=4, columns=-1
    ),
    r"unpack_codes: packed must be a matrix \[N, words\], got shape \[3\]": lambda: unpack_codes(
        codes_of(3, torch.int32), bits=4, columns=3
    ),
    "unpack_codes: packed must be int32, got Byte": lambda: unpack_codes(codes_of((2, 1)), bits=4, columns=3),
    r"unpack_codes: packed must have 2 words a row for 9 columns of 4 bits, got \[2, 1\]": lambda: unpack_codes(
        codes_of((2, 1), torch.int32), bits=4, columns=9
    ),
}


@pytest.mark.parametrize("text", ERRORS)
def test_bad_input_is_refused(text):
    with pytest.raises((ValueError, TypeError), match=text):
        ERRORS[text]()


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_opcheck(place, bits):
    codes = some_codes(5, 37, bits).to(place)
    check_op(PACK, (codes,), {"bits": bits})
    check_op(UNPACK, (pack_codes(codes, bits=bits),), {"bits": bits, "columns": 37})


class RoundTrip(nn.Module):
    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        packed = torch.ops.torchquant.pack_codes(codes, bits=3)
        return packed, torch.ops.torchquant.unpack_codes(packed, bits=3, columns=codes.size(1))


def test_torchscript_and_export_give_the_same():
    codes, more = some_codes(5, 12, bits=3), some_codes(9, 12, bits=3)
    assert_same(scripted(RoundTrip())(codes), RoundTrip()(codes))
    exported = torch.export.export(RoundTrip(), (codes,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert_same(exported.module()(more), RoundTrip()(more))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rows=st.integers(0, 6), columns=st.integers(0, 300), bits=st.integers(1, 8), seed=st.integers(0, 99))
def test_any_shape(rows, columns, bits, seed):
    codes = some_codes(rows, columns, bits, seed)
    packed = pack_codes(codes, bits=bits)
    assert_same(packed, slow_pack(codes, bits))
    assert_same(unpack_codes(packed, bits=bits, columns=columns), codes)
