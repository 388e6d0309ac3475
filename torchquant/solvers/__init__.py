from .comq import comq_quantize
from .dequantize import dequantize, quantization_error
from .flips import flips_quantize, flips_quantize_with_bias
from .gptq import gptq_quantize
from .magr import magr_preprocess
from .ridge import ridge_choose, ridge_update
from .rtn import rtn_quantize

__all__ = [
    "comq_quantize",
    "dequantize",
    "flips_quantize",
    "flips_quantize_with_bias",
    "gptq_quantize",
    "magr_preprocess",
    "quantization_error",
    "ridge_choose",
    "ridge_update",
    "rtn_quantize",
]
