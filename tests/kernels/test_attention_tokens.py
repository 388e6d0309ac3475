"""quantized_attention on codes of which every row (a token of a head) has its own grid, and in QAttention."""

import pytest
import torch
from helpers import assert_same, check_op, scripted, threads
from kernels.test_attention import MASKS, grid, inputs, same_on_every_tier, table
from kernels.test_attention_grids import SHAPES, assert_close_but_for_flips, product_on_grids
from torch import nn

from torchquant.kernels import quantized_attention
from torchquant.nn.quantizers import DynamicQuantizer
from torchquant.quantizers import dynamic_quantize, uniform_dequantize

OP = torch.ops.torchquant.quantized_attention.default
NAMES = ("query", "key", "value")
SOFTMAX = [{}, table(), grid(), grid(8, 0.5)]
KINDS = {"float": SOFTMAX[0], "table": SOFTMAX[1], "grid": SOFTMAX[2], "half": SOFTMAX[3]}
softmaxes = pytest.mark.parametrize("softmax", KINDS.values(), ids=KINDS)


def quantized(xs, bits=(8, 8, 8), symmetric=False):
    """Codes, their grids as options, and their values."""
    codes, options, values = [], {}, []
    for name, x, width in zip(NAMES, xs, bits, strict=True):
        own, scale, zero_point = dynamic_quantize(x, bits=width, symmetric=symmetric)
        codes.append(own)
        values.append(uniform_dequantize(own, scale, zero_point))
        options |= {f"{name}_scale": scale, f"{name}_zero_point": zero_point, f"{name}_bits": width}
    return codes, options, values


def uneven(shape):
    """Tokens of very different sizes, some far from zero."""
    q, k, v = inputs(shape)
    k = k * torch.linspace(0.1, 3, shape[3])[:, None]
    return q, k, v * torch.linspace(0.01, 5, shape[3])[:, None] + torch.linspace(-1, 1, shape[4])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [(8, 8, 8), (4, 5, 3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(each_tier, shape, bits, symmetric):
    codes, options, values = quantized(uneven(shape), bits, symmetric)
    q, k, v = (x.double() for x in values)
    wanted = (q @ k.transpose(-1, -2) / shape[4] ** 0.5).softmax(-1) @ v
    sizes = q.abs() @ k.abs().transpose(-1, -2) / shape[4] ** 0.5
    error = (quantized_attention(*codes, **options) - wanted).abs().amax()
    assert error <= (1e-5 + 16 * 2**-24 * float(sizes.max())) * v.abs().max()


@softmaxes
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_same_as_of_values(each_tier, shape, softmax):
    codes, options, values = quantized(uneven(shape))
    found = quantized_attention(*codes, **softmax, **options)
    assert_close_but_for_flips(found, quantized_attention(*values, **softmax), shape[3])


@softmaxes
@pytest.mark.parametrize("shape", [(2, 3, 70, 90, 16), (1, 2, 30, 701, 8)])
def test_the_same_bits_on_every_tier_and_with_any_threads(softmax, shape):
    codes, options, _ = quantized(uneven(shape))
    same_on_every_tier(lambda: quantized_attention(*codes, **softmax, **options))
    wanted = quantized_attention(*codes, **softmax, **options)
    for count in (1, 2, 5):
        with threads(count):
            assert_same(quantized_attention(*codes, **softmax, **options), wanted)


@softmaxes
def test_one_grid_for_some_and_grids_of_rows_for_others(each_tier, softmax):
    """The same grid written once, or for every row."""
    codes, options, _ = quantized(inputs())
    for name, x in zip(NAMES, codes, strict=True):
        rows, one = dict(options), dict(options)
        for part, value in ((f"{name}_scale", 0.02), (f"{name}_zero_point", 127.0)):
            rows[part], one[part] = torch.full((*x.shape[:-1], 1), value), torch.tensor(value)
        found, wanted = (quantized_attention(*codes, **softmax, **some) for some in (rows, one))
        assert_close_but_for_flips(found, wanted, 50)


@pytest.mark.parametrize("softmax", [table(), grid()], ids=["table", "grid"])
@pytest.mark.parametrize("name", [*MASKS, "causal"])
def test_masks(each_tier, name, softmax):
    codes, options, values = quantized(uneven((2, 3, 40, 50, 16)))
    mask, causal = (None, True) if name == "causal" else (MASKS[name](), False)
    found = quantized_attention(*codes, mask, **softmax, **options, is_causal=causal)
    assert_close_but_for_flips(found, quantized_attention(*values, mask, **softmax, is_causal=causal), 50)


def test_views_and_leading_dimensions():
    xs = uneven((2, 3, 8, 9, 4))
    codes, options, values = quantized(xs)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in codes]
    grids = {k: v.transpose(0, 1).contiguous().transpose(0, 1) if torch.is_tensor(v) else v for k, v in options.items()}
    wanted = quantized_attention(*codes, **grid(), **options)
    assert_same(quantized_attention(*turned, **grid(), **grids), wanted)
    codes, options, values = quantized([xs[0], xs[1][:1], xs[2][:, :1]])
    found = quantized_attention(*codes, **grid(), **options)
    assert_close_but_for_flips(found, quantized_attention(*values, **grid()), 9)


def test_opcheck():
    codes, options, _ = quantized(inputs((2, 2, 6, 7, 8)))
    for softmax in SOFTMAX[:3]:
        check_op(OP, codes, {**softmax, **options})


@pytest.mark.parametrize("sizes", [(0, 3, 5, 6), (2, 3, 0, 6), (2, 3, 5, 0), (1, 1, 1, 1)])
def test_of_nothing(sizes):
    codes, options, values = quantized(inputs((*sizes, 4)))
    found = quantized_attention(*codes, **options)
    torch.testing.assert_close(found, quantized_attention(*values))


ERRORS = {
    r"key_scale must hold one value or one for each row of codes, \[4, 1\], got shape \[2\]": ("key_scale", (2,), 1.0),
    r"value_zero_point must hold one value or one for each row of codes, \[4, 1\]": ("value_zero_point", (2, 1), 1.0),
    "query_scale must be positive, got -2": ("query_scale", (2, 1), -2.0),
    "key_scale must be finite, got 4 NaN or Inf": ("key_scale", (4, 1), torch.inf),
    "query_zero_point must be finite, got 2 NaN or Inf": ("query_zero_point", (2, 1), torch.nan),
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors(text):
    codes, options, _ = quantized([torch.ones(2, 3), torch.ones(4, 3), torch.ones(4, 3)])
    name, shape, value = ERRORS[text]
    with pytest.raises(ValueError, match=f"quantized_attention: {text}"):
        quantized_attention(*codes, **(options | {name: torch.full(shape, value)}))
    with pytest.raises(TypeError, match="quantized_attention: query_scale must be float32, got Double"):
        quantized_attention(*codes, **(options | {"query_scale": torch.ones(2, 1).double()}))
    with pytest.raises(ValueError, match=r"query_scale must hold one value, got shape \[2, 1\]"):
        quantized_attention(*(x.float() for x in codes), **options)


# --- in QAttention ---


def dynamic_product(softmax, granularity="token", symmetric=True):
    product = product_on_grids(softmax)
    for name in NAMES:
        setattr(product, name, DynamicQuantizer(8, granularity, symmetric))
    return product


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("softmax", [table(), grid()], ids=["table", "grid"])
def test_attention_takes_codes_of_tokens(softmax, granularity):
    product, xs = dynamic_product(softmax, granularity), uneven((2, 3, 40, 50, 16))
    assert product.on_grids() and product.fits(*xs, None)
    found, weights = product(*xs, need_weights=False)
    assert weights is None
    assert_close_but_for_flips(found, product(*xs)[0], 50)
    assert_same(scripted(product)(*xs, need_weights=False)[0], found)
    product.key.register_forward_hook(lambda *_: None)
    assert not product.on_grids()
    assert_close_but_for_flips(product(*xs, need_weights=False)[0], found, 50)


def test_attention_keeps_other_quantizers_apart():
    product = dynamic_product(grid())
    product.value = nn.Identity()
    assert not product.on_grids()
    assert not dynamic_product(grid(), "channel").on_grids()
