"""What a demonstration needs of a network: the float model, its calibration inputs and a judge."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Case:
    name: str
    about: str
    model: nn.Module  # float, in eval mode; never changed
    calibration: list[Any]
    judge: Callable[[nn.Module], dict[str, float]]  # figures of a model; the first one is the headline
    max_tokens: int | None = None  # of calibration, a layer


def batches(inputs: Tensor, size: int) -> list[Tensor]:
    return list(inputs.split(size))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generator inside (modules draw their initial weights from it) and puts it back after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
