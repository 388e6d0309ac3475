from .attention import quantized_attention
from .pack import pack_codes, unpack_codes

__all__ = [
    "pack_codes",
    "quantized_attention",
    "unpack_codes",
]
