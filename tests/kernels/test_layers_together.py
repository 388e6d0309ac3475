"""Operators of several layers against the operators that they are made of, bit for bit."""

import pytest
import torch
from helpers import FLOAT_TYPES, assert_same, check_op, layouts, random, scripted

from torchquant.kernels import (
    linear_prepack,
    quantized_attention,
    quantized_block,
    quantized_layer_norm,
    quantized_linear,
    quantized_mlp,
    quantized_self_attention,
)
from torchquant.quantizers import dynamic_quantize, sulq_fit

MLP = torch.ops.torchquant.quantized_mlp.default
ATTENTION = torch.ops.torchquant.quantized_self_attention.default
BLOCK = torch.ops.torchquant.quantized_block.default
NONE = torch.empty(0)
LEVELS = {2: ("softmax_scale", "softmax_zero_point"), 3: ("thresholds", "exponents", "eta"), 0: ()}


def layer(inputs, outputs, bits=4, *, scale=0.05, group_size=0, bias=True, table=False, rows=0, seed=0, place="cpu"):
    """The two arguments of a layer with random codes; ``scale`` None: its input has no grid, or ``rows``: 1 symmetric
    ones of each row, 2 asymmetric ones."""
    codes = torch.randint(0, 2**bits, (outputs, inputs), generator=random(seed), dtype=torch.uint8)
    groups = 1 if group_size == 0 else -(-inputs // group_size)
    scales = 0.01 + 0.02 * torch.rand(outputs, groups, generator=random(seed + 1))
    levels = torch.arange(-8, 8, dtype=torch.int8) * 3 if table else None
    packed, grid, kept = linear_prepack(codes, scales, None, bits=bits, group_size=group_size, levels=levels)
    offset = torch.randn(outputs, generator=random(seed + 2)) if bias else NONE
    numbers = [NONE, NONE] if scale is None else [torch.tensor(scale), torch.tensor(120.0)]
    tensors = [packed, grid, offset, kept if table else NONE, *numbers]
    return [t.to(place) for t in tensors], [
        bits,
        inputs,
        outputs,
        group_size,
        16 if scale is None and not rows else 8,
        rows,
    ]


def linear(x, arguments, activation="none", **output):
    """The same by quantized_linear."""
    (packed, grid, *rest), (bits, inputs, outputs, group_size, input_bits, rows) = arguments
    bias, levels, scale, zero_point = (t if t.numel() else None for t in rest)
    return quantized_linear(
        x, packed, grid, bias, bits=bits, in_features=inputs, out_features=outputs, group_size=group_size,
        levels=levels, input_scale=scale, input_zero_point=zero_point, input_bits=input_bits, activation=activation,
        input_symmetric={0: None, 1: True, 2: False}[rows], **output,
    )  # fmt: skip


def output_grid(arguments):
    """Where outputs are to be codes of the input of a layer."""
    (*_, scale, zero_point), (*_, bits, _) = arguments
    return {"output_scale": scale, "output_zero_point": zero_point, "output_bits": bits} if scale.numel() else {}


def inputs(*shape, seed=9, dtype=torch.float32):
    x = torch.randn(shape, generator=random(seed))
    return (x.abs() * 50).to(torch.uint8) if dtype == torch.uint8 else x.to(dtype)


LAYERS = {
    "codes travel": ({}, {}),
    "floats between": ({}, {"scale": None}),
    "no grids": ({"scale": None}, {"scale": None}),
    "groups": ({"group_size": 16, "bits": 3}, {"group_size": 32, "bits": 2}),
    "rows, symmetric": ({"scale": None, "rows": 1}, {"scale": None, "rows": 1}),
    "rows": ({"scale": None, "rows": 2, "group_size": 16}, {"scale": None, "rows": 2}),
    "one grid, then rows": ({}, {"scale": None, "rows": 2}),
    "tables, no bias": ({"table": True, "bias": False}, {"table": True, "bias": False}),
}


@pytest.mark.parametrize("dtype", [*FLOAT_TYPES, torch.uint8])
@pytest.mark.parametrize("name", LAYERS)
def test_mlp_is_its_layers(place, name, dtype):
    first, second = LAYERS[name]
    if dtype == torch.uint8 and first.get("scale", 0) is None:
        pytest.skip("codes need a grid")
    if place == "cuda" and (first.get("rows") or second.get("rows")):
        pytest.skip("grids of rows are for the CPU")
    fc1, fc2 = layer(40, 70, place=place, **first), layer(70, 24, seed=5, place=place, **second)
    x = inputs(2, 9, 40, dtype=dtype).to(place)
    for activation in ("none", "gelu", "silu"):
        wanted = linear(linear(x, fc1, activation, **output_grid(fc2)), fc2)
        assert_same(quantized_mlp(x, *fc1, *fc2, activation=activation), wanted)


def attention_arguments(heads=3, width=8, softmax="table", proj_scale=0.02, bits=8):
    size = heads * width
    qkv, proj = layer(40, 3 * size), layer(size, 30, seed=5, scale=proj_scale)
    scales = [torch.tensor(s) for s in (0.03, 0.04, 0.05)]
    zero_points = [torch.tensor(z) for z in (128.0, 100.0, 120.5)]
    probabilities = torch.rand(64, generator=random(1)) ** 4
    eta, thresholds, exponents = sulq_fit(probabilities, bits=4)
    levels = {
        "table": [thresholds, exponents, eta],
        "grid": [torch.tensor(1.0 / 255), torch.tensor(0.0)],
        "values": [],
    }[softmax]
    return (*qkv, *proj, scales, zero_points, bits, levels), {"num_heads": heads}


def attention_by_parts(x, *arguments, num_heads, **rest):
    qkv, qkv_numbers, proj, proj_numbers, scales, zero_points, bits, levels = arguments
    codes = linear(
        x, (qkv, qkv_numbers), output_scale=torch.stack(scales), output_zero_point=torch.stack(zero_points),
        output_bits=bits,
    )  # fmt: skip
    q, k, v = codes.view(*x.shape[:2], 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    grids = {}
    for name, scale, zero_point in zip(("query", "key", "value"), scales, zero_points, strict=True):
        grids |= {f"{name}_scale": scale, f"{name}_zero_point": zero_point, f"{name}_bits": bits}
    mixed = quantized_attention(
        q,
        k,
        v,
        **grids,
        **dict(zip(LEVELS[len(levels)], levels, strict=True)),
        **output_grid((proj, proj_numbers)),
        **rest,
    )
    return linear(mixed.transpose(1, 2).flatten(2), (proj, proj_numbers))


def attention_on_tokens(x, arguments, symmetric, *, num_heads, **rest):
    qkv, qkv_numbers, proj, proj_numbers, _, _, bits, levels = arguments
    values = linear(x, (qkv, qkv_numbers)).view(*x.shape[:2], 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    options, codes = {}, []
    for name, value in zip(("query", "key", "value"), values, strict=True):
        code, scale, zero_point = dynamic_quantize(value, bits=bits, symmetric=symmetric)
        codes.append(code)
        options |= {f"{name}_scale": scale, f"{name}_zero_point": zero_point, f"{name}_bits": bits}
    options |= dict(zip(LEVELS[len(levels)], levels, strict=True))
    mixed = quantized_attention(*codes, **options, **output_grid((proj, proj_numbers)), **rest)
    return linear(mixed.transpose(1, 2).flatten(2), (proj, proj_numbers))


@pytest.mark.parametrize("softmax", ["table", "grid"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_self_attention_on_grids_of_tokens(each_tier, softmax, symmetric):
    for bits, proj_scale in ((8, 0.02), (4, None)):
        arguments, options = attention_arguments(softmax=softmax, proj_scale=proj_scale, bits=bits)
        arguments = (*arguments[:4], [], [], *arguments[6:])
        x = inputs(2, 17, 40)
        for rest in ({}, {"is_causal": True}):
            found = quantized_self_attention(x, *arguments, symmetric=symmetric, **options, **rest)
            assert_same(found, attention_on_tokens(x, arguments, symmetric, **options, **rest))


@pytest.mark.parametrize("softmax", ["table", "grid", "values"])
@pytest.mark.parametrize("proj_scale", [0.02, None])
@pytest.mark.parametrize("bits", [8, 4])
def test_self_attention_is_its_parts(each_tier, softmax, proj_scale, bits):
    arguments, options = attention_arguments(softmax=softmax, proj_scale=proj_scale, bits=bits)
    masks = [{}, {"is_causal": True}, {"mask": torch.rand(17, 17, generator=random(2)) > 0.3}, {"scale": 0.2}]
    for dtype in (torch.float32, torch.uint8):
        x = inputs(2, 17, 40, dtype=dtype)
        for rest in masks:
            found = quantized_self_attention(x, *arguments, **options, **rest)
            assert_same(found, attention_by_parts(x, *arguments, **options, **rest))
            assert found.shape == (2, 17, 30)


def block_arguments(grids=True, bias=True):
    scale = 0.05 if grids else None
    qkv, proj = layer(40, 72, scale=scale, rows=0 if grids else 1), layer(24, 40, seed=5, scale=0.02)
    fc1, fc2 = layer(40, 70, seed=6, scale=scale, rows=0 if grids else 1), layer(70, 40, seed=7)
    arguments, options = attention_arguments()
    norms = [1 + 0.1 * torch.randn(40, generator=random(i)) for i in range(4)]
    norms = norms if bias else [norms[0], NONE, NONE, NONE]
    return (norms, [1e-5, 1e-3], *qkv, *proj, *arguments[4:], 8, *fc1, *fc2), options


def block_by_parts(x, norms, eps, *arguments, activation="gelu", **options):
    attention, mlp = arguments[:9], arguments[9:]

    def norm(x, which, layer):
        weight, bias = (t if t.numel() else None for t in norms[2 * which : 2 * which + 2])
        grid = output_grid(layer)
        if not grid:
            return torch.nn.functional.layer_norm(x, [40], weight, bias, eps[which])
        return quantized_layer_norm(x, weight, bias, eps=eps[which], **grid)

    y = x + quantized_self_attention(norm(x, 0, attention[:2]), *attention, **options)
    return y + quantized_mlp(norm(y, 1, mlp[:2]), *mlp, activation=activation)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grids", [True, False])
def test_block_is_its_parts(each_tier, grids, bias):
    arguments, options = block_arguments(grids, bias)
    for shape in ((1, 17, 40), (7, 90, 40), (3, 300, 40), (2, 0, 40), (0, 5, 40)):
        x = inputs(*shape)
        for activation in ("gelu", "silu"):
            found = quantized_block(x, *arguments, **options, activation=activation)
            assert_same(found, block_by_parts(x, *arguments, **options, activation=activation))
    x = inputs(4, 9, 40)
    for other in layouts(x[0]).values():
        assert_same(quantized_block(other[None], *arguments, **options), quantized_block(x[:1], *arguments, **options))
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert_same(quantized_block(strided, *arguments, **options), quantized_block(x, *arguments, **options))


BLOCK_ERRORS = {
    r"quantized_block: x must be \[B, T, K\], got \[17, 40\]": {"x": torch.zeros(17, 40)},
    "quantized_block: x must be float32, got Half": {"x": torch.zeros(1, 17, 40, dtype=torch.float16)},
    "quantized_block: norms must be weight and bias of two, with two eps, got 3 tensors and 2 eps": {
        "norms": [NONE] * 3
    },
    "quantized_block: norms must be weight and bias of two, with two eps, got 4 tensors and 1 eps": {"eps": [1e-5]},
    "quantized_block: fc1 must be 6 tensors": {"fc1": [NONE]},
    "quantized_block: num_heads must divide": {"num_heads": 5},
    "quantized_block: softmax must be": {"softmax": [NONE]},
    "quantized_block: proj and fc2 must give the 30 features of x, got 40 and 40": {"x": torch.zeros(1, 17, 30)},
    r"quantized_layer_norm: weight must have shape \[40\]": {"norms": [torch.ones(39), NONE, NONE, NONE]},
}


@pytest.mark.parametrize("text", BLOCK_ERRORS)
def test_bad_blocks_are_refused(text):
    names = (
        "norms eps qkv qkv_numbers proj proj_numbers scales zero_points bits softmax softmax_bits "
        "fc1 fc1_numbers fc2 fc2_numbers"
    )
    arguments, options = block_arguments()
    given = {"x": inputs(2, 17, 40), **dict(zip(names.split(), arguments, strict=True)), **options}
    with pytest.raises((ValueError, TypeError), match=text):
        quantized_block(**given | BLOCK_ERRORS[text])
    not_finite = inputs(2, 300, 40)
    not_finite[1, 7, 3] = float("nan")
    with pytest.raises(ValueError, match="quantized_layer_norm: x"):
        quantized_block(not_finite, *arguments, **options)


def test_layouts_and_empty_inputs(each_tier):
    fc1, fc2 = layer(40, 70), layer(70, 24, seed=5)
    arguments, options = attention_arguments()
    x = inputs(17, 40)
    for other in layouts(x).values():
        assert_same(quantized_mlp(other, *fc1, *fc2), quantized_mlp(x, *fc1, *fc2))
        found = quantized_self_attention(other.unsqueeze(0), *arguments, **options)
        assert_same(found, quantized_self_attention(x.unsqueeze(0), *arguments, **options))
    assert quantized_mlp(inputs(0, 40), *fc1, *fc2).shape == (0, 24)
    for shape in ((0, 5, 40), (5, 0, 40)):
        assert quantized_self_attention(inputs(*shape), *arguments, **options).shape == (*shape[:2], 30)


def test_opcheck_and_trace():
    fc1, fc2 = layer(40, 70), layer(70, 24, seed=5)
    arguments, options = attention_arguments()
    x = inputs(2, 17, 40)
    check_op(MLP, (x, *fc1, *fc2))
    check_op(MLP, (x.half(), *layer(40, 70, scale=None), *layer(70, 24, scale=None)))
    check_op(ATTENTION, (x, *arguments), options)
    block = block_arguments()[0]
    check_op(BLOCK, (x, *block), options)
    runs = (
        lambda x: quantized_mlp(x, *fc1, *fc2),
        lambda x: quantized_self_attention(x, *arguments, **options),
        lambda x: quantized_block(x, *block, **options),
    )
    for run in runs:
        assert_same(torch.jit.trace(run, (x,))(2 * x), run(2 * x))


def test_scripted():
    def both(x: torch.Tensor, fc1: list[torch.Tensor], fc2: list[torch.Tensor]) -> torch.Tensor:
        return torch.ops.torchquant.quantized_mlp(
            x, fc1, [4, 40, 70, 0, 8, 0], fc2, [4, 70, 24, 0, 8, 0], activation="silu"
        )

    fc1, fc2 = layer(40, 70), layer(70, 24, seed=5)
    x = inputs(3, 40)
    assert_same(scripted(both)(x, fc1[0], fc2[0]), quantized_mlp(x, *fc1, *fc2, activation="silu"))


FC1, FC2 = layer(8, 6), layer(6, 4)
MLP_ERRORS = {
    r"quantized_mlp: fc1 must be 6 tensors \(packed, .*\), got 5": (FC1[0][:5], FC1[1], *FC2),
    r"quantized_mlp: fc2_numbers must be 6 \(bits, .*\), got 5": (*FC1, FC2[0], FC2[1][:5]),
    r"quantized_mlp: fc1_numbers must end with 0 \(no grid .*\), got 3": (FC1[0], [*FC1[1][:5], 3], *FC2),
    r"quantized_linear: x must be \[..., 7\], got \[2, 8\]": (FC1[0], [4, 7, 6, 0, 8, 0], *FC2),
    r"quantized_linear: x must be \[..., 5\], got \[2, 6\]": (*FC1, *layer(5, 4)),
    "quantized_linear: input_scale and input_zero_point must": ([*FC1[0][:5], NONE], FC1[1], *FC2),
}


@pytest.mark.parametrize("text", MLP_ERRORS)
def test_bad_layers_are_refused(text):
    with pytest.raises(ValueError, match=text):
        quantized_mlp(torch.zeros(2, 8), *MLP_ERRORS[text])


ATTENTION_ERRORS = {
    r"x must be \[B, T, K\], got \[17, 40\]": {"x": torch.zeros(17, 40)},
    "num_heads must divide q, k and v of 72 features together, got 5": {"num_heads": 5},
    "num_heads must divide q, k and v of 72 features together, got 0": {"num_heads": 0},
    "scales must be three, of q, k and v, got 2": {"scales": [torch.ones(())] * 2},
    r"zero_points must be one number each on the CPU, got \[2\] on cpu": {"zero_points": [torch.ones(2)] * 3},
    "scales must be float32, got Double": {"scales": [torch.ones((), dtype=torch.float64)] * 3},
    "softmax must be thresholds, exponents and eta, or scale and zero_point, or nothing, got 1": {"softmax": [NONE]},
    "qkv must be 6 tensors": {"qkv": [NONE]},
    "proj must be 6 tensors": {"proj": [NONE]},
}


@pytest.mark.parametrize("text", ATTENTION_ERRORS)
def test_bad_attention_is_refused(text):
    names = ("qkv", "qkv_numbers", "proj", "proj_numbers", "scales", "zero_points", "bits", "softmax")
    arguments, options = attention_arguments()
    given = {"x": inputs(2, 17, 40), **dict(zip(names, arguments, strict=True)), **options, **ATTENTION_ERRORS[text]}
    with pytest.raises((ValueError, TypeError), match=f"quantized_self_attention: {text}"):
        quantized_self_attention(**given)
