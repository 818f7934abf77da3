"""Host memory of streamed weights: one exact-size pinned slab a layer, and what is done where pinning is refused."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from offload.accelerators import Accelerator
from offload.accounting import note_pinned
from offload.limits import host_limits
from offload.pool import BudgetError, format_bytes
from offload.streaming.sources import HostLayer

logger = logging.getLogger("offload")

RING_LENGTH = 3  # buffers: one is read into, one waits, one goes up


def check_room(num_bytes: int, use: str) -> None:
    """Raise BudgetError if the machine, a control group or a resource limit does not hold that much host memory.

    Args:
        use: what would take it, to be followed by how much.
    """
    for limit in host_limits():
        if num_bytes > limit.free_bytes:
            raise BudgetError(
                f"{limit.name} leaves {format_bytes(limit.free_bytes)} ({limit.free_bytes} bytes) of "
                f"{format_bytes(limit.total_bytes)}, but {use} {format_bytes(num_bytes)} ({num_bytes} bytes): "
                f"{limit.remedy}, or leave weights in files (disk=, stream_from_pretrained)"
            )


class HostMemory:
    """Allocates slabs, pinned for as long as the system allows it."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.num_bytes = 0
        self.pinned_bytes = 0
        self._accelerator = accelerator
        self._refused: RuntimeError | None = None

    def slab(self, num_bytes: int) -> tuple[Tensor, bool]:
        """A uint8 tensor of at least ``num_bytes``, and whether it is pinned.

        Raises:
            BudgetError: before it is allocated, if the machine, a control group or a resource limit does not hold it.
        """
        check_room(num_bytes, "the next block of weights needs")
        pinned = self._pinned(num_bytes)
        slab = torch.empty(num_bytes, dtype=torch.uint8) if pinned is None else pinned
        self.num_bytes += slab.nbytes
        return slab, pinned is not None

    def ring(self, layers: Iterable[HostLayer]) -> list[Tensor]:
        """Staging buffers for the layers that are not pinned. Pageable if even they cannot be: copies block then."""
        sizes = [layer.num_bytes for layer in layers if layer.pinned() is None]
        if not sizes:
            return []
        self._refused, refused = None, self._refused  # a few small buffers may still be granted
        buffers = [self.slab(max(sizes)) for _ in range(min(RING_LENGTH, len(sizes)))]
        if refused is not None:
            how = "pinned" if all(is_pinned for _, is_pinned in buffers) else "pageable, so copies block the host"
            logger.warning(
                "the system refused to pin %s of weights (%s); they stay in pageable memory and go up through a ring "
                "of %d buffers of %s, %s. Raise the locked memory limit (ulimit -l) for full speed",
                format_bytes(sum(sizes)), refused, len(buffers), format_bytes(max(sizes)), how,
            )  # fmt: skip
        return [buffer for buffer, _ in buffers]

    def _pinned(self, num_bytes: int) -> Tensor | None:
        if self._refused is not None:
            return None
        try:
            slab = self._accelerator.pinned_empty(num_bytes)
        except RuntimeError as error:
            self._refused = error
            return None
        self.pinned_bytes += slab.nbytes
        note_pinned(slab.nbytes)
        weakref.finalize(slab.untyped_storage(), note_pinned, -slab.nbytes)
        return slab
