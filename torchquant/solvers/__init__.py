from .rtn import rtn_quantize

__all__ = ["rtn_quantize"]
