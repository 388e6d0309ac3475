"""Fixtures. FAIL_WITHOUT_CUDA=1 turns a missing GPU from a skip into a failure."""

import os
from collections.abc import Iterator

import helpers
import pytest
import torch


@pytest.fixture(params=helpers.PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every CPU tier, then CUDA: the test runs once on each and gets the device to put its tensors on."""
    reason = helpers.missing_place(request.param)
    if reason and request.param == "cuda" and os.environ.get("FAIL_WITHOUT_CUDA") == "1":
        pytest.fail(f"FAIL_WITHOUT_CUDA=1: {reason}")
    if reason:
        pytest.skip(reason)
    if request.param == "cuda":
        yield torch.device("cuda")
        return
    with helpers.tier(request.param):
        yield torch.device("cpu")


@pytest.fixture(params=[name for name in helpers.PLACES if name != "cuda"])
def each_tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every CPU tier, for what is promised to be equal bit for bit on all of them."""
    reason = helpers.missing_place(request.param)
    if reason:
        pytest.skip(reason)
    with helpers.tier(request.param):
        yield request.param
