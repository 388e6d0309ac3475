"""What every quantized layer holds, and how its weight comes back as numbers. Which product follows, subclasses say."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import pack_codes, unpack_codes
from .repeat import RepeatedCall


def gradient_wanted(x: Tensor) -> bool:
    """Whether somebody may ask for the gradient of ``x``. Not of an exported graph: it is for inference, though the
    float parameters ahead of ``x`` ask for gradients while it is traced."""
    wanted = torch.is_grad_enabled() and x.requires_grad
    if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves out what stands under this condition alone)
        if wanted and torch.compiler.is_exporting():
            return False
    return wanted


@contextmanager
def kept_float32(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Around ``module._apply``: these buffers move, but remain as they are under ``.to(dtype)``. Rounded to half they
    would be another grid than the one that codes were found for."""
    before = {name: module._buffers[name] for name in names}
    yield
    for name, buffer in before.items():
        after = module._buffers[name]
        if buffer is not None and after is not None and after.dtype != torch.float32:
            module._buffers[name] = buffer.to(after.device)


def hooked(module: nn.Module) -> bool:
    """Whether somebody observes what goes into or out of ``module``."""
    return len(module._forward_hooks) + len(module._forward_pre_hooks) > 0


GRIDS = ("weight_scale", "weight_zero_point", "kernel_grid", "output_scale", "output_zero_point")


class QuantizedLayer(RepeatedCall):
    """Buffers only, named as compressed-tensors names them.

    ``weight_packed`` int32 ``[N, ceil(K * bits / 32)]``, ``weight_scale`` and ``weight_zero_point`` float32 ``[N, G]``,
    ``weight_shape`` int64 (the float weight's shape), ``bias``. Scale and zero point stay float32 under ``.to(dtype)``:
    rounded to half they would no longer be the ones that the codes were solved for. ``input_quantizer``, when there is
    one, comes before the product.

    Where the layer has packed kernels, ``kernel_weight`` and ``kernel_grid`` are the same weight in the order in which
    they read it, the same on every device; they follow from the other buffers and are in no state_dict.

    With ``output_scale`` and ``output_zero_point`` (see :func:`torchquant.pass_codes_`) the packed kernel gives uint8
    codes of ``output_activation`` of its outputs on this grid, which the next layer takes as they are.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    weight_shape: Tensor
    float_like: Tensor
    kernel_weight: Tensor
    kernel_grid: Tensor
    output_scale: Tensor | None
    output_zero_point: Tensor | None
    __jit_unused_properties__ = ("weight",)

    def __init__(self, rows: int, columns: int, shape: tuple[int, ...], bits: int, group_size: int, bias: bool) -> None:
        super().__init__()
        self.bits, self.group_size, self.columns = bits, group_size, columns
        groups = 1 if group_size == 0 else (columns + group_size - 1) // group_size
        self.register_buffer("weight_packed", torch.zeros(rows, (columns * bits + 31) // 32, dtype=torch.int32))
        self.register_buffer("weight_scale", torch.ones(rows, groups, dtype=torch.float32))
        self.register_buffer("weight_zero_point", torch.zeros(rows, groups, dtype=torch.float32))
        self.register_buffer("weight_shape", torch.tensor(shape, dtype=torch.int64))
        self.register_buffer("bias", torch.zeros(rows) if bias else None)
        self.input_quantizer: Any = None  # or an ActivationQuantizer
        # Empty: it follows .to(dtype), and so remembers which dtype `weight` is expected in.
        self.register_buffer("float_like", torch.zeros(0), persistent=False)
        self.register_buffer("kernel_weight", torch.zeros(0, dtype=torch.uint8), persistent=False)
        self.register_buffer("kernel_grid", torch.zeros(0), persistent=False)
        self.register_buffer("output_scale", None, persistent=False)
        self.register_buffer("output_zero_point", None, persistent=False)
        self.output_bits, self.output_activation = 8, "none"

    def fill(self, module: nn.Module, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Take over codes and grid, and the float layer's bias, dtype, device and mode."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        bias = module.bias
        self.weight_packed = pack_codes(codes, bits=self.bits)
        self.weight_scale, self.weight_zero_point = scale.float().clone(), zero_point.float().clone()
        self.weight_shape = self.weight_shape.to(codes.device)
        self.float_like = weight.new_empty(0)
        self.bias = bias.detach().clone() if isinstance(bias, Tensor) else None
        self.train(module.training)
        self.prepack()

    @torch.jit.ignore
    def kernel_fits(self, device: torch.device) -> bool:
        """Whether this layer's packed kernel, where it has one, runs on ``device``."""
        return device.type == "cpu"

    @torch.jit.ignore
    def prepack(self) -> None:
        """Derive what the packed kernel reads, where this layer has one that fits its device."""

    @torch.jit.ignore
    def codes_and_zero_point(self) -> tuple[Tensor, Tensor | None]:
        """The weight's codes ``[N, K]``; no zero point where it is in the middle, which costs kernels nothing."""
        codes = unpack_codes(self.weight_packed, bits=self.bits, columns=self.columns)
        symmetric = bool((self.weight_zero_point == 2 ** (self.bits - 1)).all())
        return codes, None if symmetric else self.weight_zero_point

    def kernel_runs(self, x: Tensor) -> bool:
        """Whether the packed kernel can take ``x`` (uint8: codes of ``input_grid``): it is there, knows the dtype, and
        nobody wants a gradient."""
        if self.kernel_weight.numel() == 0 or gradient_wanted(x):
            return False
        floats = x.dtype == torch.float32 or x.dtype == torch.float16 or x.dtype == torch.bfloat16
        return floats or x.dtype == torch.uint8

    def gives_codes(self) -> bool:
        return self.output_scale is not None and not self.training

    def input_grid(self) -> tuple[Tensor | None, Tensor | None, int]:
        """Scale, zero point and bits of the input quantizer, where it has one grid for everything."""
        quantizer = self.input_quantizer
        if quantizer is not None:  # noqa: SIM102  (TorchScript compiles what hasattr holds for)
            if hasattr(quantizer, "zero_point"):
                scale, zero_point = quantizer.scale, quantizer.zero_point
                if scale.numel() == 1:
                    return scale, zero_point, quantizer.bits
        return None, None, 8

    def quantized_input(self, x: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return x

    def matrix(self) -> Tensor:
        """The weight as ``[N, K]`` float32."""
        return self.matrix_of(self.weight_packed, self.weight_scale, self.weight_zero_point)

    def matrix_of(self, packed: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        codes = torch.ops.torchquant.unpack_codes(packed, bits=self.bits, columns=self.columns)
        return torch.ops.torchquant.dequantize(codes, scale, zero_point, group_size=self.group_size)

    def bias_for(self, x: Tensor) -> Tensor | None:
        bias = self.bias
        return bias.to(x.dtype) if bias is not None else None

    def dequantized_weight(self) -> Tensor:
        """The weight in the float layer's shape, float32."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The weight in the float layer's shape and dtype, for callers that read it instead of calling the layer."""
        return self.dequantized_weight().to(self.float_like.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = self.kernel_grid.device
        with kept_float32(self, GRIDS):
            super()._apply(fn, recurse)
        device = self.weight_packed.device
        if device != before:
            if not self.kernel_fits(device):
                self.kernel_weight, self.kernel_grid = self.kernel_weight.new_empty(0), self.kernel_grid.new_empty(0)
            elif self.kernel_weight.numel() == 0 and before.type != "meta":  # then there are no numbers yet
                self.prepack()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.prepack()

    def scheme_repr(self) -> str:
        group = f"group_size={self.group_size}, " if self.group_size else ""
        return f"{group}bits={self.bits}, bias={self.bias is not None}"
