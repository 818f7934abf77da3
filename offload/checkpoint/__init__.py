"""Checkpoints: written whole or not at all, checked before anything is loaded, and taken up under any placement."""

from offload.checkpoint.index import CheckpointError
from offload.checkpoint.loading import load
from offload.checkpoint.saving import save

__all__ = ["CheckpointError", "load", "save"]
