"""Layers that visit the device: brought by the engine, and shown to the model until they leave."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offload.streaming.engine import Loader
from offload.streaming.gradients import StreamedGradients
from offload.streaming.packing import PackedLayer
from offload.streaming.saved import inside_backward


class Visits:
    """The layers that the model's weights show on the device now.

    Attributes:
        arena: the device buffer.
        engine: decides what is in it.
    """

    def __init__(self, layers: Sequence[PackedLayer], arena: Tensor, engine: Loader) -> None:
        self.layers = layers
        self.arena = arena
        self.engine = engine
        self._offsets: dict[int, int] = {}
        self._depth: dict[int, int] = {}  # of visits of one layer within each other
        self._num_kept_views = 0

    def begin(self, layer: int) -> None:
        """What is submitted from now on may use ``layer``."""
        self._offsets[layer] = self.engine.enter(layer)
        self._depth[layer] = self._depth.get(layer, 0) + 1
        self._num_kept_views -= self.layers[layer].num_views
        self.layers[layer].show_device(self.arena, self._offsets[layer])
        self._num_kept_views += self.layers[layer].num_views

    def end(self, layer: int) -> int | None:
        """All use of ``layer`` was submitted; the index of a weight that was changed meanwhile."""
        changed = None
        self._depth[layer] -= 1
        if self._depth[layer] == 0:
            changed = self.layers[layer].show_host()
            del self._offsets[layer]
        self.engine.leave(layer)
        return changed

    def bytes_of(self, layer: int) -> Tensor:
        """The bytes of a visiting layer."""
        offset = self._offsets[layer]
        return self.arena[offset : offset + self.layers[layer].num_bytes]

    def locate(self, byte: int) -> tuple[int, int]:
        """The visiting layer that ``byte`` of the arena belongs to, and which of its bytes it is."""
        for layer, offset in self._offsets.items():
            if offset <= byte < offset + self.layers[layer].num_bytes:
                return layer, byte - offset
        raise AssertionError(f"byte {byte} of the streaming buffer belongs to no visiting layer")

    def num_views(self) -> int:
        """How many tensors look into the arena now, but for those that layers keep from visit to visit."""
        return torch._C._storage_Use_Count(self.arena.untyped_storage()._cdata) - self._num_kept_views

    def close(self) -> None:
        """Let go of the arena. Nothing is in flight."""
        for layer in self.layers:
            layer.forget_device()
        self.arena = self.arena.new_empty(0)


class BackwardVisit:
    """The layer whose backward is being submitted: one at a time, see [Note: saved weights].

    It visits from the moment that its output's gradient, or a weight that it saved, is asked for, until another layer's
    is. Calls that recompute a forward are visits beside that, since such calls contain others (a block its experts).
    """

    def __init__(self, visits: Visits) -> None:
        self.gradients: StreamedGradients | None = None  # once something streamed is trained
        self._visits = visits
        self._layer: int | None = None
        self._is_open = False

    def bring(self, layer: int) -> Tensor:
        """The bytes of ``layer``, for work submitted before another layer is brought."""
        if not inside_backward():  # somebody looks at what a graph saved
            self._visits.begin(layer)
            copy = self._visits.bytes_of(layer).clone()
            self._visits.end(layer)
            return copy
        self.open()
        if self._layer != layer:
            self._leave()
            self._visits.begin(layer)
            self._layer = layer
        return self._visits.bytes_of(layer)

    def open(self) -> None:
        """Backward has reached streamed blocks; calling it again does nothing."""
        if not self._is_open:
            self._is_open = True
            # Runs when all of this backward() is done. Private to autograd, but what FSDP and DDP are built on.
            torch.autograd.Variable._execution_engine.queue_callback(self.close)

    def close(self) -> None:
        """All of a backward was submitted, or it failed."""
        self._leave()
        self._is_open = False
        if self.gradients is not None and self.gradients.end_backward():
            self._visits.engine.drop_all()  # an optimizer changes these weights next, perhaps behind autograd's back

    def _leave(self) -> None:
        if self._layer is not None:
            self._visits.end(self._layer)
            self._layer = None
