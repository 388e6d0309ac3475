"""Layers that hold low-bit weights and take the place of their float counterparts."""

from .attention_product import QAttention
from .base import QuantizedLayer
from .conv import QConv1d, QConv2d, QConv3d, QConvTranspose2d
from .layer_norm import QLayerNorm
from .linear import QLinear
from .rewrite import rewrite_attention
from .swap import from_float, swap_modules

__all__ = [
    "QAttention",
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose2d",
    "QLayerNorm",
    "QLinear",
    "QuantizedLayer",
    "from_float",
    "rewrite_attention",
    "swap_modules",
]
