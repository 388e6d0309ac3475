from .attention import quantized_attention
from .linear import linear_prepack, quantized_linear
from .pack import pack_codes, unpack_codes

__all__ = [
    "linear_prepack",
    "pack_codes",
    "quantized_attention",
    "quantized_linear",
    "unpack_codes",
]
