"""What backward reads must be what forward saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from offload.accelerators import sim


@contextmanager
def watch_saved_tensors() -> Iterator[None]:
    """Report (in ``sim.races()``) tensors on the device that autograd saved inside it and that were written since.

    autograd notices a tensor that was changed in place, but not through ``.data``, a storage or another view of the
    same buffer: a slot that is refilled so gives wrong gradients without any error. Here the bytes are watched instead.
    Needs the race detector on.
    """

    def pack(tensor: Tensor) -> tuple[Tensor, int]:
        return tensor.detach(), sim.last_write(tensor) if tensor.device.type == "sim" else 0

    def unpack(saved: tuple[Tensor, int]) -> Tensor:
        tensor, last_write = saved
        if tensor.device.type == "sim" and sim.last_write(tensor) != last_write:
            sim.report(
                f"backward reads a tensor of shape {tuple(tensor.shape)} that was written after forward had saved it"
            )
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
