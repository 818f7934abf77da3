"""A callback for Lightning. The optimizer itself needs none: return it from ``configure_optimizers``."""

from .callback import OffloadCallback

__all__ = ["OffloadCallback"]
