"""Files: one module per format."""

from .native import load, save

__all__ = ["load", "save"]
