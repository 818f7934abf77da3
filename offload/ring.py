"""State that could not be pinned, on its way to and from the device: through a few pinned buffers, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.accelerators import Accelerator

RING_LENGTH = 3  # buffers: the host fills or empties one while the link moves another, and one is between
PIECE_BYTES = 1 << 23  # a power of two, so that no allocator takes more; long enough to hide a copy's latency
RING_BYTES = RING_LENGTH * PIECE_BYTES


@dataclass(slots=True)
class _Buffer:
    memory: Tensor  # uint8
    free: torch.Event | None = None  # when the link has moved what is in it


class PinnedRing:
    """Moves bytes between pageable host memory and the device. One thread at a time.

    The thread that enqueues does the copies within host memory, so it waits for the link, and for all that the current
    stream holds before a copy down: that is what pageable memory costs, beside one more pass over host memory each way.

    Args:
        buffers: equal in size, uint8, pinned. (If they are not, every copy blocks, and all is right still.)
    """

    def __init__(self, buffers: Sequence[Tensor], accelerator: Accelerator) -> None:
        self._buffers = [_Buffer(memory) for memory in buffers]
        self._piece_bytes = buffers[0].nbytes
        self._accelerator = accelerator
        self._num_used = 0

    def up(self, host: Tensor, device: Tensor) -> None:
        """Copy ``host`` (contiguous, pageable) to ``device`` in the order of the current stream.

        ``host`` has been read when this returns.
        """
        for begin, piece in self._pieces(host):
            buffer = self._next()
            filled = buffer.memory[: piece.nbytes]
            self._accelerator.declare_host_work("ring", reads=(piece,), writes=(filled,))
            filled.copy_(piece)
            _bytes(device)[begin : begin + piece.nbytes].copy_(filled, non_blocking=True)
            buffer.free = self._record()

    def down(self, device: Tensor, host: Tensor) -> None:
        """Copy ``device`` to ``host`` (contiguous, pageable), after what the current stream holds. Done on return."""
        arriving: list[tuple[_Buffer, Tensor]] = []
        for begin, piece in self._pieces(host):
            if len(arriving) == len(self._buffers) - 1:
                self._land(*arriving.pop(0))
            buffer = self._next()
            buffer.memory[: piece.nbytes].copy_(_bytes(device)[begin : begin + piece.nbytes], non_blocking=True)
            buffer.free = self._record()
            arriving.append((buffer, piece))
        for landing in arriving:
            self._land(*landing)

    def _land(self, buffer: _Buffer, piece: Tensor) -> None:
        assert buffer.free is not None
        buffer.free.synchronize()
        filled = buffer.memory[: piece.nbytes]
        self._accelerator.declare_host_work("ring", reads=(filled,), writes=(piece,))
        piece.copy_(filled)

    def _pieces(self, host: Tensor) -> list[tuple[int, Tensor]]:
        flat = _bytes(host)
        begins = range(0, flat.nbytes, self._piece_bytes)
        return [(begin, flat[begin : begin + self._piece_bytes]) for begin in begins]

    def _next(self) -> _Buffer:
        """The buffer that was used longest ago, once the link is done with it."""
        buffer = self._buffers[self._num_used % len(self._buffers)]
        self._num_used += 1
        if buffer.free is not None:
            buffer.free.synchronize()
        return buffer

    def _record(self) -> torch.Event:
        event = torch.Event(self._accelerator.device)
        event.record(torch.accelerator.current_stream(self._accelerator.device))
        return event


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
