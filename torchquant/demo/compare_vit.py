"""``torchquant demo --vit``: the recipes for vision transformers on a network that reads characters, at few bits."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..config import Activations
from ..recipes.erq import Wqer, erq
from ..recipes.is_vit import is_vit
from ..recipes.repq_vit import repq_vit
from ..recipes.sos import Training
from ..report import Report

SEEDS = 3
SCHEMES = ("W3A3", "W4A4")
BASELINE = "RepQ-ViT"
BEST = "best: SOS, measured"
# The published rate is for networks a hundred times as large; the published 1000 iterations gain little here.
SOS = Training(rate=1e-3, iterations=200, batch=32)
QUICK = Training(rate=1e-3, iterations=3, batch=32)
COLUMNWISE = Wqer(refine="none", solver="columnwise", shrink=None)
Method = Callable[[nn.Module, Any, str, Training], Report]


def uniform(rule: str) -> Activations:
    return Activations(range=rule, softmax="uniform", reparameterize=False)


METHODS: dict[str, Method] = {
    "min-max": lambda m, x, s, how: repq_vit(m, x, s, activations=uniform("minmax"), progress=False),
    "percentile": lambda m, x, s, how: repq_vit(m, x, s, activations=uniform("percentile"), progress=False),
    BASELINE: lambda m, x, s, how: repq_vit(m, x, s, progress=False),
    "ERQ, Aqer": lambda m, x, s, how: erq(m, x, s, wqer=False, softmax="measured", progress=False),
    "ERQ, Wqer": lambda m, x, s, how: erq(m, x, s, aqer=False, softmax="measured", progress=False),
    "ERQ": lambda m, x, s, how: erq(m, x, s, softmax="measured", progress=False),
    "ERQ, as published": lambda m, x, s, how: erq(m, x, s, progress=False),
    "I&S-ViT, SULQ": lambda m, x, s, how: is_vit(m, x, s, sos=False, progress=False),
    "I&S-ViT, SOS": lambda m, x, s, how: is_vit(m, x, s, softmax="log_sqrt2", sos=how, progress=False),
    "I&S-ViT": lambda m, x, s, how: is_vit(m, x, s, sos=how, progress=False),
    BEST: lambda m, x, s, how: is_vit(m, x, s, softmax="measured", sos=how, progress=False),
}


def spread_channels(model: nn.Module, seed: int) -> nn.Module:
    """A copy that computes the same with LayerNorm channels as uneven as those of large transformers.

    Gamma and beta are multiplied by a log-normal factor (.5, three channels by 10 more), the next layer's columns
    divided by it.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.blocks:  # type: ignore[union-attr]
            for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.fc1)):
                factor = torch.exp(0.5 * torch.randn(len(norm.weight), generator=generator))
                factor[torch.randperm(len(factor), generator=generator)[:3]] *= 10
                norm.weight *= factor
                norm.bias *= factor
                layer.weight /= factor
    return model
