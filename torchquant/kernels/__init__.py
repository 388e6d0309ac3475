from .attention import quantized_attention
from .block import quantized_block
from .conv import conv_prepack, quantized_conv2d
from .integer_scales import integer_group_scales
from .layer_norm import quantized_layer_norm
from .linear import linear_prepack, quantized_linear
from .mlp import quantized_mlp
from .pack import pack_codes, unpack_codes
from .self_attention import quantized_self_attention

__all__ = [
    "conv_prepack",
    "integer_group_scales",
    "linear_prepack",
    "pack_codes",
    "quantized_attention",
    "quantized_block",
    "quantized_conv2d",
    "quantized_layer_norm",
    "quantized_linear",
    "quantized_mlp",
    "quantized_self_attention",
    "unpack_codes",
]
