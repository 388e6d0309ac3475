"""torchquant: published quantization systems as LibTorch operators."""

from . import (
    _load,  # noqa: F401  (first: checks the torch version, then registers every operator)
    formats,
    nn,
    quantizers,
    solvers,
    statistics,
)
from .config import COMQ, GPTQ, RTN, Auto, MagR, Scheme
from .formats import load, save
from .memory import estimate_memory
from .quantize import collect_statistics, quantize_
from .quantizers import dynamic_quantize, uniform_dequantize, uniform_fit, uniform_quantize
from .report import LayerReport, Report
from .solvers import (
    comq_quantize,
    dequantize,
    flips_quantize,
    flips_quantize_with_bias,
    gptq_quantize,
    magr_preprocess,
    quantization_error,
    ridge_choose,
    ridge_update,
    rtn_quantize,
)
from .statistics import (
    conv_gram_accumulate_,
    cross_gram_accumulate_,
    exact_quantile,
    gram_accumulate_,
    histogram_accumulate_,
    histogram_quantile,
    histogram_range,
    new_histogram,
)

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
    "dynamic_quantize",
    "estimate_memory",
    "exact_quantile",
    "flips_quantize",
    "flips_quantize_with_bias",
    "formats",
    "gptq_quantize",
    "gram_accumulate_",
    "histogram_accumulate_",
    "histogram_quantile",
    "histogram_range",
    "load",
    "magr_preprocess",
    "new_histogram",
    "nn",
    "quantization_error",
    "quantize_",
    "quantizers",
    "ridge_choose",
    "ridge_update",
    "rtn_quantize",
    "save",
    "solvers",
    "statistics",
    "uniform_dequantize",
    "uniform_fit",
    "uniform_quantize",
]
