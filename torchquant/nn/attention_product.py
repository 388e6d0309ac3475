"""The two matrix products of attention, with a place for a quantizer at every operand."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import gradient_wanted, hooked
from .quantizers import DynamicQuantizer, TableQuantizer, UniformQuantizer

POINTS = ("query", "key", "value", "softmax")


class QAttention(nn.Module):
    """``softmax(query(q) key(k)^T scale + mask) value(v)``; the softmax's output passes through ``softmax``.

    ``query``, ``key``, ``value`` and ``softmax`` are nn.Identity until quantizers take their places. Where nobody needs
    the weights, one operator computes everything behind ``query``, ``key`` and ``value``: see :meth:`fits`; and these
    too, with integer products of q and k at least, where they are uniform: see :meth:`on_grids`.
    """

    if TYPE_CHECKING:  # points hold what no common class describes
        query: Any
        key: Any
        value: Any
        softmax: Any

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Identity()
        self.key = nn.Identity()
        self.value = nn.Identity()
        self.softmax = nn.Identity()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
        is_causal: bool = False,
        dropout: float = 0.0,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments as for ``F.scaled_dot_product_attention``; returns the output and the softmax's (quantized) output.

        A boolean ``mask`` says who takes part. A row in which nobody does gives zeros. Without ``need_weights`` the
        second may be None.
        """
        mask = None if is_causal else mask
        if not need_weights and dropout == 0 and self.on_grids() and self.fits(q, k, v, mask):
            return self.fused(q, k, v, mask, scale, is_causal, True), None
        q, k = self.query(q), self.key(k)
        if not need_weights and dropout == 0 and self.fits(q, k, v, mask):
            return self.fused(q, k, self.value(v), mask, scale, is_causal, False), None
        factor = float(q.shape[-1]) ** -0.5 if scale is None else scale
        scores = torch.matmul(q, k.transpose(-2, -1)) * factor
        if is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            infinity = float("inf")
            scores = scores.masked_fill(~mask, -infinity) if mask.dtype == torch.bool else scores + mask
            empty = scores.amax(-1, keepdim=True) == -infinity
            weights = scores.softmax(-1).masked_fill(empty, 0.0)
        else:
            weights = scores.softmax(-1)
        weights = self.softmax(weights)
        mixed = torch.matmul(F.dropout(weights, dropout, training=dropout > 0), self.value(v))
        return mixed, weights

    def fits(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
        """Whether ``fused`` can take over: a table or one grid for the softmax that nobody observes, float32 on the
        CPU, no gradient."""
        softmax = self.softmax
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves out what stands under this condition alone)
            if type(softmax) not in FUSED or hooked(softmax):
                return False
        if not (takes(q) and takes(k) and takes(v)) or (
            mask is not None and (gradient_wanted(mask) or (mask.dtype != torch.bool and mask.dtype != torch.float32))
        ):
            return False
        if hasattr(softmax, "zero_point"):
            return softmax.zero_point.numel() == 1
        return hasattr(softmax, "thresholds")

    def on_grids(self) -> bool:
        """Whether q, k and v have one uniform grid each, or each of their tokens one, and nobody observes their
        quantizers."""
        q, k, v = self.query, self.key, self.value
        if not torch.jit.is_scripting():
            for point in (q, k, v):
                if type(point) is not type(q) or type(point) not in UNIFORM or hooked(point):
                    return False
        if hasattr(q, "zero_point") and hasattr(k, "zero_point") and hasattr(v, "zero_point"):
            return q.is_integer() and k.is_integer() and v.is_integer()
        if hasattr(q, "granularity") and hasattr(k, "granularity") and hasattr(v, "granularity"):
            return q.is_integer() and k.is_integer() and v.is_integer()
        return False

    @torch.jit.export
    def on_like_grids(self) -> bool:
        """Whether ``on_grids()``, where those of q, k and v are of one kind and have as many bits."""
        q, k, v = self.query, self.key, self.value
        # TorchScript compiles what hasattr holds for.
        if hasattr(q, "zero_point") and hasattr(k, "zero_point") and hasattr(v, "zero_point"):
            return self.on_grids() and q.bits == k.bits and q.bits == v.bits
        if hasattr(q, "granularity") and hasattr(k, "granularity") and hasattr(v, "granularity"):
            alike = q.bits == k.bits and q.bits == v.bits and q.symmetric == k.symmetric and q.symmetric == v.symmetric
            return alike and self.on_grids() and q.granularity == k.granularity == v.granularity == "token"
        return False

    @torch.jit.export
    def grids(self) -> tuple[list[Tensor], list[Tensor], int, bool]:
        """Scales and zero points (none of tokens), bits and symmetry of q, k and v, where ``on_like_grids()``."""
        q, k, v = self.query, self.key, self.value
        if hasattr(q, "zero_point") and hasattr(k, "zero_point") and hasattr(v, "zero_point"):
            return [q.scale, k.scale, v.scale], [q.zero_point, k.zero_point, v.zero_point], q.bits, False
        if hasattr(q, "granularity"):
            return [], [], q.bits, q.symmetric
        return [], [], 8, False

    @torch.jit.export
    def softmax_levels(self) -> tuple[list[Tensor], int]:
        """Scale and zero point, or thresholds, exponents and eta of the quantizer at ``softmax``; its bits."""
        softmax = self.softmax
        # TorchScript compiles a branch whose hasattr holds, and passes over the others.
        if hasattr(softmax, "zero_point"):
            return [softmax.scale, softmax.zero_point], softmax.bits
        elif hasattr(softmax, "thresholds"):
            return [softmax.thresholds, softmax.exponents, softmax.eta], 8
        return [], 8

    def fused(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        is_causal: bool,
        grids: bool,
    ) -> Tensor:
        """:func:`torchquant.kernels.quantized_attention` with the quantizer at ``softmax``; with ``grids`` also with
        those at ``query``, ``key`` and ``value``."""
        none: Tensor | None = None
        table, grid, bits = [none, none, none], [none, none], [8, 8, 8]
        query, key, value = [none, none], [none, none], [none, none]
        levels, softmax_bits = self.softmax_levels()
        if len(levels) == 3:
            table[0], table[1], table[2] = levels[0], levels[1], levels[2]
        elif len(levels) == 2:
            grid[0], grid[1] = levels[0], levels[1]
        of_query, of_key, of_value = self.query, self.key, self.value
        # TorchScript compiles a branch whose hasattr holds, and passes over the others.
        if hasattr(of_query, "granularity") and hasattr(of_key, "granularity") and hasattr(of_value, "granularity"):  # noqa: SIM102
            if grids:
                q, query[0], query[1] = of_query.for_kernel(q)
                k, key[0], key[1] = of_key.for_kernel(k)
                v, value[0], value[1] = of_value.for_kernel(v)
                bits[0], bits[1], bits[2] = of_query.bits, of_key.bits, of_value.bits
        if hasattr(of_query, "zero_point") and grids:
            query[0], query[1], bits[0] = of_query.scale, of_query.zero_point, of_query.bits
        if hasattr(of_key, "zero_point") and grids:
            key[0], key[1], bits[1] = of_key.scale, of_key.zero_point, of_key.bits
        if hasattr(of_value, "zero_point") and grids:
            value[0], value[1], bits[2] = of_value.scale, of_value.zero_point, of_value.bits
        return torch.ops.torchquant.quantized_attention(
            q, k, v, mask, thresholds=table[0], exponents=table[1], eta=table[2], softmax_scale=grid[0],
            softmax_zero_point=grid[1], softmax_bits=softmax_bits, scale=scale, is_causal=is_causal,
            query_scale=query[0], query_zero_point=query[1], query_bits=bits[0], key_scale=key[0],
            key_zero_point=key[1], key_bits=bits[1], value_scale=value[0], value_zero_point=value[1],
            value_bits=bits[2],
        )  # fmt: skip


def takes(x: Tensor) -> bool:
    return x.is_cpu and (x.dtype == torch.float32 or x.dtype == torch.uint8) and not gradient_wanted(x)


FUSED = (TableQuantizer, UniformQuantizer)
UNIFORM = (UniformQuantizer, DynamicQuantizer)
