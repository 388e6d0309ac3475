"""torchquant: published quantization systems as LibTorch operators."""

from . import (
    _load,  # noqa: F401  (first: checks the torch version, then registers every operator)
    formats,
    nn,
    solvers,
    statistics,
)
from .config import COMQ, GPTQ, RTN, Auto, MagR, Scheme
from .formats import load, save
from .memory import estimate_memory
from .quantize import collect_statistics, quantize_
from .report import LayerReport, Report
from .solvers import comq_quantize, dequantize, gptq_quantize, magr_preprocess, quantization_error, rtn_quantize
from .statistics import conv_gram_accumulate_, cross_gram_accumulate_, gram_accumulate_

__all__ = [
    "COMQ",
    "GPTQ",
    "RTN",
    "Auto",
    "LayerReport",
    "MagR",
    "Report",
    "Scheme",
    "collect_statistics",
    "comq_quantize",
    "conv_gram_accumulate_",
    "cross_gram_accumulate_",
    "dequantize",
    "estimate_memory",
    "formats",
    "gptq_quantize",
    "gram_accumulate_",
    "load",
    "magr_preprocess",
    "nn",
    "quantization_error",
    "quantize_",
    "rtn_quantize",
    "save",
    "solvers",
    "statistics",
]
