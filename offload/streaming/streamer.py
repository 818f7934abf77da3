"""What happens around the calls of a model that streams: forward, backward and recomputation."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

from offload.lanes import Lane, Lanes
from offload.streaming.blocks import Block
from offload.streaming.engine import Loader
from offload.streaming.packing import PackedLayer
from offload.streaming.progress import Progress
from offload.streaming.saved import SavedTensorHooks, inside_backward
from offload.streaming.visits import BackwardVisit, Visits
from offload.streaming.wrapping import Untraced


class Streamer:
    """Runs the engine around the calls of a model's streamed blocks, in forward, backward and recomputation."""

    def __init__(
        self,
        blocks: Sequence[Block],
        layers: Sequence[PackedLayer],
        arena: Tensor,
        engine: Loader,
        lanes: Lanes,
        *,
        before_pass: Callable[[], None],
        progress: Progress | None,
    ) -> None:
        self.before_pass = before_pass
        self.progress = progress
        self.visits = Visits(layers, arena, engine)
        self.backward = BackwardVisit(self.visits)
        self.hooks = SavedTensorHooks(arena, self.visits.locate, self.backward.bring)
        self._blocks = blocks
        self._layers = layers
        self._engine = engine
        self._depth = 0  # of calls of the model and the modules around blocks
        # Copies in flight use the arena and the slabs; at exit the device's own teardown waits.
        weakref.finalize(self, _wait_for_copies, lanes.h2d, lanes.d2h).atexit = False

    # ---- around calls

    def around_model(self) -> Untraced:
        """Around the model, and modules of it that contain blocks: the outermost of these calls is a pass."""
        return Untraced(self._enter_model, self._leave_model)

    def around_block(self, layer: int) -> Untraced:
        call = _Call(self, layer)
        return Untraced(call.enter, call.leave, call.returned)

    def _enter_model(self) -> None:
        if self._depth == 0 and not inside_backward():
            self.backward.close()  # of one that failed
            self.before_pass()
            self._engine.begin_pass(training=torch.is_grad_enabled(), wraps=not self.trains())
            if self.progress is not None:
                self.progress.begin_pass()
        self._depth += 1  # last: a call that is refused above is not left

    def _leave_model(self, error: BaseException | None) -> None:
        self._depth -= 1
        if self._depth == 0 and not inside_backward():
            if error is not None:
                self._engine.abandon_pass()
            if self.progress is not None:
                self.progress.end_pass()

    def saving(self) -> contextlib.AbstractContextManager[Any]:
        """Around what uses streamed weights: what autograd saves of them is packed, see [Note: saved weights]."""
        return self.hooks.context() if torch.is_grad_enabled() else contextlib.nullcontext()

    def trains(self) -> bool:
        """Whether a backward of what is called now has gradients for streamed weights."""
        return torch.is_grad_enabled() and any(t.requires_grad for layer in self._layers for t in layer.tensors)

    def check_call(self, layer: int, num_leaked: int, changed: int | None) -> None:
        """Raise RuntimeError where a call did what streaming would silently get wrong."""
        block = self._blocks[layer]
        remedy = f"keep the block on the device with resident=[{block.name!r}, ...]"
        if changed is not None:
            raise RuntimeError(
                f"block {block.name!r} changed its weight {block.weights[changed].name} in place while it ran: the "
                f"change would be lost with the block's copy on the device; {remedy}"
            )
        if num_leaked > 0:
            raise RuntimeError(
                f"{num_leaked} tensors over weights of block {block.name!r} outlive its call, and their bytes are "
                f"about to hold another block's weights: return or store a clone, use ctx.save_for_backward in "
                f"autograd functions, or {remedy}"
            )

    def close(self) -> None:
        """Let go of the device buffer. Nothing is in flight."""
        if self.progress is not None:
            self.progress.close()
        if self.backward.gradients is not None:
            self.backward.gradients.remove()
        self.visits.close()


class _Call:
    """One call of a streamed block, in forward or in a recomputation."""

    def __init__(self, streamer: Streamer, layer: int) -> None:
        self._streamer = streamer
        self._layer = layer
        self._num_views = 0
        self._is_recomputation = False
        self._hooks: contextlib.AbstractContextManager[Any]

    def enter(self) -> None:
        streamer = self._streamer
        self._is_recomputation = inside_backward()
        if self._is_recomputation:
            streamer.backward.bring(self._layer)  # and it stays for the backward that follows
        elif streamer.progress is not None and self._layer < streamer.progress.num_layers:
            streamer.progress.note()
        streamer.visits.begin(self._layer)
        self._hooks = streamer.saving()
        self._hooks.__enter__()
        self._num_views = streamer.visits.num_views()

    def returned(self, output: Any) -> Any:
        """See to it that the layer is there when backward comes to what ``output`` was computed from."""
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if outputs and not self._is_recomputation:
            register_multi_grad_hook(outputs, self._backward_begins, mode="any")
        return output

    def _backward_begins(self, grad: Tensor) -> None:
        self._streamer.backward.bring(self._layer)

    def leave(self, error: BaseException | None) -> None:
        streamer = self._streamer
        self._hooks.__exit__(None, None, None)
        num_leaked = streamer.visits.num_views() - self._num_views
        changed = streamer.visits.end(self._layer)
        if error is None and not self._is_recomputation:  # a traceback holds the views of the frames it passed
            streamer.check_call(self._layer, num_leaked, changed)


def _wait_for_copies(*lanes: Lane) -> None:
    for lane in lanes:
        lane.mark().synchronize()
