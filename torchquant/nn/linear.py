"""Linear with a low-bit weight; also stands in for Hugging Face's ``Conv1D``."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _C
from ..kernels import linear_prepack
from .base import QuantizedLayer
from .layout import is_hf_conv1d


class QLinear(QuantizedLayer):
    """``y = x W^T + b`` with ``W = (codes - zero_point) * scale``, in the input's dtype.

    On a CPU and on CUDA by `torchquant.kernels.quantized_linear` on the codes of a uniform input quantizer; without a
    quantizer on the input's 16-bit integers (each row's scale its own), on CUDA on floats where rows are many. Where a
    gradient is wanted, and elsewhere, in floats.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bits: int, group_size: int = 0, bias: bool = True
    ) -> None:
        super().__init__(out_features, in_features, (out_features, in_features), bits, group_size, bias)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_float(
        cls, module: nn.Module, codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int = 0
    ) -> "QLinear":
        """``module``: nn.Linear or Conv1D; ``codes`` uint8 ``[out_features, in_features]``."""
        rows, columns = codes.shape
        layer = cls(columns, rows, bits=bits, group_size=group_size, bias=module.bias is not None)
        layer.fill(module, codes, scale, zero_point)
        return layer

    @classmethod
    def empty_like(cls, module: nn.Module, bits: int, group_size: int) -> "QLinear":
        """The layer that ``from_float(module, ...)`` would give, before its numbers are known."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        rows, columns = reversed(weight.shape) if is_hf_conv1d(module) else weight.shape
        return cls(columns, rows, bits=bits, group_size=group_size, bias=module.bias is not None)

    @torch.jit.ignore
    def kernel_fits(self, device: torch.device) -> bool:
        return device.type == "cpu" or (device.type == "cuda" and _C.with_cuda)

    @torch.jit.ignore
    def prepack(self) -> None:
        if self.kernel_fits(self.weight_packed.device):
            codes, zero_point = self.codes_and_zero_point()
            self.kernel_weight, self.kernel_grid, _ = linear_prepack(
                codes, self.weight_scale, zero_point, bits=self.bits, group_size=self.group_size
            )

    def product(self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None, input_bits: int) -> Tensor:
        return torch.ops.torchquant.quantized_linear(
            x,
            self.kernel_weight,
            self.kernel_grid,
            self.bias,
            bits=self.bits,
            in_features=self.in_features,
            out_features=self.out_features,
            group_size=self.group_size,
            input_scale=scale,
            input_zero_point=zero_point,
            input_bits=input_bits,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_runs(x):
            if self.input_quantizer is None:
                return self.product(x, None, None, 16)
            elif self.input_quantizer.is_integer():
                integers, scale, zero_point = self.input_quantizer.for_kernel(x)
                return self.product(integers, scale, zero_point, self.input_quantizer.bits).to(x.dtype)
        x = self.quantized_input(x)
        return F.linear(x, self.matrix().to(x.dtype), self.bias_for(x))

    def dequantized_weight(self) -> Tensor:
        return self.matrix()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme_repr()}"
