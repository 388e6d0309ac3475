"""LayerNorm that gives codes to the layers behind it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _C
from .base import gradient_wanted, kept_float32
from .repeat import RepeatedCall


class QLayerNorm(RepeatedCall, nn.LayerNorm):
    """``module`` whose output is uint8: the codes of a uniform grid, by `torchquant.kernels.quantized_layer_norm`.

    Where :meth:`gives_codes` does not hold, and so in training and where a gradient is wanted, what ``module`` gives.
    A :class:`QLinear` whose input quantizer has this grid takes either. Parameters are those of ``module``, under their
    names; the grid is in no state_dict, as it belongs to the layers behind, and stays float32 under ``.to(dtype)``.

    Args:
        module: its parameters are shared, not copied.
        output_scale, output_zero_point: of one number each.
        output_bits: 2..8.
    """

    output_scale: Tensor
    output_zero_point: Tensor

    def __init__(
        self, module: nn.LayerNorm, output_scale: Tensor, output_zero_point: Tensor, output_bits: int = 8
    ) -> None:
        super().__init__(module.normalized_shape, module.eps, elementwise_affine=False)
        for name, number in (("output_scale", output_scale), ("output_zero_point", output_zero_point)):
            if number.numel() != 1:
                raise ValueError(f"QLayerNorm: {name} must be one number, got {list(number.shape)}")
        if not 2 <= output_bits <= 8:
            raise ValueError(f"QLayerNorm: output_bits must be 2..8, got {output_bits}")
        self.elementwise_affine = module.elementwise_affine
        self.weight, self.bias = module.weight, module.bias
        self.register_buffer("output_scale", output_scale.detach().float().clone(), persistent=False)
        self.register_buffer("output_zero_point", output_zero_point.detach().float().clone(), persistent=False)
        self.output_bits = output_bits
        self.columns = module.normalized_shape[-1] if len(module.normalized_shape) == 1 else -1
        self.on_cuda = bool(_C.with_cuda)
        self.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.gives_codes(x):
            return torch.ops.torchquant.quantized_layer_norm(
                x,
                self.weight,
                self.bias,
                output_scale=self.output_scale,
                output_zero_point=self.output_zero_point,
                output_bits=self.output_bits,
                eps=self.eps,
            )
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    @torch.jit.export
    def gives_codes(self, x: Tensor) -> bool:
        """Whether ``forward(x)`` is codes: not in training, nobody wants a gradient, the operator knows device and
        dtype, and the last dimension alone is normalized."""
        if self.training or x.dim() == 0 or x.shape[-1] != self.columns or gradient_wanted(x):
            return False
        if trained(self.weight) or trained(self.bias):
            return False
        if not (x.is_cpu or (x.is_cuda and self.on_cuda)):
            return False
        return x.dtype == torch.float32 or x.dtype == torch.float16 or x.dtype == torch.bfloat16

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        with kept_float32(self, ("output_scale", "output_zero_point")):
            super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, output_bits={self.output_bits}"


def trained(parameter: Tensor | None) -> bool:
    return parameter is not None and gradient_wanted(parameter)
