"""One function per published pipeline; each reads as the steps it is made of."""

from .dfsq import dfsq
from .erq import erq
from .is_vit import is_vit
from .magr_comq import magr_comq
from .repq_vit import repq_vit

__all__ = ["dfsq", "erq", "is_vit", "magr_comq", "repq_vit"]
