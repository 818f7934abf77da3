"""The core loop of layer streaming: what happens when a layer is entered and left, on whatever lanes it is given.

[Note: who waits for what, streaming]
- compute of a layer waits until its copy has arrived (``filled``);
- a copy waits for all compute submitted before it. Whatever the bytes held until then was used by work submitted
  earlier, since a place is given away only when its layer was left;
- copies follow each other on the h2d lane in the order in which their layers are expected.

Nothing here makes the host wait, but for host memory that has to be staged first (`offload.streaming.sources`).
On virtual lanes the same loop is the performance model (`offload.streaming.prediction`), on ordering lanes the proof
that these waits suffice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from offload.lanes import Event, Lanes
from offload.streaming.arena import Arena
from offload.streaming.order import CallOrder
from offload.streaming.sources import Source


@dataclass(slots=True)
class Held:
    """A copy of a layer on the device, complete once ``filled``."""

    offset: int
    filled: Event
    version: int  # of the host's weights when the copy was submitted


class Loader(Protocol):
    """What the calls of a model are told to."""

    def begin_pass(self, *, training: bool, wraps: bool = True) -> None: ...

    def abandon_pass(self) -> None: ...

    def enter(self, layer: int) -> int: ...

    def leave(self, layer: int) -> None: ...

    def drop_all(self) -> None: ...


class Engine:
    """Brings layers to the device before they are used, and gives their place to others afterwards.

    Layers are numbers, in the order of the model. Not thread-safe: forward and backward take turns.

    Args:
        layer_bytes: of each streamed layer's copy.
        arena: the buffer they pass through; it holds the largest of them at least.
        window: most layers on the device at a time (the paper's k).
        evict_batch: how many finished layers give up their places together (the paper's k').
    """

    def __init__(
        self,
        layer_bytes: Sequence[int],
        source: Source,
        arena: Arena,
        order: CallOrder,
        lanes: Lanes,
        *,
        window: int,
        evict_batch: int = 1,
    ) -> None:
        self.order = order
        self._layer_bytes = layer_bytes
        self._source = source
        self._arena = arena
        self._lanes = lanes
        self._window = window
        self._evict_batch = evict_batch
        self._held: dict[int, Held] = {}
        self._active: list[int] = []  # entered and not left; more than one only if layers call each other

    def begin_pass(self, *, training: bool, wraps: bool = True) -> None:
        """The model is called: forget copies of weights that were changed since, and load what comes first."""
        self.order.begin_pass(training=training, wraps=wraps)
        for layer in [*self._held]:
            if layer not in self._active and self._is_stale(layer):
                self._drop(layer)
        self._refill()

    def enter(self, layer: int) -> int:
        """``layer`` is used by what compute is given from now on; the offset of its copy in the arena."""
        self.order.note(layer)
        if layer in self._held and layer not in self._active and self._is_stale(layer):
            self._drop(layer)
        if layer not in self._held:
            self._bring(layer)
        self._active.append(layer)
        held = self._held[layer]
        self._lanes.compute.wait(held.filled)
        self._refill()
        return held.offset

    def leave(self, layer: int) -> None:
        """All use of ``layer`` was submitted: its place may be given away behind that."""
        self._active.remove(layer)
        self._refill()

    def abandon_pass(self) -> None:
        """The pass failed half way."""
        self.order.abandon_pass()

    def drop_all(self) -> None:
        """Forget every copy: all are loaded again when needed."""
        for layer in [*self._held]:
            if layer not in self._active:
                self._drop(layer)

    def _is_stale(self, layer: int) -> bool:
        return self._held[layer].version != self._source.version(layer)

    def _drop(self, layer: int) -> None:
        del self._held[layer]
        self._arena.free(layer)

    def _wanted(self) -> list[int]:
        """The layers to have on the device now besides the active ones: as many of the next as there is room for."""
        wanted: list[int] = []
        active = set(self._active)
        room_bytes = self._arena.num_bytes - sum(self._layer_bytes[layer] for layer in active)
        for layer in CallOrder.distinct(self.order.upcoming()):
            if layer in active:
                continue
            room_bytes -= self._layer_bytes[layer]
            if room_bytes < 0 or len(wanted) + len(active) >= self._window:
                break
            wanted.append(layer)
        return wanted

    def _refill(self) -> None:
        """Give away the places of layers that are not wanted soon, and load those that are, in the order expected."""
        wanted = self._wanted()
        finished = [layer for layer in self._held if layer not in wanted and layer not in self._active]
        if not 0 < len(finished) < self._evict_batch:
            for layer in finished:
                self._drop(layer)
        self._source.read_ahead(self.order.distinct(self.order.upcoming()), self._held)
        for layer in wanted:
            if layer not in self._held and not (self._has_room() and self._load(layer)):
                break  # the next ones wait too, so that none comes before one that is needed earlier

    def _has_room(self) -> bool:
        return len(self._held) < self._window

    def _load(self, layer: int) -> bool:
        """Submit the copy of ``layer`` if there is a place for it."""
        offset = self._arena.place(layer, self._layer_bytes[layer])
        if offset is None:
            return False
        version = self._source.version(layer)
        filled = self._source.fetch(layer, offset, after=self._lanes.compute.mark())
        self._held[layer] = Held(offset, filled, version)
        return True

    def _bring(self, layer: int) -> None:
        """Load a layer that is needed at once, at the cost of those that are needed last."""
        upcoming = [*CallOrder.distinct(self.order.upcoming())]
        others = sorted(
            (held for held in self._held if held not in self._active),
            key=lambda held: upcoming.index(held) if held in upcoming else len(upcoming),
        )
        while not (self._has_room() and self._load(layer)):
            if not others:
                raise RuntimeError(
                    f"layers {self._active} are in use at the same time and the device buffer of "
                    f"{self._arena.num_bytes} bytes does not hold them together; raise device_budget, or keep one of "
                    f"them on the device with resident=[names]"
                )
            self._drop(others.pop())
