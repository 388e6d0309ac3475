"""quantized_attention against float64 softmax, against sulq_quantize's codes, and in the place of QAttention's steps.

What may differ from the steps: products of other sizes and another exponential give other last bits of a probability.
So one beside a threshold may get the neighbouring code. CLOSE bounds how near, FLIPS how many.
"""

import copy

import pytest
import torch
from helpers import FLOAT_TYPES, assert_same, check_op, random, scripted, strided, threads
from torch import nn

from torchquant import _C
from torchquant.kernels import quantized_attention
from torchquant.nn import QAttention
from torchquant.nn.attention import QMultiheadAttention
from torchquant.nn.quantizers import DynamicQuantizer, TableQuantizer, UniformQuantizer
from torchquant.quantizers import sulq_dequantize, sulq_fit, sulq_quantize, uniform_dequantize, uniform_quantize

OP = torch.ops.torchquant.quantized_attention.default
CLOSE = 5e-6  # relative distance of a probability from a threshold
FLIPS = 1e-4  # of all codes
TABLES = [("zero_exact", 3), ("zero_exact", 4), ("paper", 4), ("log2", 6), ("log_sqrt2", 4), ("log_sqrt2", 8)]
SHAPES = [(1, 6, 197, 197, 64), (3, 2, 49, 49, 32), (2, 1, 5, 33, 7), (1, 1, 300, 700, 8), (1, 2, 1, 1, 1)]


def inputs(shape=(2, 3, 40, 50, 16), spread=1.5, seed=0):
    batch, heads, rows, keys, width = shape
    q = spread * torch.randn(batch, heads, rows, width, generator=random(seed))
    k, v = (torch.randn(batch, heads, keys, width, generator=random(seed + i)) for i in (1, 2))
    return q, k, v


def table(variant="zero_exact", bits=4):
    attention = torch.softmax(2 * torch.randn(64, 197, generator=random(7)), -1)
    eta, thresholds, exponents = sulq_fit(attention, bits=bits, variant=variant)
    return {"thresholds": thresholds, "exponents": exponents, "eta": eta}


def grid(bits=8, zero_point=0.0):
    return {
        "softmax_scale": torch.tensor(1.0 / (2**bits - 1)),
        "softmax_zero_point": torch.tensor(zero_point),
        "softmax_bits": bits,
    }


def weights_of(q, k, mask=None, **options):
    """The quantized probabilities: attention to the rows of a unit matrix."""
    unit = torch.eye(k.shape[-2], dtype=q.dtype).expand(*k.shape[:-2], -1, -1)
    return quantized_attention(q, k, unit, mask, **options)


def probabilities(q, k, mask=None, scale=None):
    """Float64."""
    scores = q.double() @ k.double().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_softmax_without_a_quantizer(each_tier, shape, spread):
    q, k, v = inputs(shape, spread)
    found, wanted = weights_of(q, k), probabilities(q, k)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5 * max(spread, 1), atol=1e-37)
    error = (quantized_attention(q, k, v) - wanted @ v.double()).abs().max()
    other = (torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v - wanted @ v.double()).abs().max()
    assert error <= 2 * other + 1e-6


@pytest.mark.parametrize("variant, bits", TABLES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_those_of_sulq_quantize(each_tier, variant, bits, shape):
    q, k, _ = inputs(shape)
    options = table(variant, bits)
    codes = sulq_quantize(weights_of(q, k), options["thresholds"])
    assert_same(weights_of(q, k, **options), sulq_dequantize(codes, options["exponents"], options["eta"]))


@pytest.mark.parametrize("bits, zero_point", [(2, 0.0), (4, 3.0), (8, 0.0), (8, 0.5)])
def test_codes_are_those_of_uniform_quantize(each_tier, bits, zero_point):
    q, k, _ = inputs()
    options = grid(bits, zero_point)
    scale, zero = options["softmax_scale"], options["softmax_zero_point"]
    codes = uniform_quantize(weights_of(q, k), scale, zero, bits=bits)
    assert_same(weights_of(q, k, **options), uniform_dequantize(codes, scale, zero))


TABLES_OF_ONES_OWN = {
    "none": [],
    "infinite": [0.1, float("inf"), float("inf")],
    "below zero": [-1.0, -0.0, 0.02, 0.02, 0.5, 1.0, 2.0],
    "everything under -inf": [-float("inf"), 0.01],
    "neighbours": [0.01, float(torch.tensor(0.01).nextafter(torch.tensor(1.0))), 0.02],
    "crowded": [0.01 + 1e-9 * i for i in range(100)],
    "many": [i / 256 for i in range(255)],
}


@pytest.mark.parametrize("name", TABLES_OF_ONES_OWN)
def test_any_rising_table(each_tier, name):
    thresholds = torch.tensor(TABLES_OF_ONES_OWN[name])
    exponents = torch.linspace(-9, 0, len(thresholds) + 1)
    q, k, _ = inputs()
    eta = torch.tensor(0.125)
    codes = sulq_quantize(weights_of(q, k), thresholds)
    found = weights_of(q, k, thresholds=thresholds, exponents=exponents, eta=eta)
    assert_same(found, sulq_dequantize(codes, exponents, eta))


@pytest.mark.parametrize("variant, bits", TABLES)
def test_codes_differ_from_the_exact_only_beside_thresholds(each_tier, variant, bits):
    q, k, _ = inputs((2, 4, 197, 197, 64))
    options = table(variant, bits)
    exact = probabilities(q, k)
    wanted = torch.searchsorted(options["thresholds"].double(), exact)
    values = torch.exp2(options["exponents"].double()) - options["eta"].double()
    flipped = weights_of(q, k, **options).double() != values.float().double()[wanted]
    near = (exact.unsqueeze(-1) / options["thresholds"].double() - 1).abs().amin(-1) < CLOSE
    assert not (flipped & ~near).any()
    assert flipped.double().mean() < FLIPS


def same_on_every_tier(function):
    found = []
    before = _C.cpu_tier()
    for name in _C.cpu_tiers():
        _C.set_cpu_tier(name)
        found.append(function())
    _C.set_cpu_tier(before)
    for other in found[1:]:
        assert_same(other, found[0])


@pytest.mark.parametrize("options", [{}, table(), table("log_sqrt2", 8), grid()], ids=["float", "4", "8", "uniform"])
def test_the_same_bits_on_every_tier_and_with_any_threads(options):
    q, k, v = inputs((2, 3, 150, 701, 16))
    same_on_every_tier(lambda: quantized_attention(q, k, v, **options))
    wanted = quantized_attention(q, k, v, **options)
    for count in (1, 2, 5):
        with threads(count):
            assert_same(quantized_attention(q, k, v, **options), wanted)


# --- masks ---

MASKS = {
    "bool": lambda: torch.randn(40, 50, generator=random(3)) > 0.3,
    "bool of keys": lambda: torch.randn(2, 1, 1, 50, generator=random(3)) > 0.3,
    "bool of rows": lambda: torch.randn(3, 40, 1, generator=random(3)) > 0.3,
    "vector": lambda: torch.randn(50, generator=random(3)) > 0,
    "added": lambda: torch.randn(2, 3, 40, 50, generator=random(3)),
    "added to heads": lambda: torch.randn(3, 40, 50, generator=random(3)),
    "strided": lambda: strided(torch.randn(2, 1, 40, 50, generator=random(3))),
    "minus infinity": lambda: torch.zeros(40, 50).masked_fill(MASKS["bool"](), -torch.inf),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(each_tier, name):
    q, k, v = inputs()
    mask = MASKS[name]()
    found = weights_of(q, k, mask)
    torch.testing.assert_close(found.double(), probabilities(q, k, mask), rtol=1e-5, atol=1e-37)
    plain, _ = QAttention()(q, k, v, mask)
    torch.testing.assert_close(quantized_attention(q, k, v, mask), plain, rtol=1e-5, atol=1e-6)


def test_a_row_without_keys_is_zero_and_then_quantized(each_tier):
    q, k, v = inputs()
    for mask in (torch.ones(40, 50, dtype=torch.bool), torch.zeros(40, 50)):
        mask[3] = False if mask.dtype == torch.bool else -torch.inf
        assert not quantized_attention(q, k, v, mask)[:, :, 3].any()
        for options in (table(), table("paper"), grid()):
            product = attention_with(options)
            wanted = product(q, k, v, mask)[0][:, :, 3]
            torch.testing.assert_close(quantized_attention(q, k, v, mask, **options)[:, :, 3], wanted)


@pytest.mark.parametrize("options", [{}, table(), table("paper"), grid(4, 0.5)], ids=["float", "0", "not 0", "grid"])
@pytest.mark.parametrize("shape", [(1, 2, 40, 40, 8), (1, 1, 30, 50, 8), (1, 1, 50, 30, 8), (1, 1, 700, 700, 4)])
def test_causal(each_tier, shape, options):
    q, k, v = inputs(shape)
    mask = torch.ones(shape[2], shape[3], dtype=torch.bool).tril()
    found, wanted = (quantized_attention(q, k, v, **options, **more) for more in ({"is_causal": True}, {"mask": mask}))
    different = (found - wanted).abs().amax(-1) > 1e-5
    assert different.double().mean() < 1e-2  # rows with a flipped code


def test_masks_filled_with_the_lowest_of_floats(each_tier):
    """Where they take all keys from a row, each key has its equal share, as in float32."""
    q, k, _ = inputs()
    mask = torch.full((q.shape[2], k.shape[2]), torch.finfo(torch.float32).min)
    mask[::2, ::3] = 0.0
    found, wanted = weights_of(q, k, mask), (q @ k.transpose(-1, -2) / 4 + mask).softmax(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-37)
    assert (wanted[:, :, 1] == 1 / k.shape[2]).all()


def test_nan_and_infinity(each_tier):
    q, k, _ = inputs()
    q[0, 0, 1, 0] = torch.nan
    k[1, 2, 4, 0] = torch.inf
    found, wanted = weights_of(q, k), (q @ k.transpose(-1, -2) / 4).softmax(-1)
    torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-5, atol=1e-37)
    options = table()
    codes = sulq_quantize(wanted[0, 0, 1], options["thresholds"])
    assert_same(weights_of(q, k, **options)[0, 0, 1], sulq_dequantize(codes, options["exponents"], options["eta"]))
    assert weights_of(q, k, **grid())[0, 0, 1].isnan().all()


# --- shapes and types ---


@pytest.mark.parametrize("sizes", [(0, 3, 5, 6), (2, 3, 0, 6), (2, 3, 5, 0), (1, 1, 1, 1)])
def test_of_nothing(sizes):
    batch, heads, rows, keys = sizes
    q, k, v = inputs((batch, heads, rows, keys, 4))
    found = quantized_attention(q, k, v, **table())
    assert found.shape == q.shape
    if keys == 0:
        assert not found.any()


def test_leading_dimensions_broadcast():
    q, k, v = inputs((2, 3, 8, 9, 4))
    for a, b, c in ((q, k[:1], v), (q[0], k, v[:, :1]), (q[0, 0], k[0, 0], v[0, 0]), (q[None], k[0, 0], v[0])):
        torch.testing.assert_close(quantized_attention(a, b, c), QAttention()(a, b, c)[0])
    mask = torch.randn(2, 1, 8, 9)
    torch.testing.assert_close(quantized_attention(q[0], k[0], v[0], mask), QAttention()(q[0], k[0], v[0], mask)[0])


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_types(each_tier, dtype):
    q, k, v = (x.to(dtype) for x in inputs())
    mask = torch.randn(40, 50).to(dtype)
    found = quantized_attention(q, k, v, mask, **table())
    assert found.dtype == dtype
    assert_same(found, quantized_attention(q.float(), k.float(), v.float(), mask.float(), **table()).to(dtype))


def test_scale():
    q, k, v = inputs()
    torch.testing.assert_close(quantized_attention(q, k, v, scale=0.3), QAttention()(q, k, v, None, 0.3)[0])


def test_the_probabilities_are_nowhere():
    q, k, v = inputs((1, 4, 1024, 1024, 8))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        quantized_attention(q, k, v, **table())
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 1024 * 1024 * 4


# --- the operator in the dispatcher ---


def test_opcheck():
    q, k, v = inputs((2, 2, 6, 7, 8))
    mask = torch.randn(6, 7)
    for args, kwargs in (
        ((q, k, v), {}),
        ((q, k, v, mask), table()),
        ((q, k, v, mask > 0), grid()),
        ((q, k, v), {"is_causal": True, "scale": 0.5, **table("log_sqrt2", 8)}),
    ):
        check_op(OP, args, kwargs)


def test_script():
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.ops.torchquant.quantized_attention(q, k, v, mask, scale=0.5)

    args = (*inputs(), torch.randn(40, 50))
    assert_same(scripted(attend)(*args), quantized_attention(*args, scale=0.5))


def one(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


TABLE = {"thresholds": one(3), "exponents": one(4), "eta": one()}
ERRORS = [
    (
        {"q": one(2, 3, dtype=torch.float64)},
        TypeError,
        "q must be float32, float16, bfloat16 or uint8 codes, got Double",
    ),
    ({"k": one(4, 3, dtype=torch.half)}, TypeError, "k must have q's dtype Float, got Half"),
    ({"v": one(4)}, ValueError, r"v must have at least 2 dimensions, got \[4\]"),
    ({"k": one(4, 5)}, ValueError, r"k must have q's last dimension 3, got \[4, 5\]"),
    ({"v": one(5, 3)}, ValueError, r"v must have a row for each of k's 4, got \[5, 3\]"),
    (
        {"q": one(2, 2, 3), "k": one(3, 4, 3)},
        ValueError,
        r"k must broadcast to the leading dimensions \[2\], got \[3, 4",
    ),
    ({"mask": one(2, 4, dtype=torch.int64)}, TypeError, "mask must be bool, float32, float16 or bfloat16, got Long"),
    ({"mask": one(2, 4), "is_causal": True}, ValueError, r"mask must be None with is_causal, got shape \[2, 4\]"),
    ({"mask": one(3, 4)}, ValueError, r"mask must broadcast to the scores \[2, 4\], got \[3, 4\]"),
    ({"thresholds": one(3)}, ValueError, "thresholds, exponents and eta must be given together, got only some of them"),
    ({"softmax_scale": one()}, ValueError, "softmax_scale and softmax_zero_point must be given together, got only one"),
    ({**TABLE, **grid()}, ValueError, "softmax_scale must be None with thresholds, got both"),
    ({**TABLE, "thresholds": one(3).double()}, TypeError, "thresholds must be float32, got Double"),
    ({**TABLE, "thresholds": one(256)}, ValueError, r"thresholds must be a vector of at most 255 entries, got shape"),
    ({**TABLE, "exponents": one(3)}, ValueError, "exponents must be one more than the thresholds, got 3 for 3"),
    ({**TABLE, "eta": one(2)}, ValueError, r"eta must hold one value, got shape \[2\]"),
    ({**TABLE, "eta": one().double()}, TypeError, "eta must be float32, got Double"),
    ({**TABLE, "thresholds": torch.tensor([0.2, 0.1, 0.3])}, ValueError, "thresholds must rise, got"),
    ({**grid(), "softmax_scale": one() * torch.nan}, ValueError, "softmax_scale must be finite, got nan"),
    ({**grid(), "softmax_scale": -one()}, ValueError, "softmax_scale must be positive, got -1"),
    ({**grid(), "softmax_bits": 9}, ValueError, "bits must be 2..8, got 9"),
]


@pytest.mark.parametrize("change, kind, text", ERRORS, ids=lambda x: x[:40] if isinstance(x, str) else "")
def test_errors(change, kind, text):
    with pytest.raises(kind, match=f"quantized_attention: {text}"):
        quantized_attention(**({"q": one(2, 3), "k": one(4, 3), "v": one(4, 3)} | change))


# --- in QAttention ---


def attention_with(options):
    product = QAttention().eval()
    if "thresholds" in options:
        bits = (len(options["exponents"]) - 1).bit_length()
        product.softmax = TableQuantizer(bits, options["thresholds"], options["exponents"], options["eta"])
    else:
        product.softmax = UniformQuantizer(
            options["softmax_bits"], options["softmax_scale"], options["softmax_zero_point"]
        )
    for seed, point in enumerate(("query", "key", "value")):
        setattr(product, point, UniformQuantizer(8, torch.tensor(0.04 + 0.001 * seed), torch.tensor(128.0)))
    return product


@pytest.fixture
def calls(monkeypatch):
    """How often the operator took over."""
    count, original = [], QAttention.fused

    def counted(self, *args):
        count.append(1)
        return original(self, *args)

    monkeypatch.setattr(QAttention, "fused", counted)
    return count


@pytest.mark.parametrize("options", [table(), table("paper"), table("log_sqrt2", 8), grid()])
@pytest.mark.parametrize("mask", [None, *MASKS.values()])
def test_qattention_gives_what_its_steps_give(each_tier, calls, options, mask):
    product = attention_with(options)
    x, mask = inputs(), None if mask is None else mask()
    with torch.no_grad():
        found, none = product(*x, mask, need_weights=False)
        wanted, weights = product(*x, mask)
    assert none is None and weights is not None and len(calls) == 1
    rows = ((found - wanted).abs() > 1e-5 * wanted.abs().amax()).any(-1)
    assert rows.double().mean() <= 50 * FLIPS  # of 50 weights


def test_qattention_takes_its_steps_where_they_count(calls):
    x = inputs()
    off = {"need_weights": False}
    product = attention_with(table())

    def steps(*args, module=product, **kwargs):
        module(*(args or x), **off, **kwargs)
        return not calls

    with torch.no_grad():
        assert steps(dropout=0.5)
        assert steps(*(t.double() for t in x))
        assert steps(module=QAttention())
        for quantizer in (nn.Sigmoid(), DynamicQuantizer(4), UniformQuantizer(4, one(50) / 15, 0 * one(50))):
            other = copy.deepcopy(product)
            other.softmax = quantizer
            assert steps(module=other)
        for register in (product.softmax.register_forward_hook, product.softmax.register_forward_pre_hook):
            handle = register(lambda *_: None)
            assert steps()
            handle.remove()
    learned = torch.zeros(40, 50, requires_grad=True)
    assert steps(*x, learned)
    with torch.no_grad():
        assert not steps(*x, learned)
    calls.clear()
    assert not steps()  # grad mode, but nothing asks for a gradient


@pytest.mark.parametrize("options", [table(), grid()], ids=["table", "grid"])
def test_qattention_in_script_export_and_compile(options):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.product = attention_with(options)

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self.product(q, k, v, None, None, False, 0.0, False)[0]

    holder, x = Holder().eval(), inputs()
    with torch.no_grad():
        wanted = holder(*x)
        loaded = scripted(holder)
        assert "quantized_attention" in str(loaded.product.fused.graph)
        assert_same(loaded(*x), wanted)
        exported = torch.export.export(holder, x)
        assert "quantized_attention" in str(exported.graph)
        assert_same(exported.module()(*x), wanted)
        assert_same(torch.compile(holder, fullgraph=True, backend="aot_eager")(*x), wanted)


def test_multihead_attention_without_weights(calls):
    attention = QMultiheadAttention(nn.MultiheadAttention(12, 3, batch_first=True)).eval()
    attention.product.softmax = attention_with(table()).softmax
    x = torch.randn(2, 5, 12, generator=random(0))
    with torch.no_grad():
        y, weights = attention(x, x, x)
        assert weights.shape == (2, 5, 5) and not calls
        other, none = attention(x, x, x, need_weights=False)
        assert none is None and calls
    torch.testing.assert_close(other, y)
