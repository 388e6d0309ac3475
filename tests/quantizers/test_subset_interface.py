"""The contract of subset quantizers: opcheck, TorchScript, export, error texts, any activation."""

import pytest
import torch
from helpers import FLOAT_TYPES, assert_same, check_op, random, scripted
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizers.subset_universes import free_universe, grid_universe

from torchquant.quantizers import (
    subset_dequantize,
    subset_quantize,
    subset_select,
    subset_universe,
)
from torchquant.statistics import histogram_accumulate_, new_histogram

SELECT = torch.ops.torchquant.subset_select.default
QUANTIZE = torch.ops.torchquant.subset_quantize.default
DEQUANTIZE = torch.ops.torchquant.subset_dequantize.default


def test_opcheck(place):
    x, universe = (torch.randn(4, 6, generator=random(0)) * 0.4).to(place), subset_universe("subsetq_signed").to(place)
    check_op(SELECT, (x, universe), {"levels": 4})
    check_op(SELECT, (x, universe), {"levels": 4, "axis": 1, "keep_zero": False})
    for axis in (None, 0, 1):
        check_op(SELECT, (torch.empty(0, 3, device=place), universe), {"levels": 4, "axis": axis})
    histogram = new_histogram(2, device=place)
    histogram_accumulate_(histogram, x[:2], axis=0)
    check_op(SELECT, (histogram, universe), {"levels": 4})
    codes = subset_quantize(x, universe)
    check_op(QUANTIZE, (x, universe))
    check_op(DEQUANTIZE, (codes, universe))
    rows = universe[:24].reshape(6, 4)
    check_op(QUANTIZE, (x, rows), {"axis": 1})
    check_op(DEQUANTIZE, (codes.clamp(max=3), rows), {"axis": 1})
    for shape in ((0,), (0, 6), (3, 0)):
        check_op(QUANTIZE, (torch.empty(shape, device=place), universe))
        check_op(DEQUANTIZE, (torch.empty(shape, dtype=torch.uint8, device=place), universe))


def script_subset(x: torch.Tensor, universe: torch.Tensor):
    levels, sse = torch.ops.torchquant.subset_select(x, universe, levels=5, axis=0)
    codes = torch.ops.torchquant.subset_quantize(x, levels, axis=0)
    return codes, torch.ops.torchquant.subset_dequantize(codes, levels, axis=0), sse


def test_torchscript_gives_the_same(place):
    x, universe = torch.randn(3, 40, generator=random(0)).to(place), subset_universe("dfsq").to(place)
    assert_same(scripted(script_subset)(x, universe), script_subset(x, universe))


class RoundTrip(torch.nn.Module):
    def __init__(self, levels: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("levels", levels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return subset_dequantize(subset_quantize(x, self.levels), self.levels)


def test_export_with_any_batch(place):
    module, x = RoundTrip(subset_universe("dfsq")[::30]).to(place), torch.randn(4, 5, device=place)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    other = torch.randn(9, 5, device=place)
    assert torch.equal(program.module()(other), module(other))


BAD_SELECTIONS = [
    (torch.ones(3, dtype=torch.int32), {}, TypeError, "x must be float32, float16, bfloat16 or a float64 histogram"),
    (torch.tensor([0.0, torch.nan]), {}, ValueError, "x must be finite, got 1 NaN or Inf"),
    (torch.ones(3, dtype=torch.float64), {}, ValueError, r"histogram must be \[3, B\]"),
    (torch.ones(3), {"levels": 0}, ValueError, r"levels must be 1 .. min\(U, 256\) for U=15, got 0"),
    (torch.ones(3), {"levels": 16}, ValueError, r"levels must be 1 .. min\(U, 256\) for U=15, got 16"),
    (torch.ones(3), {"axis": 1}, ValueError, "axis must be one of x's 1 dimensions, got 1"),
    (torch.ones(3), {"universe": torch.zeros(2, 2)}, ValueError, r"universe must be a vector \[U\], got \[2, 2\]"),
    (torch.ones(3), {"universe": torch.zeros(5).double()}, TypeError, "universe must be float32, got"),
    (torch.ones(3), {"universe": torch.tensor([0.0, 1, 1, 2])}, ValueError, "universe must rise, got 1 before 1"),
    (torch.ones(3), {"universe": torch.tensor([0.0, 1, 2, torch.inf])}, ValueError, "universe must be finite, got 1"),
]


@pytest.mark.parametrize(("x", "changes", "kind", "text"), BAD_SELECTIONS)
def test_selection_errors(place, x, changes, kind, text):
    options = {"universe": subset_universe("subsetq"), "levels": 4, **changes}
    universe = options.pop("universe").to(place)
    with pytest.raises(kind, match=f"^subset_select: {text}"):
        subset_select(x.to(place), universe, **options)


BAD_CODES = [
    (torch.ones(3, dtype=torch.float64), torch.ones(2), -1, TypeError, "x must be float32, float16 or bfloat16, got"),
    (torch.tensor([torch.inf]), torch.ones(2), -1, ValueError, "x must be finite, got 1 NaN or Inf"),
    (torch.ones(3), torch.ones(2).double(), -1, TypeError, "levels must be float32, got"),
    (torch.ones(3), torch.tensor([0.0, torch.nan]), -1, ValueError, "levels must be finite, got 1 NaN or Inf"),
    (torch.ones(3), torch.ones(()), -1, ValueError, r"levels must be \[L\] or \[C, L\] with L = 1 .. 256, got \[\]"),
    (torch.ones(3), torch.ones(0), -1, ValueError, r"levels must be \[L\] or \[C, L\] with L = 1 .. 256, got \[0\]"),
    (
        torch.ones(3),
        torch.ones(257),
        -1,
        ValueError,
        r"levels must be \[L\] or \[C, L\] with L = 1 .. 256, got \[257\]",
    ),
    (
        torch.ones(3),
        torch.ones(2, 4),
        0,
        ValueError,
        r"levels of shape \[2, 4\] need C channels along axis 0, got \[3",
    ),
    (
        torch.ones(3),
        torch.ones(3, 4),
        1,
        ValueError,
        r"levels of shape \[3, 4\] need C channels along axis 1, got \[3",
    ),
]


@pytest.mark.parametrize(("x", "levels", "axis", "kind", "text"), BAD_CODES)
def test_code_errors(place, x, levels, axis, kind, text):
    with pytest.raises(kind, match=f"^subset_quantize: {text}"):
        subset_quantize(x.to(place), levels.to(place), axis=axis)


def test_other_errors():
    with pytest.raises(ValueError, match="^subset_quantize: levels must rise, got 1 before 0"):
        subset_quantize(torch.ones(3), torch.tensor([1.0, 0.0]))
    with pytest.raises(TypeError, match="^subset_dequantize: codes must be uint8, got"):
        subset_dequantize(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="histogram must hold at least one value"):
        subset_select(new_histogram(), subset_universe("dfsq"), levels=4)


@pytest.mark.parametrize("grid", [True, False])
def test_channels_without_values_have_no_error(grid):
    universe = grid_universe(20, 20) if grid else free_universe(20, 20)
    for _ in range(200):  # what was read beyond their end could be anything
        levels, error = subset_select(torch.empty(4, 0), universe, levels=5, axis=0)
        assert torch.isin(levels, universe).all() and (error == 0).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    dtype=st.sampled_from(FLOAT_TYPES),
    count=st.integers(1, 60),
    exponent=st.integers(-8, 4),
    axis=st.integers(-4, 3),
    grid=st.booleans(),
)
def test_any_activation(shape, dtype, count, exponent, axis, grid):
    axis = axis % len(shape)
    x = (torch.randn(shape, generator=random(1)) * 2.0**exponent).to(dtype)
    universe = grid_universe(min(count, 65), count) if grid else free_universe(count, count)
    number = min(count, 12)
    levels, error = subset_select(x, universe, levels=number, axis=axis)
    assert levels.shape == (shape[axis], number) and torch.isin(levels, universe).all()
    codes = subset_quantize(x, levels, axis=axis)
    assert codes.shape == x.shape and (codes < number).all()
    values = subset_dequantize(codes, levels, axis=axis)
    others = [d for d in range(len(shape)) if d != axis]
    wanted = (values.double() - x.double()).square().sum(others) if others else (values.double() - x.double()).square()
    torch.testing.assert_close(error, wanted, rtol=1e-9, atol=1e-12 * float(x.double().square().sum()) + 1e-300)
