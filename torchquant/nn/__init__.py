"""Layers that hold low-bit weights and take the place of their float counterparts."""

from .base import QuantizedLayer
from .conv import QConv1d, QConv2d, QConv3d, QConvTranspose2d
from .linear import QLinear
from .swap import from_float, swap_modules

__all__ = [
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose2d",
    "QLinear",
    "QuantizedLayer",
    "from_float",
    "swap_modules",
]
