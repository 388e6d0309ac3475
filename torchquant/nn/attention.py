"""Attention whose two matrix products have a place for a quantizer at every operand.

Each class takes the place of a float attention module and computes the same function, under the same parameter names:
see :mod:`torchquant.nn.rewrite`. All of them hold their products in ``product``, a :class:`QAttention`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .attention_product import QAttention
from .base import hooked
from .repeat import RepeatedCall


class QSelfAttention(RepeatedCall):
    """Self-attention with one projection for q, k and v, and what timm's ``Attention`` may have besides."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.num_heads = int(getattr(module, "num_heads", 0) or module.heads)
        self.scale: float | None = getattr(module, "scale", None)
        self.dropout = float(getattr(getattr(module, "attn_drop", None), "p", 0.0))
        self.qkv, self.proj = module.qkv, module.proj
        self.q_norm, self.k_norm, self.norm, self.proj_drop = (
            getattr(module, name, None) or nn.Identity() for name in ("q_norm", "k_norm", "norm", "proj_drop")
        )
        self.gate = getattr(module, "gate", None)
        between = [module for module in (self.q_norm, self.k_norm, self.norm) if type(module) is not nn.Identity]
        self.between = len(between) > 0 or self.gate is not None
        self.product = QAttention()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        batch, tokens, _ = x.shape
        if self.takes_codes(x, attn_mask):
            return self.fused(x, attn_mask, is_causal)
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        q, k = self.q_norm(qkv[0]), self.k_norm(qkv[1])
        mixed = self.product(q, k, qkv[2], attn_mask, self.scale, is_causal, dropout, False)[0]
        mixed = self.norm(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        if self.gate is not None:
            mixed = mixed * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(mixed))

    def takes_codes(self, x: Tensor, mask: Tensor | None) -> bool:
        """Whether codes can travel from one part to the next: every part has its grids, and nobody observes or changes
        what lies between them."""
        qkv, product, proj = self.qkv, self.product, self.proj
        if self.training or self.between:
            return False
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves out what stands under this condition alone)
            if hooked(qkv) or hooked(product) or hooked(proj):
                return False
        if hasattr(qkv, "kernel_weight") and hasattr(proj, "kernel_weight"):  # noqa: SIM102
            if qkv.runs_packed(x) and qkv.is_direct() and proj.kernel_weight.numel() > 0 and proj.is_direct():
                return product.on_like_grids() and product.fits(x, x, x, mask)
        return False

    def fused(self, x: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """``forward`` by codes."""
        layer, product, proj = self.qkv, self.product, self.proj
        if hasattr(layer, "kernel_weight") and hasattr(proj, "kernel_weight"):
            qkv, out = layer.arguments(), proj.arguments()
            scales, zero_points, bits, symmetric = product.grids()
            softmax, softmax_bits = product.softmax_levels()
            y = torch.ops.torchquant.quantized_self_attention(
                x, qkv[0], qkv[1], out[0], out[1], scales, zero_points, bits, softmax, softmax_bits,
                num_heads=self.num_heads, mask=None if is_causal else mask, scale=self.scale, is_causal=is_causal,
                symmetric=symmetric,
            )  # fmt: skip
            x = y.to(proj.float_like.dtype)
        return x


class QWindowAttention(nn.Module):
    """Attention inside windows with a relative position bias: timm's ``WindowAttention`` (Swin)."""

    relative_position_index: Tensor

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.num_heads: int = module.num_heads
        self.scale = float(module.scale)
        self.dropout = float(module.attn_drop.p)
        self.qkv, self.proj, self.proj_drop = module.qkv, module.proj, module.proj_drop
        self.relative_position_bias_table = module.relative_position_bias_table
        self.register_buffer("relative_position_index", module.relative_position_index, persistent=False)
        self.product = QAttention()

    def position_bias(self) -> Tensor:
        """``[1, heads, tokens, tokens]``."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).unsqueeze(0)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x`` ``[windows, tokens, C]``; ``mask`` ``[windows of one picture, tokens, tokens]``, added."""
        windows, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(windows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.position_bias()
        if mask is not None:
            pictures = windows // mask.shape[0]
            bias = bias + mask.unsqueeze(1).repeat(pictures, 1, 1, 1)
        dropout = self.dropout if self.training else 0.0
        mixed = self.product(qkv[0], qkv[1], qkv[2], bias, self.scale, False, dropout, False)[0]
        return self.proj_drop(self.proj(mixed.transpose(1, 2).reshape(windows, tokens, -1)))


class QShiftedWindowAttention(nn.Module):
    """Attention inside the shifted windows of pictures ``[B, H, W, C]``: torchvision's ``ShiftedWindowAttention``."""

    relative_position_index: Tensor

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.num_heads: int = module.num_heads
        self.window_size: list[int] = list(module.window_size)
        self.shift_size: list[int] = list(module.shift_size)
        self.dropout = float(module.attention_dropout)
        self.qkv, self.proj = module.qkv, module.proj
        self.proj_drop = nn.Dropout(float(module.dropout))
        self.relative_position_bias_table = module.relative_position_bias_table
        self.register_buffer("relative_position_index", module.relative_position_index)
        self.product = QAttention()

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        wide, high = self.window_size[1], self.window_size[0]
        x = F.pad(x, [0, 0, 0, (wide - width % wide) % wide, 0, (high - height % high) % high])
        # A picture no larger than a window is not shifted.
        down = 0 if high >= x.shape[1] else self.shift_size[0]
        right = 0 if wide >= x.shape[2] else self.shift_size[1]
        x = torch.roll(x, shifts=[-down, -right], dims=[1, 2])
        grid = [x.shape[1] // high, x.shape[2] // wide]
        x = self.reverse(self.attend(self.windows(x), self.bias(x, down, right)), grid)
        x = torch.roll(x, shifts=[down, right], dims=[1, 2])
        return x[:, :height, :width, :].contiguous()

    def windows(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` -> ``[B windows, tokens, C]``."""
        batch, height, width, channels = x.shape
        high, wide = self.window_size[0], self.window_size[1]
        x = x.view(batch, height // high, high, width // wide, wide, channels)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, high * wide, channels)

    def reverse(self, x: Tensor, grid: list[int]) -> Tensor:
        high, wide = self.window_size[0], self.window_size[1]
        x = x.view(-1, grid[0], grid[1], high, wide, x.shape[-1]).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, grid[0] * high, grid[1] * wide, x.shape[-1])

    def bias(self, x: Tensor, down: int, right: int) -> Tensor:
        """``[1, heads, tokens, tokens]``; with a shift ``[B windows, ...]`` and what were no neighbours kept apart."""
        tokens = self.window_size[0] * self.window_size[1]
        table = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = table.view(tokens, tokens, -1).permute(2, 0, 1).unsqueeze(0)
        if down + right == 0:
            return bias
        rows, columns = (
            self.parts(x.shape[1], self.window_size[0], down),
            self.parts(x.shape[2], self.window_size[1], right),
        )
        regions = (3 * rows[:, None] + columns[None, :]).to(x.device)
        own = self.windows(regions[None, :, :, None])[:, :, 0]  # [windows, tokens]
        apart = (own[:, :, None] != own[:, None, :]).to(x.dtype) * -100.0
        return bias + apart.unsqueeze(1).repeat(x.shape[0], 1, 1, 1)

    def parts(self, size: int, window: int, shift: int) -> Tensor:
        """Per row (column): 0 in the first windows, 1 in the last one, 2 where it was rolled in from the other side."""
        position = torch.arange(size)
        last = (position >= size - window).to(torch.int64)
        return last + (position >= size - shift).to(torch.int64) if shift > 0 else last * 2

    def attend(self, x: Tensor, bias: Tensor) -> Tensor:
        windows, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(windows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = self.product(qkv[0], qkv[1], qkv[2], bias, None, False, dropout, False)[0]
        return self.proj_drop(self.proj(mixed.transpose(1, 2).reshape(windows, tokens, -1)))


class Unfused:
    """In place of a tensor: ``has_torch_function`` is true of it, for fused paths a reason to keep off."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


class QMultiheadAttention(nn.Module):
    """``nn.MultiheadAttention`` with a layer for each projection; same arguments, same results."""

    # nn.TransformerEncoder and its layers look at these before they take fused paths, which would go past our layers.
    in_proj_weight, in_proj_bias, _qkv_same_embed_dim = Unfused(), None, False

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.batch_first = module.embed_dim, module.num_heads, module.batch_first
        self.dropout = module.dropout
        weights = (
            (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
            if module.in_proj_weight is None
            else module.in_proj_weight.chunk(3)
        )
        biases = (None, None, None) if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(linear_of, weights, biases)
        self.out_proj = module.out_proj
        self.product = QAttention()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise ValueError("QMultiheadAttention: is_causal needs an attn_mask, as in nn.MultiheadAttention")
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        batched = query.dim() == 3
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        mask = self.joint_mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        q, k, v = self.split(q), self.split(k), self.split(v)
        mixed, weights = self.product(q, k, v, mask, None, False, dropout, need_weights)
        y = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            y = y.squeeze(0)
        elif not self.batch_first:
            y = y.transpose(0, 1)
        if weights is None or not need_weights:
            return y, None
        weights = weights.mean(1) if average_attn_weights else weights
        return y, weights if batched else weights.squeeze(0)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, [self.num_heads, -1]).transpose(1, 2)

    def joint_mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """One mask to add, ``[B, heads or 1, L, S]``. Here True in a boolean mask means: leave out."""
        joint: Tensor | None = None
        if attn_mask is not None:
            joint = additive(attn_mask, q)
            joint = joint.view(-1, self.num_heads, joint.shape[-2], joint.shape[-1]) if joint.dim() == 3 else joint
        if padding is not None:
            rows = additive(padding, q).view(-1, 1, 1, padding.shape[-1])
            joint = rows if joint is None else joint + rows
        return joint


def additive(mask: Tensor, like: Tensor) -> Tensor:
    zeros = torch.zeros(mask.shape, dtype=like.dtype, device=mask.device)
    return zeros.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else zeros + mask


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of its own that holds these values."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


class QFunctionalAttention(nn.Module):
    """Any module whose forward calls ``F.scaled_dot_product_attention``, with that one call going through ``product``.

    Runs the float class's own forward on the same submodules. Exports and compiles; TorchScript cannot follow.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        own = {key: dict(value) for key, value in module.__dict__.items() if key in OWNED}
        self.__dict__.update({**module.__dict__, **own})
        self.float_class = type(module)
        self.product = QAttention()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with Redirected(self.product):
            return self.float_class.forward(self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Methods and properties of the float class, for its forward."""
        float_class = self.__dict__.get("float_class")
        if float_class is not None and hasattr(float_class, name):
            found: Any = getattr(float_class, name)
            return found.__get__(self) if isinstance(found, property) or callable(found) else found
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return self.float_class.__name__


OWNED = ("_modules", "_parameters", "_buffers")


class Redirected(TorchFunctionMode):
    """Inside, ``F.scaled_dot_product_attention`` is computed by ``product``."""

    def __init__(self, product: nn.Module) -> None:
        super().__init__()
        self.product = product

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            each = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(each, -3), value.repeat_interleave(each, -3)
        return self.product(query, key, value, attn_mask, scale, is_causal, dropout_p, False)[0]
