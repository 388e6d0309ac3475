"""Transformer blocks with norms ahead of attention and MLP, as one operator."""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .attention import QSelfAttention
from .base import hooked
from .layer_norm import QLayerNorm, trained
from .mlp import QMlp, fuse_mlps, observed
from .repeat import RepeatedCall
from .rewrite import same_function
from .swap import swap_modules

PARTS = ("norm1", "attn", "norm2", "mlp")
PASSIVE = ("ls1", "drop_path1", "ls2", "drop_path2")  # in evaluation
NORMS = (nn.LayerNorm, QLayerNorm)


class QBlock(RepeatedCall):
    """``y = x + attn(norm1(x))``, then ``y + mlp(norm2(y))``, with modules under the names of timm's ``Block``.

    A few sequences at a time pass all of it in `torchquant.kernels.quantized_block`, and what lies between stays in the
    caches. In training, where a gradient is wanted, with a mask, on other devices and dtypes, and where somebody
    observes a part, every module is called on its own.
    """

    if TYPE_CHECKING:  # whatever stands there
        norm1: Any
        attn: Any
        norm2: Any
        mlp: Any
        ls1: Any
        ls2: Any
        drop_path1: Any
        drop_path2: Any

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)
        for name in PASSIVE:
            if not hasattr(self, name):
                self.add_module(name, nn.Identity())

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is None and not is_causal and self.fuses(x):
            return self.fused(x)
        return self.unfused(x, attn_mask, is_causal)

    def unfused(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask, is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def without_passive(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def fuses(self, x: Tensor) -> bool:
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves out what stands under this condition alone)
            if observed(self):
                return False
        if self.training or x.dtype != torch.float32 or x.dim() != 3:
            return False
        norm1, attn, norm2, mlp = self.norm1, self.attn, self.norm2, self.mlp
        if trained(norm1.weight) or trained(norm1.bias) or trained(norm2.weight) or trained(norm2.bias):
            return False
        # TorchScript compiles what hasattr holds for.
        if hasattr(attn, "product") and hasattr(mlp, "activation"):
            proj, fc1, fc2 = attn.proj, mlp.fc1, mlp.fc2
            if attn.takes_codes(x, None) and mlp.fuses(x) and fc1.is_direct() and fc2.is_direct():
                return proj.float_like.dtype == x.dtype and fc2.float_like.dtype == x.dtype
        return False

    def fused(self, x: Tensor) -> Tensor:
        norm1, attn, norm2, mlp = self.norm1, self.attn, self.norm2, self.mlp
        if hasattr(attn, "product") and hasattr(mlp, "activation"):
            none = attn.proj.float_like
            norms: list[Tensor] = []
            for parameter in (norm1.weight, norm1.bias, norm2.weight, norm2.bias):
                norms.append(none if parameter is None else parameter)
            eps = [self.norm1.eps, self.norm2.eps]  # TorchScript finds constants by self alone
            qkv, proj = attn.qkv.arguments(), attn.proj.arguments()
            scales, zero_points, bits, symmetric = attn.product.grids()
            softmax, softmax_bits = attn.product.softmax_levels()
            fc1, fc2 = mlp.fc1.arguments(), mlp.fc2.arguments()
            x = torch.ops.torchquant.quantized_block(
                x, norms, eps, qkv[0], qkv[1], proj[0], proj[1], scales, zero_points, bits, softmax,
                softmax_bits, fc1[0], fc1[1], fc2[0], fc2[1], num_heads=attn.num_heads, scale=attn.scale,
                symmetric=symmetric, activation=mlp.activation,
            )  # fmt: skip
        return x


def fuse_modules(model: nn.Module) -> None:
    """``fuse_mlps``, and a :class:`QBlock` in place of every block that computes the same and that nobody observes. The
    modules inside and their names stay."""
    fuse_mlps(model)
    replacements: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if module is not model and not hooked(module) and is_block(module) and (made := as_block(module)) is not None:
            replacements[module] = made
    swap_modules(model, replacements)


def is_block(module: Any) -> bool:
    """As far as its children and arguments show."""
    children: dict[str, Any] = dict(module.named_children())
    if isinstance(module, QBlock) or not set(PARTS) <= children.keys() <= {*PARTS, *PASSIVE}:
        return False
    norms = [children["norm1"], children["norm2"]]
    if any(type(norm) not in NORMS or len(norm.normalized_shape) != 1 for norm in norms):
        return False
    if type(children["attn"]) is not QSelfAttention or type(children["mlp"]) is not QMlp:
        return False
    passive = [child for name, child in children.items() if name in PASSIVE]
    stateless = not any(child.state_dict() for child in passive)
    arguments = list(inspect.signature(type(module).forward).parameters)[2:]
    return stateless and set(arguments) <= {"attn_mask", "is_causal"} and not plain_attributes(module)


def plain_attributes(module: nn.Module) -> set[str]:
    """What somebody might look for that is no submodule, parameter or buffer."""
    own = [*module._parameters, *module._buffers]
    return {*own, *vars(module)} - vars(nn.Module()).keys()


def as_block(module: Any) -> QBlock | None:
    made = QBlock(module).train(module.training)
    shape = (2, 5, module.norm1.normalized_shape[-1])
    try:
        same = same_function(module, made, made.without_passive, shape, module.attn.proj.float_like)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None  # it only looked alike
    return made if same else None
