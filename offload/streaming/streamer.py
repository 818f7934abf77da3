"""What happens around the calls of a model that streams: forward, backward and recomputation."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from offload.lanes import Lane, Lanes
from offload.streaming.blocks import Block
from offload.streaming.engine import Engine
from offload.streaming.gradients import StreamedGradients
from offload.streaming.packing import PackedLayer
from offload.streaming.progress import Progress
from offload.streaming.saved import SavedTensorHooks, inside_backward
from offload.streaming.wrapping import Untraced


class Streamer:
    """Runs the engine around the calls of a model's streamed blocks, in forward, backward and recomputation."""

    def __init__(
        self,
        blocks: Sequence[Block],
        layers: Sequence[PackedLayer],
        arena: Tensor,
        engine: Engine,
        lanes: Lanes,
        *,
        before_pass: Callable[[], None],
        progress: Progress | None,
    ) -> None:
        self.before_pass = before_pass
        self.gradients: StreamedGradients | None = None  # once something streamed is trained
        self.progress = progress
        self._blocks = blocks
        self._layers = layers
        self._arena = arena
        self._engine = engine
        self.hooks = SavedTensorHooks(arena, self._locate, self._bring_for_backward)
        self._offsets: dict[int, int] = {}  # of layers entered and not left
        self.calls: list[_Call] = []  # of streamed blocks, not returned yet
        self._depth = 0  # of calls of the model and the modules around blocks
        self._is_backward_open = False
        self._in_backward: int | None = None  # the layer whose backward is being submitted
        # Copies in flight use the arena and the slabs; at exit the device's own teardown waits.
        weakref.finalize(self, _wait_for_copies, lanes.h2d, lanes.d2h).atexit = False

    # ---- around calls

    def around_model(self) -> Untraced:
        """Around the model, and modules of it that contain blocks: the outermost of these calls is a pass."""
        return Untraced(self._enter_model, self._leave_model)

    def around_block(self, layer: int) -> Untraced:
        call = _Call(self, layer)
        return Untraced(call.enter, call.leave)

    def _enter_model(self) -> None:
        if self._depth == 0 and not inside_backward():
            self.end_backward()  # of a backward that failed
            self.before_pass()
            self._engine.begin_pass(training=torch.is_grad_enabled(), wraps=not self.trains())
            if self.progress is not None:
                self.progress.begin_pass()
        self._depth += 1  # last: a call that is refused above is not left

    def _leave_model(self, error: BaseException | None) -> None:
        self._depth -= 1
        if self._depth == 0 and not inside_backward():
            if error is not None:
                self._engine.order.abandon_pass()
            if self.progress is not None:
                self.progress.end_pass()

    def trains(self) -> bool:
        """Whether a backward of what is called now has gradients for streamed weights."""
        return torch.is_grad_enabled() and any(t.requires_grad for layer in self._layers for t in layer.tensors)

    # ---- layers

    def enter(self, layer: int) -> None:
        """Bring a layer whose block is called, and let the block's weights point there."""
        if self.progress is not None:
            self.progress.note()
        if inside_backward():
            self._bring_for_backward(layer)
        else:
            self._offsets[layer] = self._engine.enter(layer)
        self._layers[layer].show_device(self._arena, self._offsets[layer])

    def leave(self, layer: int) -> str | None:
        """Take the layer out of use; the name of a weight that the call changed."""
        changed = None
        is_over = not any(call.layer == layer for call in self.calls)  # or it was called from within itself
        if is_over:
            index = self._layers[layer].show_host()
            changed = None if index is None else self._blocks[layer].weights[index].name
        if not inside_backward():
            self._engine.leave(layer)
            if is_over:
                del self._offsets[layer]
        return changed

    def num_views(self) -> int:
        """How many tensors look into the streaming buffer now."""
        return torch._C._storage_Use_Count(self._arena.untyped_storage()._cdata)

    def check_call(self, layer: int, num_leaked: int, changed: str | None) -> None:
        """Raise RuntimeError where a call did what streaming would silently get wrong."""
        name = self._blocks[layer].name
        remedy = f"keep the block on the device with resident=[{name!r}, ...]"
        if changed is not None:
            raise RuntimeError(
                f"block {name!r} changed its weight {changed} in place while it ran: the change would be lost with the "
                f"block's copy on the device; {remedy}"
            )
        if num_leaked > 0:
            raise RuntimeError(
                f"{num_leaked} tensors over weights of block {name!r} outlive its call, and their bytes are about to "
                f"hold another block's weights: return or store a clone, use ctx.save_for_backward in autograd "
                f"functions, or {remedy}"
            )

    def _locate(self, byte: int) -> tuple[int, int]:
        for layer, offset in self._offsets.items():
            if offset <= byte < offset + self._layers[layer].num_bytes:
                return layer, byte - offset
        raise AssertionError(f"byte {byte} of the streaming buffer belongs to no layer in use")

    def _bring_for_backward(self, layer: int) -> Tensor:
        """The bytes of ``layer`` on the device, for backward work submitted before another layer is brought."""
        size = self._layers[layer].num_bytes
        if not inside_backward():  # somebody looks at what a graph saved
            offset = self._engine.enter(layer)
            copy = self._arena[offset : offset + size].clone()
            self._engine.leave(layer)
            return copy
        self.begin_backward()
        if self._in_backward != layer:
            self._leave_backward()
            self._offsets[layer] = self._engine.enter(layer)
            self._in_backward = layer
        offset = self._offsets[layer]
        return self._arena[offset : offset + size]

    def begin_backward(self) -> None:
        """Backward has reached streamed blocks; calling it again does nothing."""
        if not self._is_backward_open:
            self._is_backward_open = True
            # Runs when all of this backward() is done. Private to autograd, but what FSDP and DDP are built on.
            torch.autograd.Variable._execution_engine.queue_callback(self.end_backward)

    def _leave_backward(self) -> None:
        if self._in_backward is not None:
            self._engine.leave(self._in_backward)
            del self._offsets[self._in_backward]
            self._in_backward = None

    def end_backward(self) -> None:
        """All of a backward was submitted, or it failed."""
        self._leave_backward()
        self._is_backward_open = False
        if self.gradients is not None and self.gradients.end_backward():
            self._engine.drop_all()  # an optimizer changes these weights next, perhaps behind autograd's back

    def close(self) -> None:
        """Let go of the device buffer. Nothing is in flight."""
        if self.progress is not None:
            self.progress.close()
        if self.gradients is not None:
            self.gradients.remove()
        for layer in self._layers:
            layer.forget_device()
        self._arena = self._arena.new_empty(0)


class _Call:
    """One call of a streamed block."""

    def __init__(self, streamer: Streamer, layer: int) -> None:
        self.layer = layer
        self._streamer = streamer
        self._num_views = 0
        self._hooks: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

    def enter(self) -> None:
        streamer = self._streamer
        streamer.enter(self.layer)
        streamer.calls.append(self)
        self._hooks = streamer.hooks.context() if torch.is_grad_enabled() else contextlib.nullcontext()
        self._hooks.__enter__()
        self._num_views = streamer.num_views()

    def leave(self, error: BaseException | None) -> None:
        streamer = self._streamer
        self._hooks.__exit__(None, None, None)
        num_views = streamer.num_views()
        streamer.calls.remove(self)
        changed = streamer.leave(self.layer)
        if error is None:  # a traceback holds the views of the frames it passed
            streamer.check_call(self.layer, num_views - self._num_views, changed)


def _wait_for_copies(*lanes: Lane) -> None:
    for lane in lanes:
        lane.mark().synchronize()
