from .uniform import dynamic_quantize, uniform_dequantize, uniform_fit, uniform_quantize

__all__ = ["dynamic_quantize", "uniform_dequantize", "uniform_fit", "uniform_quantize"]
