"""torchquant: published quantization systems as LibTorch operators."""

from . import _load  # noqa: F401  (checks the torch version, then registers every operator)
from . import solvers

__all__ = ["solvers"]
