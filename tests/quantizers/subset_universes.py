"""Universes that tests select from."""

import torch
from helpers import random


def grid_universe(size: int, seed: int) -> torch.Tensor:
    """Multiples of 1/32: counted in cells."""
    return (torch.randperm(65, generator=random(seed))[:size] - 32).sort().values / 32


def free_universe(size: int, seed: int) -> torch.Tensor:
    """On no grid: the values are sorted."""
    return torch.randn(size, generator=random(seed)).sort().values * 0.6
