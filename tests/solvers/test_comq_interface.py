"""comq_quantize as an operator: opcheck, TorchScript, error texts, and any shape, type and layout."""

import pytest
import torch
from helpers import FLOAT_TYPES, GRIDS, LAYERS, assert_same, check_op, layouts, scripted
from hypothesis import given, settings
from hypothesis import strategies as st
from solvers import reference

from torchquant.solvers import comq_quantize, rtn_quantize

OP = torch.ops.torchquant.comq_quantize.default
ORDERS = ("shared", "greedy", "semi", "cyclic")


def case(place: torch.device, rows: int = 6, columns: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    layer = LAYERS["correlated"](rows, columns)
    return layer.weight.to(place), layer.gram.to(place)


def test_opcheck(place):
    weight, gram = case(place)
    start = dict(zip(("codes", "scale", "zero_point"), rtn_quantize(weight, bits=3), strict=True))
    variants = (
        {},
        {"group_size": 8, "order": "greedy"},
        {"linear": weight @ gram, "grid": "midrise", "order": "semi"},
        {"sweeps": 1, "update_scale": False, "shrink": [1.0]},
        {"init": "rtn"},
        {"init": "gptq"},
        start,
    )
    for options in variants:
        check_op(OP, (weight, gram), {"bits": 3, **options})
    check_op(OP, (weight, gram.expand(2, 20, 20)), {"bits": 3})
    check_op(OP, (weight, gram.double()), {"bits": 3})
    for rows, columns in ((0, 5), (3, 0), (0, 0)):
        empty = torch.empty(rows, columns, device=place)
        square = torch.zeros(columns, columns, device=place)
        check_op(OP, (empty, square), {"bits": 3})
        start = dict(zip(("codes", "scale", "zero_point"), rtn_quantize(empty, bits=3), strict=True))
        check_op(OP, (empty, square), {"bits": 3, **start})


def script_comq(weight: torch.Tensor, gram: torch.Tensor):
    return torch.ops.torchquant.comq_quantize(weight, gram, bits=3, group_size=8, order="semi", shrink=[1.0, 0.8])


def script_defaults(weight: torch.Tensor, gram: torch.Tensor):
    return torch.ops.torchquant.comq_quantize(weight, gram, bits=3)


def test_torchscript_gives_the_same(place):
    weight, gram = case(place)
    for function in (script_comq, script_defaults):
        assert_same(scripted(function)(weight, gram), function(weight, gram))


def test_weights_that_require_grad(place):
    weight, gram = case(place)
    tracked = comq_quantize(weight.clone().requires_grad_(), gram.clone().requires_grad_(), bits=3)
    assert_same([t.detach() for t in tracked], comq_quantize(weight, gram, bits=3))
    assert not tracked[0].requires_grad and not tracked[3].requires_grad


def test_inputs_are_left_alone(place):
    weight, gram = case(place)
    start = rtn_quantize(weight, bits=3)
    given_tensors = (weight, gram, *start)
    copies = [t.clone() for t in given_tensors]
    got = comq_quantize(weight, gram, bits=3, codes=start[0], scale=start[1], zero_point=start[2])
    assert_same(given_tensors, copies)
    assert not {t.data_ptr() for t in got} & {t.data_ptr() for t in given_tensors}, (
        "a result shares memory with an input"
    )


def test_half_weights_and_double_grams(place):
    layer = LAYERS["correlated"](12, 40)
    for dtype in (torch.float16, torch.bfloat16):
        weight = layer.weight.to(place, dtype)
        wanted = comq_quantize(weight.float(), layer.gram.to(place), bits=3)
        assert_same(comq_quantize(weight, layer.gram.to(place), bits=3), wanted)
        assert_same(comq_quantize(weight, layer.gram.double().to(place), bits=3), wanted)


BAD: list[tuple[type, dict[str, object], str]] = [
    (ValueError, {"order": "random"}, "order must be shared, greedy, semi or cyclic, got 'random'"),
    (ValueError, {"init": "zero"}, "init must be weight, rtn or gptq, got 'zero'"),
    (ValueError, {"sweeps": 0}, "sweeps must be at least 1, got 0"),
    (ValueError, {"linear": torch.zeros(4, 7)}, r"linear must have shape \[4, 8\], got \[4, 7\]"),
    (ValueError, {"linear": torch.full((4, 8), float("nan"))}, "linear must be finite, got 32 NaN or Inf"),
    (ValueError, {"codes": torch.zeros(4, 8, dtype=torch.uint8)}, "codes, scale and zero_point must be given together"),
    (ValueError, {"scale": torch.ones(4, 1)}, "codes, scale and zero_point must be given together"),
]


@pytest.mark.parametrize(("error", "options", "text"), BAD)
def test_errors_name_the_argument(place, error, options, text):
    weight, gram = case(place, 4, 8)
    options = {k: v.to(place) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with pytest.raises(error, match=f"comq_quantize: {text}"):
        comq_quantize(weight, gram, bits=3, **options)


BAD_START: list[tuple[type, str, object, str]] = [
    (ValueError, "codes", torch.zeros(4, 7, dtype=torch.uint8), r"codes must have shape \[4, 8\], got \[4, 7\]"),
    (TypeError, "codes", torch.zeros(4, 8), "codes must be uint8, got Float"),
    (ValueError, "scale", torch.ones(4, 2), r"scale must have shape \[4, 1\], got \[4, 2\]"),
    (ValueError, "zero_point", torch.ones(4), r"zero_point must have shape \[4, 1\], got \[4\]"),
    (ValueError, "codes", torch.full((4, 8), 9, dtype=torch.uint8), r"codes must be at most 7, got 9"),
    (ValueError, "scale", torch.full((4, 1), float("nan")), "scale must be finite, got 4 NaN or Inf"),
    (ValueError, "scale", torch.zeros(4, 1), "scale must be positive, got 0"),
    (ValueError, "zero_point", torch.full((4, 1), float("inf")), "zero_point must be finite, got 4 NaN or Inf"),
]


@pytest.mark.parametrize(("error", "argument", "value", "text"), BAD_START)
def test_a_bad_start_is_named(place, error, argument, value, text):
    weight, gram = case(place, 4, 8)
    start = dict(zip(("codes", "scale", "zero_point"), rtn_quantize(weight, bits=3), strict=True))
    start[argument] = value.to(place)
    with pytest.raises(error, match=f"comq_quantize: {text}"):
        comq_quantize(weight, gram, bits=3, **start)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 14), st.integers(0, 40)),
    tokens=st.integers(0, 60),
    dtype=st.sampled_from(FLOAT_TYPES),
    gram_dtype=st.sampled_from([torch.float32, torch.float64]),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "strided"]),
    options=st.fixed_dictionaries(
        {
            "bits": st.integers(2, 8),
            "group_size": st.integers(0, 45),
            "grid": st.sampled_from(GRIDS),
            "order": st.sampled_from(ORDERS),
            "sweeps": st.integers(1, 3),
            "update_scale": st.booleans(),
            "init": st.sampled_from(["weight", "rtn", "gptq"]),
            "shrink": st.sampled_from([None, [1.0], [0.9, 0.7]]),
        }
    ),
)
def test_any_layer(shape, tokens, dtype, gram_dtype, layout, options):
    rows, columns = shape
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator).to(dtype)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    gram = (x.T @ x).to(gram_dtype)
    got = comq_quantize(weight, gram, **options)
    codes, scale, zero_point, info = got
    if layout != "contiguous":
        assert_same(comq_quantize(layouts(weight)[layout], layouts(gram)[layout], **options), got)
    groups = 1 if options["group_size"] == 0 else -(-columns // options["group_size"])
    assert codes.shape == shape and scale.shape == zero_point.shape == (rows, groups) and info.shape == (3,)
    assert (codes.long() < 2 ** options["bits"]).all() and (scale > 0).all() and scale.isfinite().all()
    assert info.tolist()[1] == int((gram.diagonal() == 0).sum())
    if options["init"] == "rtn" and options["shrink"] is not None:
        start = rtn_quantize(
            weight, **{k: options[k] for k in ("bits", "group_size", "grid")}, shrink=options["shrink"][:1]
        )
        group = options["group_size"]
        before = reference.objective(weight, gram, reference.dequantize(*start, group))
        after = reference.objective(weight, gram, reference.dequantize(codes, scale, zero_point, group))
        assert (after <= before * (1 + 1e-4) + 1e-6).all()
