"""How much memory a quantization takes, from shapes alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .config import Scheme
from .nn import layout
from .selection import Target, select


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that quantize_ needs besides the model, and what the result takes."""

    weights_before: int
    weights_after: int
    grams: int  # every layer's, alive at once under inputs="float" (less where layers share their inputs)
    largest_layer: int  # working memory of the solver for the largest layer
    details: tuple[tuple[str, int], ...] = ()  # (layer, bytes of its Gram)

    def __str__(self) -> str:
        parts = {
            "weights": self.weights_before,
            "quantized": self.weights_after,
            "Grams at most": self.grams,
            "solver": self.largest_layer,
        }
        return ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in parts.items())


def estimate_memory(
    model: nn.Module,
    scheme: str | Scheme,
    *,
    overrides: Mapping[str, str | Scheme | None] | None = None,
    ignore: Sequence[str] = (),
) -> MemoryEstimate:
    """What ``quantize_`` with the same arguments takes; nothing is run."""
    return estimate(select(model, Scheme.parse(scheme), overrides or {}, ignore)[0])


def estimate(targets: Mapping[str, Target]) -> MemoryEstimate:
    before = after = grams = largest = 0
    details = []
    for name, target in targets.items():
        matrix = layout.to_matrix(target.module)
        rows, columns = matrix.shape
        gram = 4 * layout.groups_of(target.module) * columns**2
        before += matrix.numel() * matrix.element_size()
        after += quantized_bytes((rows, columns), target.scheme)
        grams += gram
        # Weight, target, residual and start in float32, two sets of codes; the Gram's inverse beside the Gram.
        largest = max(largest, 18 * rows * columns + 2 * gram)
        details.append((name, gram))
    return MemoryEstimate(before, after, grams, largest, tuple(details))


def quantized_bytes(shape: tuple[int, ...], scheme: Scheme) -> int:
    """Packed codes, and scale and zero point in float32."""
    rows, columns = shape
    groups = -(-columns // scheme.group_size) if scheme.group_size else 1
    return rows * (4 * -(-columns * scheme.weight_bits // 32) + 8 * groups)
