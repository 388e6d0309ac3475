"""quantized_attention on the grids of q, k and v against the same values quantized before, and in QAttention.

Both see the same codes. Scores of integers differ from those of BLAS in the last bits, so a probability beside a
threshold may get the neighbouring code; products with given probabilities differ by float summation alone.
"""

import copy

import pytest
import torch
from helpers import FLOAT_TYPES, assert_same, check_op, random, scripted, strided, threads, tier
from kernels.test_attention import FLIPS, MASKS, grid, inputs, same_on_every_tier, table
from torch import nn

from torchquant.kernels import quantized_attention
from torchquant.nn import QAttention
from torchquant.nn.quantizers import TableQuantizer, UniformQuantizer
from torchquant.quantizers import uniform_dequantize, uniform_quantize

OP = torch.ops.torchquant.quantized_attention.default
SHAPES = [(1, 6, 197, 197, 64), (3, 2, 49, 49, 32), (2, 1, 5, 33, 7), (1, 1, 30, 1100, 8), (1, 1, 7, 9, 600)]
# Zero points of q, k and v: in the middle, at the ends, no integer, outside of the codes.
ZEROS = [(128.0, 128.0, 128.0), (0.0, 255.0, 3.0), (100.5, 77.25, 127.5), (-7.0, 300.0, 1000.0)]


def grids(zeros=ZEROS[0], bits=(8, 8, 8), names=("query", "key", "value")):
    options = {}
    for name, zero, width in zip(names, zeros, bits, strict=True):
        options[f"{name}_scale"] = torch.tensor(8.0 / 2**width)
        options[f"{name}_zero_point"] = torch.tensor(zero)
        options[f"{name}_bits"] = width
    return options


def rounded(x, options, name):
    """The nearest value of a grid, by the quantizers' operators."""
    if f"{name}_scale" not in options:
        return x
    scale, zero = options[f"{name}_scale"], options[f"{name}_zero_point"]
    return uniform_dequantize(uniform_quantize(x, scale, zero, bits=options[f"{name}_bits"]), scale, zero)


def before(q, k, v, mask=None, *, grids, **options):
    q, k, v = (rounded(x.float(), grids, name) for x, name in ((q, "query"), (k, "key"), (v, "value")))
    return quantized_attention(q, k, v, mask, **options)


def centred(x, options, name):
    """Inputs that fill their grid, with ties."""
    scale, zero = options[f"{name}_scale"], options[f"{name}_zero_point"]
    top = 2 ** options[f"{name}_bits"] - 1
    codes = (x * top / 6 + top / 2).clamp(-1, top + 1)
    codes[..., ::2] = codes[..., ::2].floor() + 0.5
    return (codes - zero) * scale


def operands(shape, options, seed=0):
    return [
        centred(x, options, name) for x, name in zip(inputs(shape, 1, seed), ("query", "key", "value"), strict=True)
    ]


def assert_close_but_for_flips(found, wanted, keys):
    rows = ((found - wanted).abs() > 2e-5 * wanted.abs().amax()).any(-1)
    assert rows.double().mean() <= keys * FLIPS + 1e-9


def scale_for(zeros):
    """Scores of a few units, however far the grids are from zero."""
    return 1e-4 if max(map(abs, zeros)) > 200 else 0.02


# --- values ---


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("shape", SHAPES)
def test_integer_scores(each_tier, shape, zeros):
    options = grids(zeros)
    q, k, _ = operands(shape, options)
    exact = [rounded(x, options, name).double() for x, name in ((q, "query"), (k, "key"))]
    wanted = (exact[0] @ exact[1].transpose(-1, -2) * scale_for(zeros)).softmax(-1)
    unit = torch.eye(shape[3]).expand(*shape[:2], -1, -1)
    scores = {name: value for name, value in options.items() if not name.startswith("value")}
    found = quantized_attention(q, k, unit, scale=scale_for(zeros), **scores)
    # Of scores whose terms may be large and cancel: some ulp of the largest.
    sizes = exact[0].abs() @ exact[1].abs().transpose(-1, -2)
    rtol = 1e-5 + 8 * 2**-24 * float(sizes.max()) * scale_for(zeros)
    torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("bits, zero_point", [(2, 0.0), (4, 3.0), (8, 0.0), (8, 0.5), (8, 255.0)])
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("shape", SHAPES)
def test_integer_products_with_v(each_tier, shape, zeros, bits, zero_point):
    options = {**grids(zeros), **grid(bits, zero_point), "scale": scale_for(zeros) * 3}
    q, k, v = operands(shape, options)
    scores = {name: value for name, value in options.items() if not name.startswith("value")}
    unit = torch.eye(shape[3]).expand(*shape[:2], -1, -1)
    weights = quantized_attention(q, k, unit, **scores).double()
    values = rounded(v, options, "value").double()
    found, wanted = quantized_attention(q, k, v, **options).double(), weights @ values
    size = weights.abs().sum(-1, keepdim=True) * values.abs().max()
    # Past 512 keys sums need no longer be exact, and codes lie up to 255 from their zero points.
    parts = 128 * options["softmax_scale"] * values.abs().sum(-2).max() if shape[3] > 512 else 0.0
    assert ((found - wanted).abs() <= 2e-6 * size + 4 * 2**-24 * parts + 1e-12).all()


def test_codes_of_v_are_those_of_uniform_quantize(each_tier):
    """Every row sees one key with probability 1, which its grid has."""
    softmax = {"softmax_scale": torch.tensor(1 / 64), "softmax_zero_point": torch.tensor(0.0)}
    mask = torch.eye(300, dtype=torch.bool)
    for bits in (2, 5, 8):
        options = grids((2.0, 2.0, 2.0), (bits, bits, bits))
        q, k, v = operands((1, 2, 300, 300, 40), options)
        wanted = rounded(v, options, "value")
        assert_same(quantized_attention(q, k, v, mask, **softmax, **options), wanted)
        assert_same(quantized_attention(q, k, v, mask, **options), wanted)


@pytest.mark.parametrize("softmax", [{}, table(), table("log_sqrt2", 8), grid(), grid(4, 0.5)])
@pytest.mark.parametrize("names", [("query", "key"), ("value",), ("query", "key", "value")])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_same_as_quantized_before(each_tier, shape, names, softmax):
    options = {name: value for name, value in grids().items() if name.startswith(names)}
    q, k, v = inputs(shape)
    found = quantized_attention(q, k, v, **softmax, **options)
    assert_close_but_for_flips(found, before(q, k, v, grids=options, **softmax), shape[3])


@pytest.mark.parametrize("softmax", [{}, table(), grid(), grid(8, 0.5)], ids=["float", "table", "grid", "half"])
@pytest.mark.parametrize("shape", [(2, 3, 70, 90, 16), (1, 2, 30, 701, 8)])
def test_the_same_bits_on_every_tier_and_with_any_threads(softmax, shape):
    q, k, v = inputs(shape)
    for zeros in ZEROS:
        options = {**softmax, **grids(zeros)}
        same_on_every_tier(lambda options=options: quantized_attention(q, k, v, **options))
        wanted = quantized_attention(q, k, v, **options)
        for count in (1, 2, 5):
            with threads(count):
                assert_same(quantized_attention(q, k, v, **options), wanted)


def test_probabilities_beside_ties_are_divided():
    """Grids so fine that codes lie on ties often, and grids that no float product could tell apart."""
    q, k, v = inputs((2, 2, 60, 70, 8))
    v = torch.eye(70).expand(2, 2, -1, -1)
    for softmax_scale in (1 / 255, 2.0**-12, 1e-5, 1e-30, 1e30):
        for zero in (0.0, 0.5, 127.5, 70000.0):
            softmax = {"softmax_scale": torch.tensor(softmax_scale), "softmax_zero_point": torch.tensor(zero)}
            value = {"value_scale": torch.tensor(1.0), "value_zero_point": torch.tensor(0.0)}
            found, wanted = (quantized_attention(q, k, v, **softmax, **more) for more in (value, {}))
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5 * softmax_scale * max(zero, 1))


# --- masks, shapes, types ---


@pytest.mark.parametrize("softmax", [grid(), table()], ids=["grid", "table"])
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("bits", [(8, 8, 8), (4, 5, 3)])
def test_codes_in_the_place_of_values(each_tier, zeros, bits, softmax):
    for shape in SHAPES[1:4]:
        options = grids(zeros, bits) | softmax
        values = operands(shape, options)
        names = ("query", "key", "value")
        codes = [
            uniform_quantize(x, options[f"{n}_scale"], options[f"{n}_zero_point"], bits=options[f"{n}_bits"])
            for x, n in zip(values, names, strict=True)
        ]
        wanted = quantized_attention(*values, **options, scale=scale_for(zeros))
        got = quantized_attention(*codes, **options, scale=scale_for(zeros))
        assert got.dtype == torch.float32
        assert_same(got, wanted)


@pytest.mark.parametrize("operand", ["none", "all"])
@pytest.mark.parametrize("softmax", [{}, grid(), table()], ids=["float", "grid", "table"])
def test_output_codes_are_those_of_uniform_quantize(each_tier, softmax, operand):
    for shape in SHAPES:
        options = softmax | (grids() if operand == "all" else {})
        values = operands(shape, grids())
        y = quantized_attention(*values, **options)
        for width in (3, 8):
            scale, zero_point = y.abs().max() / 2**width, torch.tensor(2**width / 2 - 0.25)
            wanted = uniform_quantize(y, scale, zero_point, bits=width)
            grid = {"output_scale": scale, "output_zero_point": zero_point, "output_bits": width}
            assert_same(quantized_attention(*values, **options, **grid), wanted)
            assert wanted.unique().numel() > 4


@pytest.mark.parametrize("softmax", [table(), table("paper"), grid(), grid(4, 0.5)])
@pytest.mark.parametrize("name", MASKS)
def test_masks(each_tier, name, softmax):
    q, k, v = inputs()
    mask = MASKS[name]()
    found = quantized_attention(q, k, v, mask, **softmax, **grids())
    assert_close_but_for_flips(found, before(q, k, v, mask, grids=grids(), **softmax), 50)


@pytest.mark.parametrize("softmax", [{}, table(), table("paper"), grid(), grid(4, 0.5)])
@pytest.mark.parametrize("shape", [(1, 2, 40, 40, 8), (1, 1, 30, 50, 8), (1, 1, 50, 30, 8), (1, 1, 700, 700, 4)])
def test_causal(each_tier, shape, softmax):
    if each_tier == "scalar" and shape[2] == 700:
        pytest.skip("half a minute of scalar products")
    q, k, v = inputs(shape)
    options = {**softmax, "is_causal": True}
    found = quantized_attention(q, k, v, **options, **grids())
    assert_close_but_for_flips(found, before(q, k, v, grids=grids(), **options), shape[3])


def test_rows_without_keys_and_rows_with_nan(each_tier):
    q, k, v = inputs()
    mask = torch.zeros(40, 50)
    mask[3], mask[5, 7] = -torch.inf, torch.nan
    for softmax in (grid(), grid(4, 0.5), table()):
        found = quantized_attention(q, k, v, mask, **softmax, **grids())
        wanted = before(q, k, v, mask, grids=grids(), **softmax)
        torch.testing.assert_close(found[:, :, 3:6:2], wanted[:, :, 3:6:2], equal_nan=True, rtol=1e-5, atol=1e-5)
    assert quantized_attention(q, k, v, mask, **grid(), **grids())[:, :, 5].isnan().all()


def test_views_of_a_projection_are_read_where_they_lie(each_tier):
    qkv = torch.randn(2, 33, 3, 4, 8, generator=random(0))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    for softmax in (grid(), table()):
        wanted = quantized_attention(q.contiguous(), k.contiguous(), v.contiguous(), **softmax, **grids())
        assert_same(quantized_attention(q, k, v, **softmax, **grids()), wanted)
        assert_same(quantized_attention(strided(q), strided(k), strided(v), **softmax, **grids()), wanted)
        turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
        assert_same(quantized_attention(*turned, **softmax, **grids()), wanted)


@pytest.mark.parametrize("sizes", [(0, 3, 5, 6), (2, 3, 0, 6), (2, 3, 5, 0), (1, 1, 1, 1)])
def test_of_nothing(sizes):
    q, k, v = inputs((*sizes, 4))
    found = quantized_attention(q, k, v, **grid(), **grids())
    assert found.shape == q.shape
    torch.testing.assert_close(found, before(q, k, v, grids=grids(), **grid()))
    options = {"scale": 1.0, **grid()}  # all scores are 0
    empty = quantized_attention(q[..., :0], k[..., :0], v, **options, **grids())
    torch.testing.assert_close(empty, before(q[..., :0], k[..., :0], v, grids=grids(), **options))


def test_leading_dimensions_broadcast():
    q, k, v = inputs((2, 3, 8, 9, 4))
    for a, b, c in ((q, k[:1], v), (q[0], k, v[:, :1]), (q[0, 0], k[0, 0], v[0, 0]), (q[None], k[0, 0], v[0])):
        found = quantized_attention(a, b, c, **grid(), **grids())
        torch.testing.assert_close(found, before(a, b, c, grids=grids(), **grid()))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_types(each_tier, dtype):
    q, k, v = (x.to(dtype) for x in inputs())
    found = quantized_attention(q, k, v, **grid(), **grids())
    assert found.dtype == dtype
    assert_same(found, quantized_attention(q.float(), k.float(), v.float(), **grid(), **grids()).to(dtype))


# --- the operator in the dispatcher ---


def test_opcheck():
    q, k, v = inputs((2, 2, 6, 7, 8))
    output = {"output_scale": torch.tensor(0.1), "output_zero_point": torch.tensor(3.0)}
    for softmax in ({}, table(), grid()):
        check_op(OP, (q, k, v), {**softmax, **grids()})
        check_op(OP, [(x.abs() * 50).byte() for x in (q, k, v)], {**softmax, **grids()})
        check_op(OP, (q, k, v), {**softmax, **output})


def test_script():
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros_like(scale)
        return torch.ops.torchquant.quantized_attention(
            q, k, v, query_scale=scale, query_zero_point=zero, key_scale=scale, key_zero_point=zero, key_bits=4
        )

    args = (*inputs(), torch.tensor(0.1))
    assert_same(scripted(attend)(*args), attend(*args))


ERRORS = [
    ({"query_scale": None}, ValueError, "query_scale and query_zero_point must be given together, got only one of"),
    ({"value_zero_point": None}, ValueError, "value_scale and value_zero_point must be given together, got only one"),
    (
        {"query_scale": None, "query_zero_point": None},
        ValueError,
        "query_scale and key_scale must be given together, got only one of them",
    ),
    ({"key_bits": 9}, ValueError, "bits must be 2..8, got 9"),
    ({"key_scale": torch.ones(2)}, ValueError, r"key_scale must hold one value, got shape \[2\]"),
    ({"key_scale": torch.tensor(-1.0)}, ValueError, "key_scale must be positive, got -1"),
    ({"value_zero_point": torch.tensor(torch.inf)}, ValueError, "value_zero_point must be finite, got inf"),
    ({"value_scale": torch.tensor(1.0).double()}, TypeError, "value_scale must be float32, got Double"),
    ({"output_scale": torch.tensor(1.0)}, ValueError, "output_scale and output_zero_point must be given together"),
    ({"q": torch.ones(2, 3).byte()}, TypeError, "k must have q's dtype Byte, got Float"),
    (
        {x: torch.ones(4, 3).byte() for x in "qkv"} | {"value_scale": None, "value_zero_point": None},
        ValueError,
        "codes need query_scale, key_scale and value_scale",
    ),
    ({"q": torch.full((2, 3), torch.nan)}, ValueError, "q must be finite, got 6 NaN or Inf"),
    ({"k": torch.full((4, 3), torch.inf)}, ValueError, "k must be finite, got 12 NaN or Inf"),
    ({"v": torch.full((4, 3), -torch.inf)}, ValueError, "v must be finite, got 12 NaN or Inf"),
]


@pytest.mark.parametrize("softmax", [table(), grid()], ids=["table", "grid"])
@pytest.mark.parametrize("change, kind, text", ERRORS, ids=lambda x: x[:40] if isinstance(x, str) else "")
def test_errors(change, kind, text, softmax):
    args = {"q": torch.ones(2, 3), "k": torch.ones(4, 3), "v": torch.ones(4, 3), **grids(), **softmax}
    with pytest.raises(kind, match=f"quantized_attention: {text}"):
        quantized_attention(**(args | change))


# --- in QAttention ---


def product_on_grids(softmax):
    product = QAttention().eval()
    if "thresholds" in softmax:
        bits = (len(softmax["exponents"]) - 1).bit_length()
        product.softmax = TableQuantizer(bits, softmax["thresholds"], softmax["exponents"], softmax["eta"])
    else:
        product.softmax = UniformQuantizer(
            softmax["softmax_bits"], softmax["softmax_scale"], softmax["softmax_zero_point"]
        )
    for place, (point, bits) in enumerate((("query", 8), ("key", 7), ("value", 4))):
        scale = torch.tensor([0.04 * 2 ** (8 - bits)])
        setattr(product, point, UniformQuantizer(bits, scale, torch.tensor([2.0 ** (bits - 1) + place])))
    return product


@pytest.fixture
def quantized(monkeypatch):
    """Calls of UniformQuantizer's operators."""
    count, original = [], UniformQuantizer.forward

    def counted(self, x):
        count.append(1)
        return original(self, x)

    monkeypatch.setattr(UniformQuantizer, "forward", counted)
    return count


@pytest.mark.parametrize("softmax", [table(), table("paper"), grid()])
@pytest.mark.parametrize("mask", [None, MASKS["bool"], MASKS["added"]])
def test_qattention_gives_what_its_steps_give(each_tier, quantized, softmax, mask):
    product, x, mask = product_on_grids(softmax), inputs(), None if mask is None else mask()
    with torch.no_grad():
        found, none = product(*x, mask, need_weights=False)
        assert none is None and not quantized
        wanted, weights = product(*x, mask)
    assert weights is not None and len(quantized) >= 3
    assert_close_but_for_flips(found, wanted, 50)


def test_qattention_calls_its_quantizers_where_they_count(quantized):
    product, x = product_on_grids(grid()), inputs()

    def called(module=product, args=x):
        quantized.clear()
        module(*args, need_weights=False)
        return len(quantized) > 0

    with torch.no_grad():
        assert not called()
        for point in ("query", "key", "value"):
            for register in ("register_forward_hook", "register_forward_pre_hook"):
                handle = getattr(getattr(product, point), register)(lambda *_: None)
                assert called()
                handle.remove()
            for other in (nn.Identity(), UniformQuantizer(8, torch.full((16,), 0.1), torch.zeros(16))):
                changed = copy.deepcopy(product)
                setattr(changed, point, other)
                assert called(changed)
        assert called(args=[t.double() for t in x])
        assert not called()
    learned = [t.clone().requires_grad_() for t in x]
    assert called(args=learned)
    with torch.no_grad():
        assert not called(args=learned)


@pytest.mark.parametrize("softmax", [table(), grid()], ids=["table", "grid"])
def test_qattention_in_script_export_and_compile(softmax):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.product = product_on_grids(softmax)

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self.product(q, k, v, None, None, False, 0.0, False)[0]

    holder, x = Holder().eval(), inputs()
    with torch.no_grad():
        wanted = holder(*x)
        assert_same(scripted(holder)(*x), wanted)
        exported = torch.export.export(holder, x)
        assert "quantized_attention" in str(exported.graph) and "uniform_quantize" not in str(exported.graph)
        assert_same(exported.module()(*x), wanted)
        assert_same(torch.compile(holder, fullgraph=True, backend="aot_eager")(*x), wanted)
        with tier("scalar"):
            assert_same(holder(*x), wanted)
