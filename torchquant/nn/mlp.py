"""Two linear layers with an activation function between them, which never lies in memory as floats."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .base import hooked
from .linear import QLinear
from .repeat import RepeatedCall
from .rewrite import same_function
from .swap import swap_modules

SLOTS = ("fc1", "act", "drop1", "norm", "fc2", "drop2")


class QMlp(RepeatedCall):
    """``fc2(act(fc1(x)))`` of two :class:`QLinear` under the names of timm's ``Mlp``.

    ``act`` is taken in ``fc1``'s kernel. Where ``fc2``'s input has one uniform grid, that kernel also gives its codes.
    In training, where a gradient is wanted, and where somebody observes a part, every module is called on its own.
    """

    if TYPE_CHECKING:  # whatever stands there
        fc1: Any
        act: Any
        drop1: Any
        norm: Any
        fc2: Any
        drop2: Any

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)
        for name in SLOTS:
            if not hasattr(self, name):
                self.add_module(name, nn.Identity())
        self.activation = activation_name(self.act)

    def forward(self, x: Tensor) -> Tensor:
        if self.fuses(x):
            fc1 = self.fc1
            fc2 = self.fc2
            if fc1.is_direct() and fc2.is_direct():
                return both(x, fc1.arguments(), fc2.arguments(), self.activation, fc2.float_like)
            scale, zero_point, bits = fc2.input_grid()
            x = fc1.packed(x, self.activation, scale, zero_point, bits)
            return fc2(x) if scale is None else fc2.packed(x)
        return self.unfused(x)

    def unfused(self, x: Tensor) -> Tensor:
        x = self.norm(self.drop1(self.act(self.fc1(x))))
        return self.drop2(self.fc2(x))

    def fuses(self, x: Tensor) -> bool:
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves out what stands under this condition alone)
            if observed(self):
                return False
        fc1, fc2 = self.fc1, self.fc2
        if hasattr(fc1, "kernel_weight") and hasattr(fc2, "kernel_weight"):
            return not self.training and fc1.runs_packed(x) and fc2.kernel_weight.numel() > 0
        return False


class QSequentialMlp(RepeatedCall, nn.Sequential):
    """The same for a linear layer, an activation function, perhaps dropout, a linear layer, perhaps dropout in an
    nn.Sequential."""

    if TYPE_CHECKING:

        def __getitem__(self, index: Any) -> Any: ...

    def __init__(self, module: nn.Sequential) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)
        self.activation = activation_name(module[1])

    def forward(self, x: Tensor) -> Tensor:
        if self.fuses(x):
            if hasattr(self[2], "kernel_weight"):
                if self[0].is_direct() and self[2].is_direct():
                    return both(x, self[0].arguments(), self[2].arguments(), self.activation, self[2].float_like)
                scale, zero_point, bits = self[2].input_grid()
                return self[2](self[0].packed(x, self.activation, scale, zero_point, bits))
            else:
                if self[0].is_direct() and self[3].is_direct():
                    return both(x, self[0].arguments(), self[3].arguments(), self.activation, self[3].float_like)
                scale, zero_point, bits = self[3].input_grid()
                return self[3](self[0].packed(x, self.activation, scale, zero_point, bits))
        return self.unfused(x)

    def unfused(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
        return x

    def fuses(self, x: Tensor) -> bool:
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves out what stands under this condition alone)
            if observed(self):
                return False
        if hasattr(self[0], "kernel_weight"):
            if hasattr(self[2], "kernel_weight"):
                return not self.training and self[0].runs_packed(x) and self[2].kernel_weight.numel() > 0
            elif hasattr(self[3], "kernel_weight"):
                return not self.training and self[0].runs_packed(x) and self[3].kernel_weight.numel() > 0
        return False


Arguments = tuple[list[Tensor], list[int]]  # QLinear.arguments()


def both(x: Tensor, fc1: Arguments, fc2: Arguments, activation: str, float_like: Tensor) -> Tensor:
    """Two layers in one operator, in the dtype of x, or where there are codes of ``float_like``."""
    y = torch.ops.torchquant.quantized_mlp(x, fc1[0], fc1[1], fc2[0], fc2[1], activation=activation)
    codes = x.dtype == torch.uint8 or fc2[0][4].numel() > 0
    return y.to(float_like.dtype if codes else x.dtype)


def observed(module: nn.Module) -> bool:
    """Whether somebody looks at what passes between the parts of ``module``."""
    return any(hooked(part) for part in module._modules.values() if part is not None)


def activation_name(module: nn.Module) -> str:
    """As `torchquant.kernels.quantized_linear` names it; empty where it has no such function."""
    if type(module) is nn.GELU and module.approximate == "none":
        return "gelu"
    return "silu" if type(module) is nn.SiLU else ""


def fuse_mlps(model: nn.Module) -> None:
    """Put :class:`QMlp` and :class:`QSequentialMlp` where quantized layers stand in such an order and nobody observes
    them; they compute the same. The modules inside and their names stay."""
    replacements: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if module is model or hooked(module) or isinstance(module, (QMlp, QSequentialMlp)):
            continue
        if type(module).forward is nn.Sequential.forward and is_chain(list(module.children())):
            replacements[module] = QSequentialMlp(module).train(module.training)  # type: ignore[arg-type]
        elif is_mlp(module) and (made := as_mlp(module)) is not None:
            replacements[module] = made
    swap_modules(model, replacements)


def as_mlp(module: Any) -> QMlp | None:
    made = QMlp(module).train(module.training)
    try:
        same = same_function(module, made, made.unfused, (2, module.fc1.in_features), module.fc1.float_like)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None  # it only looked alike
    return made if same else None


def is_mlp(module: Any) -> bool:
    """As far as its children show."""
    children = dict(module.named_children())
    if not {"fc1", "act", "fc2"} <= children.keys() <= set(SLOTS) | {"drop"}:
        return False
    between = [child for name, child in children.items() if name not in ("fc1", "act", "fc2")]
    return is_chain([children["fc1"], children["act"], children["fc2"]]) and all(map(is_passive, between))


def is_chain(modules: Sequence[nn.Module]) -> bool:
    if len(modules) < 3 or type(modules[0]) is not QLinear or not activation_name(modules[1]):
        return False
    second = 3 if len(modules) > 3 and is_passive(modules[2]) else 2
    return type(modules[second]) is QLinear and all(map(is_passive, modules[second + 1 :]))


def is_passive(module: nn.Module) -> bool:
    return type(module) in (nn.Identity, nn.Dropout)
