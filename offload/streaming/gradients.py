"""Gradients of streamed weights: each goes down to host memory as soon as backward has it, on a lane of its own.

Between passes ``param.grad`` is in pinned host memory, beside the weight, so that an optimizer updates both there.

[Note: gradients on their way]
- a gradient goes down once backward has produced it; its device memory is handed on when the copy is done;
- a gradient that meets an earlier one (accumulation, a block called twice) is added to it on the device, in torch's
  order and dtype, after the earlier one has arrived on the host;
- the thread that submits backward may be far ahead of the device, and what it has handed out cannot be given out again
  until the device is done with it: so it waits where gradients of more than two layers are on their way;
- backward returns when all gradients are on the host, and all copies of weights too: the optimizer may then write.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from offload.lanes import Event, Lanes, Work
from offload.lanes.accelerator import StreamLane
from offload.streaming.packing import PackedLayer


class StreamedGradients:
    """Takes the gradients of streamed weights off the device.

    Args:
        allocate: host memory for the gradients of a layer, uint8, of so many bytes.
        on_gradient: called when a backward has the first of them, and later ones.
    """

    def __init__(
        self,
        layers: Sequence[PackedLayer],
        lanes: Lanes,
        allocate: Callable[[int], Tensor],
        on_gradient: Callable[[], None],
    ) -> None:
        self._lanes = lanes
        self._on_gradient = on_gradient
        self._earlier: dict[int, Tensor] = {}  # gradients on the host that the present one is added to
        self._arrived: dict[int, Event] = {}  # of this backward
        self._on_their_way: deque[tuple[Event, int]] = deque()  # and how many bytes, the oldest first
        self._most_bytes = 2 * max((layer.num_bytes for layer in layers), default=0)
        self._params: list[Tensor] = []
        self._homes: list[Tensor] = []
        self._handles: list[RemovableHandle] = []
        for layer in layers:
            if not any(tensor.requires_grad for tensor in layer.tensors):
                continue
            for param, home in zip(layer.tensors, layer.packing.views(allocate(layer.num_bytes)), strict=True):
                if param.requires_grad:
                    index = len(self._params)
                    self._params.append(param)
                    self._homes.append(home)
                    self._handles += _hooked(self, index, param)

    def covers(self, layers: Sequence[PackedLayer]) -> bool:
        """Whether every weight that is trained now has its place."""
        known = {id(param) for param in self._params}
        return all(id(t) in known for layer in layers for t in layer.tensors if t.requires_grad)

    def before(self, index: int, grad: Tensor) -> None:
        """``grad`` is about to be accumulated. What is on the host is put aside: it is on another device."""
        self._on_gradient()
        param = self._params[index]
        if param.grad is not None and param.grad.device != grad.device:
            self._earlier[index] = param.grad
            param.grad = None

    @torch.no_grad()
    def take(self, index: int, param: Tensor) -> None:
        """``param.grad`` is new: send it down, and show where it will be."""
        grad, home = param.grad, self._homes[index]
        assert grad is not None
        earlier = self._earlier.pop(index, None)
        if earlier is not None:
            if index in self._arrived:
                self._lanes.compute.wait(self._arrived[index])
            grad = earlier.to(grad.device, non_blocking=True).add_(grad)
        work = Work("gradient", partial(_copy, home, grad), num_bytes=home.numel() * home.itemsize)
        self._arrived[index] = self._lanes.d2h.submit(work, after=(self._lanes.compute.mark(),))
        if isinstance(self._lanes.d2h, StreamLane):
            grad.record_stream(self._lanes.d2h.stream)
        self._show(param, home)
        self._on_their_way.append((self._arrived[index], grad.nbytes))
        while sum(num_bytes for _, num_bytes in self._on_their_way) > self._most_bytes:
            self._on_their_way.popleft()[0].synchronize()

    @staticmethod
    def _show(param: Tensor, home: Tensor) -> None:
        """Assign ``param.grad``, which torch allows only where weight and gradient are on one device."""
        visiting = param.data
        param.data = home
        param.grad = home
        param.data = visiting

    def end_backward(self) -> bool:
        """Wait for the gradients of this backward; whether there were any."""
        if not self._arrived:
            return False
        self._lanes.d2h.mark().synchronize()
        self._lanes.h2d.mark().synchronize()
        self._arrived.clear()
        self._on_their_way.clear()
        self._earlier.clear()
        return True

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _hooked(owner: StreamedGradients, index: int, param: Tensor) -> list[RemovableHandle]:
    """Call ``owner`` before a gradient of ``param`` is accumulated, and afterwards.

    The hooks do not keep their owner alive: it holds the parameters, and the collector does not see through autograd's
    side of that circle.
    """
    reference = weakref.ref(owner)

    def before(grad: Tensor) -> None:
        if (found := reference()) is not None:
            found.before(index, grad)

    def after(param: Tensor) -> None:
        if (found := reference()) is not None:
            found.take(index, param)

    return [
        param.register_hook(before),  # type: ignore[no-untyped-call]
        param.register_post_accumulate_grad_hook(after),  # type: ignore[no-untyped-call]
    ]


def _copy(home: Tensor, grad: Tensor) -> None:
    home.copy_(grad, non_blocking=True)
