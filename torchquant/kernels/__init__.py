from .pack import pack_codes, unpack_codes

__all__ = [
    "pack_codes",
    "unpack_codes",
]
