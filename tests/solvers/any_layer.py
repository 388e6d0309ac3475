"""Layers that hypothesis makes up, and what every solver with a damped factor promises of its result on them."""

from collections.abc import Callable

import torch
from helpers import FLOAT_TYPES, assert_same, layouts
from hypothesis import strategies as st

ANY_LAYER = {
    "shape": st.tuples(st.integers(0, 14), st.integers(0, 40)),
    "tokens": st.integers(0, 60),
    "dtype": st.sampled_from(FLOAT_TYPES),
    "layout": st.sampled_from(["contiguous", "transposed", "sliced", "strided"]),
}


def check_any_layer(solver: Callable[..., tuple], facts: int, shape, tokens, dtype, layout, options) -> None:
    """``facts``: in info."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(shape, generator=generator).to(dtype)
    x = torch.randn(tokens, columns, generator=generator)
    gram = x.T @ x
    got = solver(weight, gram, **options)
    if layout != "contiguous":
        assert_same(solver(layouts(weight)[layout], layouts(gram)[layout], **options), got)
    codes, scale, zero_point, info = got
    groups = 1 if options["group_size"] == 0 else -(-columns // options["group_size"])
    assert codes.shape == shape and scale.shape == zero_point.shape == (rows, groups) and info.shape == (facts,)
    assert (codes.long() < 2 ** options["bits"]).all() and (scale > 0).all() and scale.isfinite().all()
    assert info.tolist()[0] in (0, 1) and info.tolist()[1] == int((gram.diagonal() == 0).sum())
