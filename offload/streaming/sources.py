"""Where streamed weights come from: pinned host memory, or pageable memory and files through a bounded pinned ring."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Protocol

from torch import Tensor

from offload.accelerators import Accelerator
from offload.lanes import Event, Lanes, Work


class HostLayer(Protocol):
    """The weights of one layer in host memory or in a file."""

    num_bytes: int

    def version(self) -> int:
        """A number that changes when the weights do."""

    def pinned(self) -> Sequence[tuple[int, Tensor]] | None:
        """The layer's bytes as pinned uint8 tensors, each with its offset in the layer; None if they are not pinned."""

    def read_into(self, stage: Tensor) -> None:
        """Write the layer's bytes to ``stage``, a uint8 tensor of ``num_bytes``."""


class Source(Protocol):
    """What the engine loads layers from."""

    def version(self, layer: int) -> int:
        """A number that changes when the weights of ``layer`` do."""

    def read_ahead(self, upcoming: Iterable[int], held: Container[int]) -> None:
        """Get layers that are expected and not on the device closer to it, as far as there is room."""

    def fetch(self, layer: int, offset: int, after: Event) -> Event:
        """Submit the copy of ``layer`` to the arena behind ``after``; the event of its arrival."""


class _Stage:
    """One pinned buffer of the ring: filled by the host lane, emptied by the h2d lane."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.version = 0
        self.read: Event | None = None
        self.uploaded: Event | None = None


class HostSource:
    """Pinned layers go up in one copy each, straight from where they live. The others pass through a ring.

    The host lane reads layers that are not pinned ahead into the ring's pinned buffers, and the link empties them. The
    thread that submits an upload waits for the read before it, as a stream cannot wait for a worker thread; reads go
    as far ahead as the ring is long, so it seldom has to.

    Args:
        arena: the device buffer, uint8.
        ring: uint8 buffers in host memory, each as large as the largest layer that is not pinned.
    """

    def __init__(
        self, layers: Sequence[HostLayer], arena: Tensor, ring: Sequence[Tensor], lanes: Lanes, accelerator: Accelerator
    ) -> None:
        self._layers = layers
        self._arena = arena
        self._lanes = lanes
        self._accelerator = accelerator
        self._free = [_Stage(buffer) for buffer in ring]
        self._read: dict[int, _Stage] = {}  # by layer, the oldest read first

    def version(self, layer: int) -> int:
        return self._layers[layer].version()

    def read_ahead(self, upcoming: Iterable[int], held: Container[int]) -> None:
        if not self._free:
            return
        for layer in upcoming:
            if layer not in held and layer not in self._read and self._layers[layer].pinned() is None:
                self._submit_read(layer)
                if not self._free:
                    return

    def fetch(self, layer: int, offset: int, after: Event) -> Event:
        num_bytes = self._layers[layer].num_bytes
        device = self._arena[offset : offset + num_bytes]
        pinned = self._layers[layer].pinned()
        if pinned is not None:
            return self._lanes.h2d.submit(upload(layer, pinned, device), after=(after,))
        stage = self._staged(layer)
        staged = [(0, stage.buffer[:num_bytes])]
        stage.uploaded = self._lanes.h2d.submit(upload(layer, staged, device), (stage.read, after))
        self._free.append(self._read.pop(layer))
        return stage.uploaded

    def close(self) -> None:
        """Let go of the device buffer. Nothing is in flight."""
        self._arena = self._arena.new_empty(0)

    def _staged(self, layer: int) -> _Stage:
        """The buffer that holds ``layer`` as it is now, once its read is done."""
        stage = self._read.get(layer)
        if stage is not None and stage.version == self.version(layer):
            return stage
        if stage is not None:
            self._free.append(self._read.pop(layer))
        elif not self._free:  # the ring is full of layers that were expected before this one
            self._free.append(self._read.pop(next(iter(self._read))))
        return self._submit_read(layer)

    def _submit_read(self, layer: int) -> _Stage:
        stage = self._free.pop(0)  # the one whose upload was submitted longest ago
        source, buffer = self._layers[layer], stage.buffer[: self._layers[layer].num_bytes]
        accelerator = self._accelerator

        def read() -> None:
            accelerator.declare_host_work(f"read layer {layer}", reads=(), writes=(buffer,))
            source.read_into(buffer)

        stage.version = source.version()
        stage.read = self._lanes.host.submit(Work(f"R{layer}", read, host_bytes=2 * buffer.nbytes), (stage.uploaded,))
        self._read[layer] = stage
        return stage


def upload(layer: int, host: Sequence[tuple[int, Tensor]], device: Tensor) -> Work:
    """The copy of a layer to its place on the device, in as many pieces as it has in host memory."""
    return Work(f"L{layer}", lambda: _copy(device, host), num_bytes=sum(piece.nbytes for _, piece in host))


def _copy(device: Tensor, host: Sequence[tuple[int, Tensor]]) -> None:
    for offset, piece in host:
        device[offset : offset + piece.nbytes].copy_(piece, non_blocking=True)
