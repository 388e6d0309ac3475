from .comq import comq_quantize
from .dequantize import dequantize, quantization_error
from .gptq import gptq_quantize
from .magr import magr_preprocess
from .rtn import rtn_quantize

__all__ = ["comq_quantize", "dequantize", "gptq_quantize", "magr_preprocess", "quantization_error", "rtn_quantize"]
