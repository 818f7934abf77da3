"""The part of an update that begins while backward still runs: states that come up, gradients that go down.

A gradient goes down when the last backward pass before a step has produced it. How many passes a step has is what the
step before had; a gradient that changes after it went down (another pass, clipping in place, unscaling) goes down
again, as far as autograd's version counter sees the change, which is helped where it does not
(:mod:`offload.watched`). It sees neither ``grad.data`` nor extensions nor a reduction over ranks, so gradients come
early only where that was asked for; states may in any case.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle, unserializable_hook

from offload.adam import AdamSubgroup, flat
from offload.executor import early_operations, enqueue_early
from offload.gradients import Fingerprint, fingerprints_of
from offload.lanes import Event, Lanes
from offload.plan import Op, OpKind, Plan
from offload.pool import Pool
from offload.subgroup import Slot, Subgroup
from offload.watched import unwatch, watch

Hook = weakref.WeakMethod[Any]  # of a subgroup's index and a parameter's position in it


class EarlyTransfers:
    """What was enqueued early for the next step, and what it was.

    Args:
        actions: of all subgroups; more may join.
        with_gradients: gradients come down early too.
    """

    def __init__(self, lanes: Lanes, pool: Pool, actions: Sequence[AdamSubgroup], *, with_gradients: bool) -> None:
        self._lanes = lanes
        self._pool = pool
        self._actions = actions
        self._with_gradients = with_gradients
        self._num_arrived: Counter[int] = Counter()  # gradients of each subgroup since the last step
        self._num_expected: Counter[int] = Counter()  # of one step
        self._begun: dict[Op, tuple[Fingerprint, ...]] = {}  # and the gradients that went down, none for a prefetch
        self._watched: list[Tensor] = []
        self._copied: list[tuple[Event, list[Tensor]]] = []  # gradients that nothing is ordered after yet
        self._backward_id: int | None = None  # autograd's number of the pass that made them

    def arrived(self, subgroup: Subgroup, plan: Plan, subgroups: Sequence[Subgroup], *, in_autograd: bool) -> None:
        """A gradient of ``subgroup`` was accumulated. Enqueues what can be of ``plan``, the next step's.

        ``in_autograd``: by autograd, in whose backward pass this is. Others call :meth:`await_copy` before they change
        the gradient.
        """
        is_first = not self._num_arrived
        self._num_arrived[subgroup.index] += 1
        if is_first:
            self.prefetch(plan, subgroups)
        if not self._with_gradients or self._num_arrived[subgroup.index] != self._num_expected[subgroup.index]:
            return
        grads = self._grads_now(subgroup.index)
        for op in early_operations(plan):
            if grads and op.kind is OpKind.GRAD_DOWN and op.subgroup == subgroup.index:
                self._enqueue(op, subgroups, grads)
                if in_autograd:
                    self._await_copy_at_end(subgroup, self._watch(subgroup.index))

    def prefetch(self, plan: Plan, subgroups: Sequence[Subgroup]) -> None:
        """Let states come up into the slots that have memory, as far as ``plan`` allows it and that is not done."""
        for op in early_operations(plan):
            if op.kind is OpKind.PREFETCH and op not in self._begun:
                assert op.buffer is not None
                if self._pool.slots[op.buffer].buffer is not None:
                    self._enqueue(op, subgroups)

    def leave(self, slots: Collection[Slot]) -> None:
        """What came up into ``slots`` does not count, as their memory goes back."""
        indices = {slot.index for slot in slots}
        for op in [op for op in self._begun if op.kind is OpKind.PREFETCH and op.buffer in indices]:
            del self._begun[op]
            self._await_prefetch(op)

    def _await_prefetch(self, op: Op) -> None:
        """The CPU may update a state that a copy, which does not count, still reads: let it wait for that."""
        assert op.buffer is not None
        filled = self._pool.slots[op.buffer].filled
        assert filled is not None
        self._lanes.host.wait(filled)

    def _await_copy_at_end(self, subgroup: Subgroup, grads: list[Tensor]) -> None:
        """What is done to gradients once this backward pass is over comes after their copies.

        Where the pass fails, autograd tells nobody: their memory is kept until another one or ``zero_grad()``.
        """
        assert subgroup.grad_on_host is not None
        # Private to autograd, but what FSDP, DDP and activation checkpointing are built on.
        if (backward_id := torch._C._current_graph_task_id()) != self._backward_id:
            self._backward_id = backward_id
            torch.autograd.Variable._execution_engine.queue_callback(self.gradients_may_change)
        self._copied.append((subgroup.grad_on_host, grads))

    def await_copy(self, subgroup: Subgroup) -> None:
        """Let what the compute lane does next to the gradient of ``subgroup`` come after its copy, if it has begun."""
        if any(op.kind is OpKind.GRAD_DOWN and op.subgroup == subgroup.index for op in self._begun):
            assert subgroup.grad_on_host is not None
            self._lanes.compute.wait(subgroup.grad_on_host)

    def _enqueue(self, op: Op, subgroups: Sequence[Subgroup], fingerprints: tuple[Fingerprint, ...] = ()) -> None:
        slots, stagings, lanes = self._pool.slots, self._pool.stagings, self._lanes
        try:
            enqueue_early(op, subgroups, slots, stagings, lanes, grads_ready=lanes.compute.mark())
        except torch.OutOfMemoryError:
            if op.kind is not OpKind.PREFETCH:
                raise
            return  # nothing is lost: the step tries again, and goes on with fewer slots if it must
        self._begun[op] = fingerprints

    def _watch(self, index: int) -> list[Tensor]:
        grads = [grad for item in self._actions[index].slices if (grad := item.param.grad) is not None]
        for grad in grads:
            watch(grad)
        self._watched += grads
        return grads

    def gradients_may_change(self) -> None:
        """Let what the compute lane does next to gradients, or in their memory, come after the copies of them."""
        for event, _ in self._copied:
            self._lanes.compute.wait(event)
        self._copied.clear()

    def _grads_now(self, index: int) -> tuple[Fingerprint, ...]:
        """What the gradients of a subgroup are, whose actions are told of them."""
        grads = [(item, item.param.grad) for item in self._actions[index].slices]
        there = [(item, grad.detach()) for item, grad in grads if grad is not None]
        self._actions[index].begin_gradients([(item, grad.reshape(-1), flat(item.param)) for item, grad in there])
        return fingerprints_of([grad for _, grad in there])

    def take(self, plan: Plan) -> Collection[Op]:
        """The operations of ``plan`` that its update goes without. The next step starts anew."""
        for grad in self._watched:
            unwatch(grad)
        self._watched = []
        can_be = set(early_operations(plan))
        for op, fingerprints in list(self._begun.items()):
            if op.kind is OpKind.GRAD_DOWN and (op not in can_be or fingerprints != self._grads_now(op.subgroup)):
                del self._begun[op]
        for op in self._begun.keys() - can_be:
            self._await_prefetch(op)
        begun = self._begun.keys() & can_be
        self._num_expected, self._num_arrived = self._num_arrived, Counter()
        self._begun = {}
        return begun

    def forget(self) -> None:
        """States may change: nothing that was enqueued counts. The caller waits until it is done."""
        self._begun = {}


def watch_gradients(index: int, params: Sequence[Tensor], arrived: Hook) -> Iterator[RemovableHandle]:
    """Call ``arrived`` after each accumulation of one of these gradients, as long as it is there.

    It is given ``index`` and the parameter's position. The garbage collector does not see what such a hook refers to:
    it must not lead back to the parameter.
    """

    def hook_of(position: int) -> Callable[[Tensor], None]:
        @unserializable_hook  # type: ignore[untyped-decorator]
        def call(_: Tensor) -> None:
            if (method := arrived()) is not None:
                method(index, position)

        return call  # type: ignore[no-any-return]

    for position, param in enumerate(params):
        if param.requires_grad:
            yield param.register_post_accumulate_grad_hook(hook_of(position))  # type: ignore[no-untyped-call]
