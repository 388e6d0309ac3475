"""torchquant: published quantization systems as LibTorch operators."""

from . import _load  # noqa: F401  (checks the torch version, then registers every operator)
from . import solvers
from .solvers import comq_quantize, dequantize, gptq_quantize, quantization_error, rtn_quantize

__all__ = ["comq_quantize", "dequantize", "gptq_quantize", "quantization_error", "rtn_quantize", "solvers"]
