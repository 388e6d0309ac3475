"""The Gram operators against float64 sums and against convolutions themselves."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOAT_TYPES, assert_same, check_op, random, strided, threads
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchquant import conv_gram_accumulate_, cross_gram_accumulate_, gram_accumulate_

OPS = torch.ops.torchquant
ON_DEVICES = pytest.mark.parametrize("place", ["scalar", "cuda"], indirect=True)  # no leaf, so no tiers
FIRST_ORDER = dict(rtol=2e-5, atol=2e-5)


def gram_of(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    gram = torch.zeros(x.shape[-1], x.shape[-1], dtype=dtype, device=x.device)
    gram_accumulate_(gram, x)
    return gram


def wanted_gram(x: Tensor) -> Tensor:
    rows = x.double().reshape(-1, x.shape[-1])
    return rows.T @ rows


def assert_near(got: Tensor, wanted: Tensor, tokens: int, unit: float = 6e-8) -> None:
    """Within the rounding of a sum of tokens products, relative to the largest entry."""
    assert (got.double() - wanted).abs().max() <= unit * (4 + tokens**0.5) * wanted.abs().max().clamp_min(1e-30)


def token_matrix(tokens: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, columns, generator=random(seed)) + 0.25


# ---- values


@ON_DEVICES
@pytest.mark.parametrize("columns", [1, 2, 31, 96, 97, 200, 515, 1030])
def test_gram_is_the_sum_of_outer_products(columns: int, place: torch.device) -> None:
    x = token_matrix(50, columns).to(place)
    gram = gram_of(x)
    assert_near(gram, wanted_gram(x), 50)
    assert_same(gram, gram.T.contiguous())


def test_gram_accumulates_over_calls_and_leading_dimensions() -> None:
    x = token_matrix(60, 40).reshape(3, 5, 4, 40)
    gram = gram_of(x[0])
    gram_accumulate_(gram, x[1:])
    assert_near(gram, wanted_gram(x), 60)
    one = torch.eye(40)
    gram_accumulate_(one, x[0, 0, 0])
    assert_near(one, torch.eye(40).double() + wanted_gram(x[0, 0, 0]), 1)


def test_many_chunks_of_tokens_are_one_sum() -> None:
    columns = 3
    x = token_matrix((32 << 20) // (4 * columns) + 1000, columns)
    assert_near(gram_of(x), wanted_gram(x), len(x))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_halves_are_cast_before_any_product(dtype: torch.dtype) -> None:
    x = token_matrix(300, 130).to(dtype)
    assert_same(gram_of(x), gram_of(x.float()))


def test_float64_gram_takes_double_products() -> None:
    x = token_matrix(300, 130)
    assert_near(gram_of(x, torch.float64), wanted_gram(x), 300, unit=1e-15)


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize(("tokens", "columns"), [(333, 400), (64, 1100), (2000, 48)])
def test_same_bits_for_any_number_of_threads(tokens: int, columns: int, count: int) -> None:
    x = token_matrix(tokens, columns)
    with threads(1):
        one = gram_of(x)
    with threads(count):
        assert_same(gram_of(x), one)


@settings(max_examples=40, deadline=None)
@example(shape=[4], columns=1, layout="strided", dtype=torch.float32, double=False)
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    columns=st.integers(1, 140),
    layout=st.sampled_from(["contiguous", "strided", "offset", "expanded"]),
    dtype=st.sampled_from(FLOAT_TYPES),
    double=st.booleans(),
)
def test_any_shape_layout_and_dtype(
    shape: list[int], columns: int, layout: str, dtype: torch.dtype, double: bool
) -> None:
    x = torch.randn(*shape, columns, generator=random(len(shape) + columns)).to(dtype)
    plain = x
    if layout == "strided":
        x = strided(x)
    elif layout == "offset":
        x = torch.cat([x.new_zeros(*shape, 3), x], dim=-1)[..., 3:]
    elif layout == "expanded":
        plain, x = x.expand(2, *x.shape).contiguous(), x.expand(2, *x.shape)
    gram_dtype = torch.float64 if double else torch.float32
    assert_same(gram_of(x, gram_dtype), gram_of(plain, gram_dtype))
    assert_near(gram_of(x), wanted_gram(x), x.numel() // columns)


def test_gram_itself_may_have_any_strides() -> None:
    x = token_matrix(20, 33)
    gram = strided(torch.zeros(33, 33))
    gram_accumulate_(gram, x)
    assert_same(gram.contiguous(), gram_of(x))


def test_no_tokens_change_nothing() -> None:
    gram, cross = torch.eye(5), torch.eye(5)
    gram_accumulate_(gram, torch.empty(0, 5))
    cross_gram_accumulate_(cross, torch.empty(3, 0, 5), torch.empty(3, 0, 5))
    assert_same([gram, cross], [torch.eye(5), torch.eye(5)])


def test_no_gradient_is_recorded() -> None:
    x = token_matrix(20, 8).requires_grad_()
    assert not gram_of(x).requires_grad


@ON_DEVICES
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("sizes", [(1, 1), (7, 300), (300, 7), (260, 300)])
def test_cross_gram(sizes: tuple[int, int], dtype: torch.dtype, place: torch.device) -> None:
    x, y = (token_matrix(40, size, size).reshape(8, 5, size).to(place, dtype) for size in sizes)
    cross = torch.zeros(*sizes, device=place)
    cross_gram_accumulate_(cross, x, strided(y))
    wanted = x.double().reshape(40, -1).T @ y.double().reshape(40, -1)
    assert_near(cross, wanted, 40)
    cross_gram_accumulate_(cross, x, y)
    assert_near(cross, 2 * wanted, 80)
    with threads(1):
        one = torch.zeros(*sizes, device=place)
        cross_gram_accumulate_(one, x, y)
        cross_gram_accumulate_(one, x, y)
    assert_same(one, cross)


# ---- convolutions

CONVS = {
    "conv1d": nn.Conv1d(4, 6, 3, padding=1),
    "conv1d_dilated": nn.Conv1d(3, 5, 4, stride=2, dilation=3),
    "conv2d": nn.Conv2d(3, 8, 3, padding=1),
    "conv2d_one": nn.Conv2d(7, 5, 1),
    "conv2d_uneven": nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(2, 1), dilation=(1, 2)),
    "conv2d_grouped": nn.Conv2d(6, 9, 3, stride=2, padding=1, groups=3),
    "conv2d_depthwise": nn.Conv2d(5, 10, 5, padding=2, groups=5),
    "conv3d": nn.Conv3d(2, 4, (2, 3, 2), padding=(1, 0, 1)),
    "conv3d_grouped": nn.Conv3d(4, 4, 2, stride=2, groups=2),
    "transposed1d": nn.ConvTranspose1d(3, 4, 4, stride=3, padding=1, output_padding=2),
    "transposed2d": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed2d_grouped": nn.ConvTranspose2d(4, 6, (3, 2), stride=(1, 2), dilation=(2, 1), groups=2),
    "transposed2d_cropped": nn.ConvTranspose2d(2, 3, 2, stride=2, padding=2),
    "transposed3d": nn.ConvTranspose3d(2, 3, 3, stride=2, padding=1, output_padding=1),
}


def options_of(conv: nn.Module) -> dict:
    names = ("kernel_size", "stride", "padding", "dilation", "groups")
    return {name: getattr(conv, name) for name in names} | {
        "transposed": conv.transposed,
        "output_padding": conv.output_padding,
    }


def conv_gram(conv: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    columns = conv.in_channels // conv.groups * conv.weight[0, 0].numel()
    gram = torch.zeros(conv.groups, columns, columns, dtype=dtype, device=x.device)
    conv_gram_accumulate_(gram, x, **options_of(conv))
    return gram


def rows_of(conv: nn.Module) -> Tensor:
    """The layer's weight as the matrix [groups, rows, K] that meets the Gram."""
    weight = conv.weight.detach().double()
    if conv.transposed:
        spatial = tuple(range(2, weight.dim()))
        parts = [part.transpose(0, 1).flip(spatial) for part in weight.chunk(conv.groups)]
        weight = torch.cat(parts)
    return weight.reshape(conv.groups, weight.shape[0] // conv.groups, -1)


def conv_input(conv: nn.Module, batch: int = 3) -> Tensor:
    spatial = (13, 9, 6)[: conv.weight.dim() - 2] if conv.weight.dim() > 3 else (17,)
    return torch.randn(batch, conv.in_channels, *spatial, generator=random(5))


@ON_DEVICES
@pytest.mark.parametrize("name", CONVS)
def test_conv_gram_gives_the_energy_of_every_output_channel(name: str, place: torch.device) -> None:
    conv, x = CONVS[name], conv_input(CONVS[name])
    bias_free = dict(options_of(conv), bias=None)
    bias_free.pop("kernel_size")
    if not bias_free.pop("transposed"):
        bias_free.pop("output_padding")
    dimensions = conv.weight.dim() - 2
    function = getattr(F, f"conv{'_transpose' if conv.transposed else ''}{dimensions}d")
    outputs = function(x.double(), conv.weight.detach().double(), **bias_free)
    wanted = outputs.transpose(0, 1).flatten(1).square().sum(1)
    rows = rows_of(conv)
    grams = conv_gram(conv, x.to(place)).cpu()
    got = torch.einsum("gnk,gkl,gnl->gn", rows, grams.double(), rows).flatten()
    torch.testing.assert_close(got, wanted, **FIRST_ORDER)
    assert_same(grams, grams.transpose(1, 2).contiguous())


@pytest.mark.parametrize("name", [name for name, conv in CONVS.items() if name.startswith("conv2d")])
def test_conv2d_gram_is_that_of_unfold(name: str) -> None:
    conv, x = CONVS[name], conv_input(CONVS[name])
    columns = F.unfold(x.double(), conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    patches = columns.reshape(len(x), conv.groups, -1, columns.shape[-1])
    wanted = torch.einsum("bgkl,bgml->gkm", patches, patches)
    torch.testing.assert_close(conv_gram(conv, x).double(), wanted, **FIRST_ORDER)
    torch.testing.assert_close(conv_gram(conv, x, torch.float64), wanted)


def test_conv_gram_of_one_group_may_be_a_matrix() -> None:
    conv, x = CONVS["conv2d"], conv_input(CONVS["conv2d"])
    gram = torch.zeros(27, 27)
    conv_gram_accumulate_(gram, x, **options_of(conv))
    assert_same(gram.unsqueeze(0), conv_gram(conv, x))


@pytest.mark.parametrize(("batch", "side"), [(40, 64), (2, 700)])
def test_patches_in_batches_and_in_slices_are_one_sum(batch: int, side: int) -> None:
    conv = nn.Conv2d(3, 1, 5)  # 40 images need two batches of 64 MB, one image of 700 x 700 two slices
    x = torch.randn(batch, 3, side, side, generator=random(6))
    rows = rows_of(conv)
    outputs = F.conv2d(x, conv.weight.detach()).double()
    got = torch.einsum("gnk,gkl,gnl->", rows, conv_gram(conv, x).double(), rows)
    torch.testing.assert_close(got, outputs.square().sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("name", ["conv2d_grouped", "conv2d_depthwise", "transposed2d"])
def test_conv_gram_layouts_dtypes_threads(name: str, dtype: torch.dtype) -> None:
    conv, x = CONVS[name], conv_input(CONVS[name]).to(dtype)
    with threads(1):
        one = conv_gram(conv, x)
        assert_same(conv_gram(conv, x.float()), one)
    for count, other in itertools.product((2, 8), (x, strided(x), x.contiguous(memory_format=torch.channels_last))):
        with threads(count):
            assert_same(conv_gram(conv, other), one)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_convolution(data: st.DataObject) -> None:
    draw, dimensions = data.draw, data.draw(st.integers(1, 3))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dimensions))  # noqa: E731
    groups, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    layer = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dimensions}d")
    channels = 2 * groups
    conv = layer(channels, channels, kernel, stride, padding, groups=groups, dilation=dilation, bias=False)
    x = torch.randn(2, 2 * groups, *each(6, 8), generator=random(7))
    rows = rows_of(conv)
    got = torch.einsum("gnk,gkl,gnl->", rows, conv_gram(conv, x, torch.float64), rows)
    torch.testing.assert_close(got, conv.double()(x.double()).detach().square().sum())


def test_empty_batch_changes_nothing() -> None:
    gram = conv_gram(CONVS["conv2d"], torch.empty(0, 3, 8, 8))
    assert not gram.any()


# ---- errors

Z = torch.zeros
NAN = torch.tensor([[1.0, float("nan")]])
IMAGE = torch.zeros(1, 2, 5, 5)
gram, cross = gram_accumulate_, cross_gram_accumulate_


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: gram(Z(384, 384), Z(10, 380)), ValueError, r"x must have K=384 columns, got \[10, 380\]"),
        (lambda: gram(Z(2, 2), torch.tensor(1.0)), ValueError, r"x must have K=2 columns, got \[\]"),
        (lambda: gram(Z(2, 3), Z(10, 3)), ValueError, r"gram must be square, got \[2, 3\]"),
        (lambda: gram(Z(3), Z(10, 3)), ValueError, r"gram must be a matrix \[3, 3\], got \[3\]"),
        (lambda: gram(Z(2, 2).half(), Z(10, 2)), TypeError, "gram must be float32 or float64, got Half"),
        (lambda: gram(Z(2, 2), Z(10, 2).long()), TypeError, "x must be float32, float16 or bfloat16, got Long"),
        (lambda: gram(Z(2, 2), NAN), ValueError, "x must be finite, got 1 NaN or Inf"),
    ],
)
def test_gram_errors(call: Callable[[], None], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match="gram_accumulate_: " + text):
        call()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: cross(Z(2, 3), Z(4, 2), Z(4, 2)), ValueError, r"y must have K=3 columns, got \[4, 2\]"),
        (lambda: cross(Z(2, 3), Z(4, 1), Z(4, 3)), ValueError, r"x must have K=2 columns, got \[4, 1\]"),
        (
            lambda: cross(Z(2, 3), Z(4, 2), Z(5, 3)),
            ValueError,
            r"x and y must have the same tokens, got \[4, 2\] and \[5, 3\]",
        ),
        (lambda: cross(Z(2), Z(4, 2), Z(4, 3)), ValueError, r"cross must be a matrix \[2, 3\], got \[2\]"),
        (lambda: cross(Z(2, 2).half(), Z(4, 2), Z(4, 2)), TypeError, "cross must be float32 or float64, got Half"),
        (lambda: cross(Z(2, 2), Z(1, 2).int(), Z(1, 2)), TypeError, "x must be float32, float16 or bfloat16, got Int"),
        (lambda: cross(Z(2, 2), NAN, Z(1, 2)), ValueError, "x must be finite, got 1 NaN or Inf"),
        (lambda: cross(Z(2, 2), Z(1, 2), NAN), ValueError, "y must be finite, got 1 NaN or Inf"),
    ],
)
def test_cross_gram_errors(call: Callable[[], None], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match="cross_gram_accumulate_: " + text):
        call()


@pytest.mark.parametrize(
    ("gram", "x", "options", "error", "text"),
    [
        (Z(18, 9), IMAGE, {}, ValueError, r"gram must be \[groups, K, K\] with groups=1 and K=18, got \[18, 9\]"),
        (Z(9, 9), IMAGE, {"groups": 2}, ValueError, r"gram must be .* with groups=2 and K=9, got \[9, 9\]"),
        (Z(3, 9, 9), IMAGE, {"groups": 3}, ValueError, r"channels of x must split evenly among groups=3, got"),
        (Z(18, 18), IMAGE[0], {}, ValueError, r"x must be \[B, C, 2 spatial dimensions\], got \[2, 5, 5\]"),
        (Z(18, 18), IMAGE[..., :2], {}, ValueError, r"kernel must fit into the padded input, got .* \[1, 2, 5, 2\]"),
        (Z(18, 18), IMAGE, {"stride": [1]}, ValueError, r"stride must have one entry per kernel dimension, got \[1\]"),
        (Z(18, 18), IMAGE, {"stride": [1, 0]}, ValueError, r"stride must be at least 1, got \[1, 0\]"),
        (Z(18, 18), IMAGE, {"padding": [0, -1]}, ValueError, r"padding must be at least 0, got \[0, -1\]"),
        (Z(18, 18), IMAGE, {"groups": 0}, ValueError, "groups must be at least 1, got 0"),
        (Z(18, 18), IMAGE, {"kernel_size": []}, ValueError, r"kernel_size must have 1, 2 or 3 entries, got \[\]"),
        (Z(18, 18), IMAGE.double(), {}, TypeError, "x must be float32, float16 or bfloat16, got Double"),
        (Z(18, 18).half(), IMAGE, {}, TypeError, "gram must be float32 or float64, got Half"),
        (Z(18, 18), IMAGE / 0, {}, ValueError, "x must be finite, got 50 NaN or Inf"),
    ],
)
def test_conv_gram_errors(gram: Tensor, x: Tensor, options: dict, error: type[Exception], text: str) -> None:
    plain = dict(kernel_size=[3, 3], stride=[1, 1], padding=[0, 0], dilation=[1, 1])
    with pytest.raises(error, match="conv_gram_accumulate_: .*" + text):
        conv_gram_accumulate_(gram, x, **(plain | options))


def test_a_refused_input_leaves_the_gram_alone() -> None:
    gram = torch.eye(2)
    with pytest.raises(ValueError):
        gram_accumulate_(gram, NAN)
    assert_same(gram, torch.eye(2))


# ---- dispatcher


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("tokens", [0, 5])
def test_opcheck(tokens: int, dtype: torch.dtype) -> None:
    x, y = token_matrix(tokens, 6).to(dtype), token_matrix(tokens, 4).to(dtype)
    check_op(OPS.gram_accumulate_.default, (torch.zeros(6, 6), x))
    check_op(OPS.cross_gram_accumulate_.default, (torch.zeros(6, 4), x, y))


@pytest.mark.parametrize("name", ["conv2d_grouped", "transposed2d"])
def test_conv_opcheck(name: str) -> None:
    conv, x = CONVS[name], conv_input(CONVS[name])
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in options_of(conv).items()}
    check_op(OPS.conv_gram_accumulate_.default, (torch.zeros_like(conv_gram(conv, x)), x), options)
