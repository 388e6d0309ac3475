"""Convolutions with a low-bit weight."""

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import conv_prepack
from .base import QuantizedLayer
from .layout import ConvGeometry, geometry, transposed_from_matrix

Layer = TypeVar("Layer", bound="_QConv")


class _QConv(QuantizedLayer):
    """The geometry of the float layer; subclasses name the product."""

    def __init__(self, shape: tuple[int, ...], conv: ConvGeometry, *, bits: int, group_size: int, bias: bool) -> None:
        rows = shape[1] * conv.groups if conv.transposed else shape[0]
        size = torch.Size(shape).numel()
        super().__init__(rows, size // rows, shape, bits, group_size, bias)
        self.shape = list(shape)
        self.kernel_size = list(shape[2:])
        self.in_channels = shape[0] if conv.transposed else shape[1] * conv.groups
        self.out_channels = rows
        self.stride, self.padding, self.dilation = list(conv.stride), list(conv.padding), list(conv.dilation)
        self.output_padding = list(conv.output_padding) or [0] * len(conv.stride)
        self.groups = conv.groups
        self.prepad = list(conv.prepad) or [0, 0]
        self.prepad_mode = conv.prepad_mode if conv.prepad or conv.prepad_mode == "same" else "none"

    @classmethod
    def from_float(
        cls: type[Layer],
        module: nn.Module,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bits: int,
        group_size: int = 0,
    ) -> Layer:
        """``codes`` uint8 ``[N, K]``, in the order that ``torchquant.nn.layout.to_matrix(module)`` gives."""
        layer = cls.empty_like(module, bits, group_size)
        layer.fill(module, codes, scale, zero_point)
        return layer

    @classmethod
    def empty_like(cls: type[Layer], module: nn.Module, bits: int, group_size: int) -> Layer:
        """The layer that ``from_float(module, ...)`` would give, before its numbers are known."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        conv = geometry(module)
        if conv is None:
            raise TypeError(f"{cls.__name__}: expected a convolution, got {type(module).__name__}")
        has_bias = module.bias is not None
        return cls(tuple(weight.shape), conv, bits=bits, group_size=group_size, bias=has_bias)

    def same_sides(self, x: Tensor) -> list[int]:
        """TensorFlow's SAME for this input, in the order of F.pad."""
        sides: list[int] = []
        for axis in range(len(self.stride) - 1, -1, -1):
            size, step = x.shape[axis - len(self.stride)], self.stride[axis]
            reach = (size + step - 1) // step * step - step + (self.kernel_size[axis] - 1) * self.dilation[axis] + 1
            total = max(reach - size, 0)
            sides += [total // 2, total - total // 2]
        return sides

    def pad(self, x: Tensor) -> Tensor:
        if self.prepad_mode == "same":
            return F.pad(x, self.same_sides(x))
        if self.prepad_mode != "none":
            return F.pad(x, self.prepad, mode=self.prepad_mode)
        return x

    def padded(self, x: Tensor) -> Tensor:
        return self.pad(self.quantized_input(x))

    def conv_weight(self) -> Tensor:
        return self.matrix().view(self.shape)

    def dequantized_weight(self) -> Tensor:
        return self.conv_weight()

    def extra_repr(self) -> str:
        own: dict[str, Any] = {"kernel_size": self.kernel_size, "stride": self.stride, "padding": self.padding}
        own |= {"dilation": self.dilation} if any(d != 1 for d in self.dilation) else {}
        own |= {"groups": self.groups} if self.groups > 1 else {}
        own |= {"prepad": self.prepad_mode} if self.prepad_mode != "none" else {}
        arguments = ", ".join(f"{key}={value}" for key, value in own.items())
        return f"{self.in_channels}, {self.out_channels}, {arguments}, {self.scheme_repr()}"


class QConv1d(_QConv):
    """nn.Conv1d with a low-bit weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv_weight().to(x.dtype)
        return F.conv1d(self.padded(x), weight, self.bias_for(x), self.stride, self.padding, self.dilation, self.groups)


class QConv2d(_QConv):
    """nn.Conv2d with a low-bit weight: grouped and depthwise too.

    On a CPU by `torchquant.kernels.quantized_conv2d` on the codes of a uniform input quantizer with one grid; without a
    quantizer on the input's 16-bit integers (each sample's scale its own). Elsewhere, and where a gradient is wanted,
    in floats.
    """

    @torch.jit.ignore
    def prepack(self) -> None:
        if not self.kernel_fits(self.weight_packed.device):
            return
        codes, zero_point = self.codes_and_zero_point()
        self.kernel_weight, self.kernel_grid, _ = conv_prepack(
            codes,
            self.weight_scale,
            zero_point,
            bits=self.bits,
            kernel_size=self.kernel_size,
            groups=self.groups,
            group_size=self.group_size,
        )

    def all_sides(self, x: Tensor) -> list[int]:
        """Top, bottom, left, right: zeros of every origin, which the kernel adds itself."""
        height, width = self.padding
        sides = [0, 0, 0, 0]
        if self.prepad_mode == "same":
            sides = self.same_sides(x)
        elif self.prepad_mode == "constant":
            sides = self.prepad
        return [sides[2] + height, sides[3] + height, sides[0] + width, sides[1] + width]

    def packed(self, x: Tensor, scale: Tensor | None, zero_point: Tensor | None, input_bits: int) -> Tensor:
        codes = self.gives_codes()
        y = torch.ops.torchquant.quantized_conv2d(
            x,
            self.kernel_weight,
            self.kernel_grid,
            self.bias,
            bits=self.bits,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.all_sides(x),
            dilation=self.dilation,
            groups=self.groups,
            group_size=self.group_size,
            input_scale=scale,
            input_zero_point=zero_point,
            input_bits=input_bits,
            activation=self.output_activation if codes else "none",
            output_scale=self.output_scale if codes else None,
            output_zero_point=self.output_zero_point if codes else None,
            output_bits=self.output_bits,
        )
        return y if codes else y.to(self.float_like.dtype if x.dtype == torch.uint8 else x.dtype)

    def reflected(self, x: Tensor) -> Tensor:
        """Padding that repeats pixels, which gives the same codes before the quantizer as after it."""
        return x if self.prepad_mode == "same" or self.prepad_mode == "constant" else self.pad(x)

    def forward(self, x: Tensor) -> Tensor:
        """uint8 ``x``: the codes of ``input_grid``. The output, too, where ``gives_codes``."""
        if x.dim() == 4 and self.kernel_runs(x):
            if x.dtype == torch.uint8:
                scale, zero_point, bits = self.input_grid()
                return self.packed(self.reflected(x), scale, zero_point, bits)
            elif self.input_quantizer is None:
                return self.packed(self.reflected(x), None, None, 16)
            elif self.input_quantizer.is_integer():
                integers, scale, zero_point = self.input_quantizer.for_kernel(self.reflected(x))
                if scale.numel() == 1:
                    y = self.packed(integers, scale, zero_point, self.input_quantizer.bits)
                    return y if self.gives_codes() else y.to(x.dtype)
        weight = self.conv_weight().to(x.dtype)
        return F.conv2d(self.padded(x), weight, self.bias_for(x), self.stride, self.padding, self.dilation, self.groups)


class QConv3d(_QConv):
    """nn.Conv3d with a low-bit weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv_weight().to(x.dtype)
        return F.conv3d(self.padded(x), weight, self.bias_for(x), self.stride, self.padding, self.dilation, self.groups)


class QConvTranspose2d(_QConv):
    """nn.ConvTranspose2d with a low-bit weight; ``output_size`` is not supported."""

    def transposed_weight(self) -> Tensor:
        return transposed_from_matrix(self.matrix(), self.shape, self.groups)

    def dequantized_weight(self) -> Tensor:
        return self.transposed_weight()

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.transposed_weight().to(x.dtype), self.bias_for(x)
        return F.conv_transpose2d(
            self.quantized_input(x),
            weight,
            bias,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )
