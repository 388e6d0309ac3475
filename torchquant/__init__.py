"""torchquant: published quantization systems as LibTorch operators."""

from . import (
    _load,  # noqa: F401  (checks the torch version, then registers every operator)
    solvers,
    statistics,
)
from .solvers import comq_quantize, dequantize, gptq_quantize, quantization_error, rtn_quantize
from .statistics import conv_gram_accumulate_, cross_gram_accumulate_, gram_accumulate_

__all__ = [
    "comq_quantize",
    "conv_gram_accumulate_",
    "cross_gram_accumulate_",
    "dequantize",
    "gptq_quantize",
    "gram_accumulate_",
    "quantization_error",
    "rtn_quantize",
    "solvers",
    "statistics",
]
