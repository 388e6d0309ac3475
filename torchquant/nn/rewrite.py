"""Find the attention modules of a model and put in their places ones whose products can be quantized."""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .attention import (
    QFunctionalAttention,
    QMultiheadAttention,
    QSelfAttention,
    QShiftedWindowAttention,
    QWindowAttention,
)
from .attention_product import QAttention
from .swap import swap_modules

TOLERANCE = 1e-4  # relative to the largest output, of a trial on random tokens
REWRITTEN = (QSelfAttention, QWindowAttention, QShiftedWindowAttention, QMultiheadAttention, QFunctionalAttention)


class NotRewritable(Exception):
    """Why an attention module stays as it is."""


@dataclass
class Rewritten:
    """Names are those under which the modules are registered first."""

    modules: dict[str, nn.Module] = field(default_factory=dict)  # those that now stand in the model
    left: dict[str, str] = field(default_factory=dict)  # name -> why it stays in floating point


def rewrite_attention(model: nn.Module, skip: Collection[str] = ()) -> Rewritten:
    """Replace every attention module of ``model`` by one with a :class:`QAttention` inside, which computes the same.

    Known: nn.MultiheadAttention, timm's Attention and Swin's WindowAttention, torchvision's ShiftedWindowAttention,
    self-attention with one ``qkv`` and one ``proj`` layer, Hugging Face's attention, and every module that itself calls
    ``F.scaled_dot_product_attention``. Modules named in ``skip`` stay. Quantizing twice is harmless.
    """
    result = Rewritten()
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, (QAttention, *REWRITTEN)) or not is_attention(module) or name in skip:
            continue
        try:
            if not name:
                raise NotRewritable("the model is itself this attention module: wrap it in nn.Sequential")
            replacements[module] = result.modules[name] = rewritten(module)
        except NotRewritable as reason:
            result.left[name] = str(reason)
    swap_modules(model, replacements)
    return result


def names_used(module: nn.Module) -> set[str]:
    """Names that the code of ``forward`` mentions."""
    forward = type(module).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    code = getattr(forward, "__code__", None)
    return set(code.co_names) if code is not None else set()


def is_attention(module: nn.Module) -> bool:
    """Does its forward compute attention, as far as its code shows?"""
    if isinstance(module, nn.MultiheadAttention):
        return True
    used = names_used(module)
    if used & {"scaled_dot_product_attention", "ALL_ATTENTION_FUNCTIONS", "shifted_window_attention"}:
        return True
    kind = type(module).__name__.lower()
    return bool(used & {"softmax", "Softmax"}) and ("attention" in kind or "attn" in kind)


def rewritten(module: nn.Module) -> nn.Module:
    """The module that takes the place of an attention module. Raises NotRewritable."""
    if isinstance(module, nn.MultiheadAttention):
        made: nn.Module = from_multihead(module)
    elif type(module).__name__ == "ShiftedWindowAttention" and hasattr(module, "relative_position_bias_table"):
        made = QShiftedWindowAttention(module)
    else:
        made = by_shape(module) or functional(module)
    return made.train(module.training)


def from_multihead(module: nn.MultiheadAttention) -> QMultiheadAttention:
    if type(module).forward is not nn.MultiheadAttention.forward:
        raise NotRewritable(f"{type(module).__name__} has a forward() of its own")
    if module.bias_k is not None or module.add_zero_attn:
        raise NotRewritable("add_bias_kv and add_zero_attn are not supported")
    return QMultiheadAttention(module)


def by_shape(module: Any) -> nn.Module | None:
    """A module with ``qkv`` and ``proj`` layers, if a trial shows that it computes what ours does."""
    if not (
        isinstance(getattr(module, "qkv", None), nn.Linear) and isinstance(getattr(module, "proj", None), nn.Linear)
    ):
        return None
    windowed = hasattr(module, "relative_position_bias_table")
    known: Callable[[Any], nn.Module] = QWindowAttention if windowed else QSelfAttention
    try:
        made = known(module)
        tokens = int(module.window_area) if windowed else 5
        shape = (2, tokens, module.qkv.in_features)
        return made if same_function(module, made, made, shape, module.qkv.weight) else None
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None  # it only looked alike


def same_function(
    module: nn.Module, made: nn.Module, function: Callable[[Tensor], Tensor], shape: tuple[int, ...], like: Tensor
) -> bool:
    """Compares ``module``'s outputs for random tokens with ``function``'s of ``made``, in evaluation mode."""
    training = {part: part.training for part in module.modules()}
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
    try:
        module.eval(), made.eval()
        with torch.no_grad():
            wanted, got = module(x), function(x)
    finally:
        for part, flag in training.items():
            part.training = flag
    return got.shape == wanted.shape and bool((got - wanted).abs().max() <= TOLERANCE * wanted.abs().max())


def functional(module: Any) -> QFunctionalAttention:
    used = names_used(module)
    if "ALL_ATTENTION_FUNCTIONS" in used:
        return from_interface(module)
    if "scaled_dot_product_attention" not in used:
        raise NotRewritable(
            f"{type(module).__name__} computes attention in its own way, not by F.scaled_dot_product_attention"
        )
    made: Any = QFunctionalAttention(module)
    if hasattr(module, "fused_attn"):  # timm: False would mean products written out
        made.fused_attn = True
    return made


def from_interface(module: Any) -> QFunctionalAttention:
    """Hugging Face: which attention function is called, is written in the configuration."""
    config = module.config
    found = getattr(config, "_attn_implementation", None)
    if found not in (None, "eager", "sdpa"):
        raise NotRewritable(
            f"attention implementation {found!r} is not supported, load the model with 'sdpa' or 'eager'"
        )
    made: Any = QFunctionalAttention(module)
    if found != "sdpa":
        made.config = copy.copy(config)
        made.config._attn_implementation_internal = "sdpa"
    return made
