"""Twins of the quantized layers and of the activation quantizers that compute in ONNX's words: see onnx.py.

Buffers only. Codes are bytes here; the exporter makes uint4 of those of ``narrow`` layers.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import QConv1d, QConv2d, QConv3d, QConvTranspose2d, QLinear, QuantizedLayer
from ..nn.layout import transposed_from_matrix
from ..nn.quantizers import DynamicQuantizer, SubsetQuantizer, TableQuantizer, UniformQuantizer, plain
from ..quantizers import sulq_dequantize

OPSET = 21  # the first with uint4 and blocked DequantizeLinear
SMALLEST = 1.17549435e-38  # as csrc/core/quant_math.h: fit_grid
ZERO_POINT_LIMIT = 2.0**20


def twin_of(module: nn.Module) -> nn.Module:
    for kind, twin in TWINS.items():
        if isinstance(module, kind):
            return twin(module).eval()
    raise TypeError(f"export: format 'onnx' has no form of {type(module).__name__}")


# --- layers ---


def dequantize_linear(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int, block: int = 0) -> Tensor:
    attributes: dict[str, Any] = {"axis": axis} if scale.dim() else {}
    if block:
        attributes["block_size"] = block
    inputs = (codes, scale, zero_point)
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", inputs, attributes, dtype=torch.float32, shape=codes.shape, version=OPSET
    )


def fits(zero_point: Tensor, largest: int) -> bool:
    """Can an unsigned integer hold it?"""
    return bool(((zero_point == zero_point.round()) & (zero_point >= 0) & (zero_point <= largest)).all())


class OnnxLayer(nn.Module):
    """Codes and grid of a QuantizedLayer as ``[N, K]``; for matrix products as ``[K, N]``, as MatMul takes them."""

    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.narrow, self.float_dtype = layer.bits <= 4, layer.float_like.dtype
        self.group_size = layer.group_size if layer.weight_scale.shape[1] > 1 else 0
        self.columns_axis = 0 if isinstance(layer, QLinear) else 1
        scale, zero_point = layer.weight_scale, layer.weight_zero_point
        codes = layer.matrix_of(layer.weight_packed, torch.ones_like(scale), torch.zeros_like(zero_point)).byte()
        if layer.bits not in (4, 8) and not fits(zero_point, 255) and fits(2 * zero_point, 15 if self.narrow else 255):
            codes, scale, zero_point = 2 * codes, scale / 2, 2 * zero_point  # the spare bit holds the half
        self.in_integers = fits(zero_point, 15 if self.narrow else 255)
        if self.columns_axis == 0:
            codes, scale, zero_point = codes.t(), scale.t(), zero_point.t()
        if self.in_integers:
            zero_point = zero_point.to(torch.uint8)
            if self.group_size == 0:
                scale, zero_point = scale.flatten(), zero_point.flatten()
        for key, value in (("codes", codes), ("scale", scale), ("zero_point", zero_point)):
            self.register_buffer(f"weight_{key}", value.contiguous())
        self.register_buffer("bias", layer.bias)
        self.input_quantizer = None if layer.input_quantizer is None else twin_of(layer.input_quantizer)

    def matrix(self) -> Tensor:
        axis, codes = self.columns_axis, self.weight_codes
        scale, zero_point = self.weight_scale, self.weight_zero_point
        if self.in_integers:
            axis = axis if self.group_size else 1 - axis
            return dequantize_linear(codes, scale, zero_point, axis, self.group_size)
        return (codes.float() - self.spread(zero_point)) * self.spread(scale)

    def spread(self, grid: Tensor) -> Tensor:
        """One value for every column instead of every group."""
        axis, columns = self.columns_axis, self.weight_codes.shape[self.columns_axis]
        if self.group_size == 0:
            return grid
        sizes = [-1] * 3
        sizes[axis + 1] = self.group_size
        wide = grid.unsqueeze(axis + 1).expand(sizes).flatten(axis, axis + 1)
        return wide.narrow(axis, 0, columns)

    def quantized_input(self, x: Tensor) -> Tensor:
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def bias_for(self, x: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(x.dtype)

    def float_weight(self) -> Tensor:
        """In the float layer's shape, float32."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """For callers that read it instead of calling the layer."""
        return self.float_weight().to(self.float_dtype)


class OnnxLinear(OnnxLayer):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(self.quantized_input(x), self.matrix().to(x.dtype))
        bias = self.bias_for(x)
        return y if bias is None else y + bias

    def float_weight(self) -> Tensor:
        return self.matrix().t()


class OnnxConv(OnnxLayer):
    def __init__(self, layer: QConv1d | QConv2d | QConv3d) -> None:
        super().__init__(layer)
        self.layer_pad, self.shape = layer.pad, layer.shape
        self.product = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
        self.geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        if self.in_integers and self.group_size == 0:
            self.weight_codes = self.weight_codes.view(self.shape)  # Conv takes DequantizeLinear's output as it is

    def float_weight(self) -> Tensor:
        return self.matrix().view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_pad(self.quantized_input(x))
        return self.product(x, self.float_weight().to(x.dtype), self.bias_for(x), *self.geometry)


class OnnxConvTranspose2d(OnnxLayer):
    def __init__(self, layer: QConvTranspose2d) -> None:
        super().__init__(layer)
        self.shape, self.groups = layer.shape, layer.groups
        self.geometry = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)

    def float_weight(self) -> Tensor:
        return transposed_from_matrix(self.matrix(), self.shape, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(
            self.quantized_input(x), self.float_weight().to(x.dtype), self.bias_for(x), *self.geometry
        )


# --- activations ---


class OnnxUniform(nn.Module):
    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, quantizer: UniformQuantizer) -> None:
        super().__init__()
        self.largest, self.axis = 2.0**quantizer.bits - 1, quantizer.axis
        scale, zero_point = quantizer.scale, quantizer.zero_point
        if scale.numel() == 1:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        self.in_integers = fits(zero_point, 255)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point.to(torch.uint8) if self.in_integers else zero_point)
        self.register_buffer("low", -zero_point * scale)
        self.register_buffer("high", (self.largest - zero_point) * scale)

    def along(self, grid: Tensor, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return grid.view(shape) if grid.dim() else grid

    def forward(self, x: Tensor) -> Tensor:
        values = plain(x).float()
        if not self.in_integers:
            scale, zero_point = self.along(self.scale, x), self.along(self.zero_point, x)
            codes = (values / scale + zero_point).clamp(0.0, self.largest).round()
            return ((codes - zero_point) * scale).to(x.dtype)
        if self.largest < 255:  # where QuantizeLinear itself does not clip
            values = values.clamp(self.along(self.low, x), self.along(self.high, x))
        axis = self.axis % x.dim() if x.dim() else 0
        attributes: dict[str, Any] = {"axis": axis} if self.scale.dim() else {}
        inputs = (values, self.scale, self.zero_point)
        codes = torch.onnx.ops.symbolic(
            "QuantizeLinear", inputs, attributes, dtype=torch.uint8, shape=x.shape, version=OPSET
        )
        return dequantize_linear(codes, self.scale, self.zero_point, axis).to(x.dtype)


class OnnxDynamic(nn.Module):
    def __init__(self, quantizer: DynamicQuantizer) -> None:
        super().__init__()
        self.largest, self.symmetric = 2.0**quantizer.bits - 1, quantizer.symmetric
        self.granularity, self.axis = quantizer.granularity, quantizer.axis

    def forward(self, x: Tensor) -> Tensor:
        values = plain(x).float()
        dims = list(range(x.dim()))
        if self.granularity != "tensor":
            channel = self.axis % x.dim()
            dims = [x.dim() - 1] if self.granularity == "token" else [d for d in dims if d != channel]
        low, high = (values.amin(dims, True), values.amax(dims, True)) if dims else (values, values)
        scale, zero_point = self.grid(low, high)
        codes = (values / scale + zero_point).clamp(0.0, self.largest).round()
        return ((codes - zero_point) * scale).to(x.dtype)

    def grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """csrc/core/quant_math.h: fit_grid, branch by branch."""
        size = torch.maximum(low.abs(), high.abs())
        half = torch.full_like(size, (self.largest + 1) / 2)
        constant = low == high
        if self.symmetric:
            scale, zero_point = torch.where(constant, size, size / (self.largest / 2)), half
        else:
            scale = high / self.largest - low / self.largest
            far = ~(low.abs() < ZERO_POINT_LIMIT * scale)
            low, high = torch.where(far, low.clamp(max=0.0), low), torch.where(far, high.clamp(min=0.0), high)
            scale = torch.where(constant, size, high / self.largest - low / self.largest)
            zero_point = torch.where(constant, (high <= 0).float(), (-low / scale).round())
        tiny = size < SMALLEST * self.largest
        nothing = half if self.symmetric else torch.zeros_like(half)
        return torch.where(tiny, torch.ones_like(scale), scale), torch.where(tiny, nothing, zero_point)


def gather(table: Tensor, index: Tensor) -> Tensor:
    inputs = (table, index)
    return torch.onnx.ops.symbolic("Gather", inputs, {"axis": 0}, dtype=table.dtype, shape=index.shape, version=OPSET)


class Staircase(nn.Module):
    """``values[c, number of thresholds[c] below x]``: thresholds ``[C, 2^steps - 1]`` filled up with infinity."""

    thresholds: Tensor
    values: Tensor

    def __init__(self, thresholds: Tensor, values: Tensor) -> None:
        super().__init__()
        self.steps = int(thresholds.shape[1]).bit_length()
        width = 2**self.steps
        self.width = width
        filled = F.pad(thresholds, (0, width - 1 - thresholds.shape[1]), value=math.inf)
        self.register_buffer("thresholds", F.pad(filled, (0, 1), value=math.inf).flatten())
        self.register_buffer("values", F.pad(values, (0, width - values.shape[1])).flatten())

    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        """``first``: where the table of each element's channel begins, int64, broadcast to x."""
        place = torch.zeros_like(x, dtype=torch.int64) + first
        for step in reversed(range(self.steps)):
            beyond = x > gather(self.thresholds, place + (2**step - 1))
            place = place + beyond.to(torch.int64) * 2**step
        return gather(self.values, place)


class OnnxTable(nn.Module):
    first: Tensor

    def __init__(self, quantizer: TableQuantizer) -> None:
        super().__init__()
        codes = torch.arange(len(quantizer.exponents), dtype=torch.uint8, device=quantizer.exponents.device)
        values = sulq_dequantize(codes, quantizer.exponents, quantizer.eta)
        self.staircase = Staircase(quantizer.thresholds[None], values[None])
        self.register_buffer("first", torch.zeros((), dtype=torch.int64, device=values.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.staircase(plain(x).float(), self.first).to(x.dtype)


class OnnxSubset(nn.Module):
    first: Tensor
    quantizer: SubsetQuantizer

    def __init__(self, quantizer: SubsetQuantizer) -> None:
        super().__init__()
        levels = quantizer.levels.reshape(-1, quantizer.levels.shape[-1])
        self.axis, self.quantizer = quantizer.axis, quantizer
        self.staircase = Staircase(midpoints(levels), levels)
        self.register_buffer("first", torch.arange(len(levels), device=levels.device) * self.staircase.width)

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        mean, magnitude = self.quantizer.normal(values)
        shape = [1] * x.dim()
        shape[self.axis] = -1
        nearest = self.staircase((values - mean) / magnitude, self.first.view(shape))
        return (nearest * magnitude + mean).to(x.dtype)


def midpoints(levels: Tensor) -> Tensor:
    """Between neighbours, the largest float32 that is still nearest to the lower one (ties go down)."""
    exact = (levels[:, 1:].double() + levels[:, :-1].double()) / 2
    rounded = exact.float()
    below = torch.nextafter(rounded, torch.full_like(rounded, -math.inf))
    return torch.where(rounded.double() > exact, below, rounded)


TWINS: dict[type[nn.Module], Any] = {
    QLinear: OnnxLinear,
    QConv1d: OnnxConv,
    QConv2d: OnnxConv,
    QConv3d: OnnxConv,
    QConvTranspose2d: OnnxConvTranspose2d,
    UniformQuantizer: OnnxUniform,
    DynamicQuantizer: OnnxDynamic,
    TableQuantizer: OnnxTable,
    SubsetQuantizer: OnnxSubset,
}
