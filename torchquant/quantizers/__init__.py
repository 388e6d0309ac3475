from .sulq import (
    LogQuantizer,
    choose_log_quantizer,
    sulq_dequantize,
    sulq_error,
    sulq_fit,
    sulq_matmul,
    sulq_quantize,
    sulq_shift_matmul,
)
from .uniform import dynamic_quantize, uniform_dequantize, uniform_fit, uniform_quantize

__all__ = [
    "LogQuantizer",
    "choose_log_quantizer",
    "dynamic_quantize",
    "sulq_dequantize",
    "sulq_error",
    "sulq_fit",
    "sulq_matmul",
    "sulq_quantize",
    "sulq_shift_matmul",
    "uniform_dequantize",
    "uniform_fit",
    "uniform_quantize",
]
