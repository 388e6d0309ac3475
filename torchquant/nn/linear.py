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

    def runs_packed(self, x: Tensor) -> bool:
        """Whether ``forward`` takes the packed kernel for ``x``."""
        quantizer = self.input_quantizer  # looked up once: submodules and buffers are found slowly
        if not self.kernel_runs(x):
            return False
        elif quantizer is None or x.dtype == torch.uint8:
            return True
        return quantizer.is_integer()

    @torch.jit.export
    def is_direct(self) -> bool:
        """Whether the kernel itself makes the input's integers: without a quantizer, on one grid, or on a CPU on the
        tokens' own grids."""
        return self.input_quantizer is None or self.row_grids() > 0 or self.input_grid()[0] is not None

    def row_grids(self) -> int:
        """What the kernel makes of each token on a CPU: 1 a symmetric grid, 2 an asymmetric one, 0 none."""
        quantizer = self.input_quantizer
        if quantizer is not None:  # noqa: SIM102  (TorchScript compiles what hasattr holds for)
            if hasattr(quantizer, "granularity"):  # noqa: SIM102
                if quantizer.granularity == "token" and self.kernel_weight.is_cpu:
                    return 1 if quantizer.symmetric else 2
        return 0

    def input_integers(self) -> tuple[Tensor | None, Tensor | None, int, int]:
        """Scale, zero point and bits of the input where ``is_direct()``, and ``row_grids``."""
        quantizer, rows = self.input_quantizer, self.row_grids()
        scale, zero_point, bits = self.input_grid()
        if scale is None:
            bits = 16
            if quantizer is not None and rows > 0:
                bits = quantizer.bits
        return scale, zero_point, bits, rows

    @torch.jit.export
    def arguments(self) -> tuple[list[Tensor], list[int]]:
        """This layer as operators of several layers take it, e.g. `torchquant.kernels.quantized_mlp`."""
        none, bias = self.float_like, self.bias
        scale, zero_point, bits, rows = self.input_integers()
        tensors = [self.kernel_weight, self.kernel_grid, none if bias is None else bias, none, none, none]
        if scale is not None and zero_point is not None:
            tensors[4], tensors[5] = scale, zero_point
        return tensors, [self.bits, self.in_features, self.out_features, self.group_size, bits, rows]

    def packed(
        self,
        x: Tensor,
        activation: str = "none",
        output_scale: Tensor | None = None,
        output_zero_point: Tensor | None = None,
        output_bits: int = 8,
    ) -> Tensor:
        """`torchquant.kernels.quantized_linear` of what ``runs_packed``, or of the codes of ``input_grid``."""
        dtype = self.float_like.dtype if x.dtype == torch.uint8 else x.dtype
        scale, zero_point, bits, rows = self.input_integers()
        quantizer = self.input_quantizer
        if quantizer is not None and scale is None and rows == 0:
            x, scale, zero_point = quantizer.for_kernel(x)
            bits = quantizer.bits
        symmetric: bool | None = None
        if rows > 0:
            symmetric = rows == 1
        y = torch.ops.torchquant.quantized_linear(
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
            input_bits=bits,
            activation=activation,
            output_scale=output_scale,
            output_zero_point=output_zero_point,
            output_bits=output_bits,
            input_symmetric=symmetric,
        )
        return y if output_scale is not None else y.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """uint8 ``x``: the codes of ``input_grid``. The output, too, where ``gives_codes``."""
        if x.dtype == torch.uint8 or self.runs_packed(x):
            if self.gives_codes():
                return self.packed(
                    x, self.output_activation, self.output_scale, self.output_zero_point, self.output_bits
                )
            return self.packed(x)
        x = self.quantized_input(x)
        return F.linear(x, self.matrix().to(x.dtype), self.bias_for(x))

    def dequantized_weight(self) -> Tensor:
        return self.matrix()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme_repr()}"
