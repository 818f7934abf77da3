"""The core loop: one optimizer step as the plan says, on whatever lanes it is given.

[Note: who waits for what]
Between backward and the next forward, each wait below orders one pair of conflicting accesses:

- a gradient goes down once backward has produced it (``grads_ready``) and its staging buffer's previous user was
  uploaded;
- the CPU updates a state once its gradient is on the host. A state that an earlier step updated on the device was
  flushed by then: the gradient came down the same lane, behind it;
- new parameters go up once the CPU wrote them. Backward has read the old ones by then: it came before the gradient, or
  was waited for where that came down early;
- a slot is refilled once drained, with a state that was flushed;
- the device updates a slot once filled, and the slot is flushed once updated. Where updates have a lane of their own,
  it follows ``grads_ready`` too: that part of backward read the old parameters and made the gradients;
- the next forward reads the parameters of a subgroup once they were written. That also keeps each gradient until it
  was read, and the next backward from writing it before.

Flushes are not waited for here: they overlap the next forward, and whoever reads the state next waits for them.
Lane order does the rest. Remove a wait, and `offload.ordering.find_hazards` names what became unordered.

[Note: early transfers]
A prefetch or a gradient that is the first in its buffer needs nothing that the update does, so it may be enqueued while
backward still runs: :func:`enqueue_early`. The update itself then goes without these operations.

[Note: updates in backward]
Where gradients are final when backward has made them (no clipping, no accumulation after it), each subgroup's update
may follow its own gradients instead of the whole backward pass: :func:`enqueue_in_backward`. A gradient is final once
autograd has accumulated it, and by then every layer that gives it a share has read the parameter.

[Note: a slot less]
Where the device has no memory left when a state should go into its slot, nothing was changed yet: the slot's memory is
given back, and what has not begun takes another slot or is updated on the CPU. The bits are the same anywhere. Who owns
the slots sees afterwards that one has no buffer any more, and plans with fewer from then on.

[Note: passing slots]
Backward gives memory back, of activations. A passing slot has some of it, from :func:`lend` within backward until the
update is enqueued; then the allocator may hand it on, once the transfers through it are done. What comes up into it
waits for all that the compute lane did in that memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from offload.lanes import Event, Lane, Lanes
from offload.plan import Op, OpKind, Plan
from offload.shrink import without_slot
from offload.subgroup import Slot, Staging, Subgroup

# The operations that write the parameters of a subgroup; each plan has one of them for each subgroup.
LAST_WRITES = (OpKind.UPLOAD, OpKind.UPDATE_GPU, OpKind.UPDATE_RESIDENT)

GradsReady = Callable[[Subgroup], Event]


def run_update(
    plan: Plan,
    subgroups: Sequence[Subgroup],
    slots: Sequence[Slot],
    stagings: Sequence[Staging],
    lanes: Lanes,
    *,
    begun: Collection[Op] = (),
) -> None:
    """Enqueue a whole update between backward and the next forward, in the order of the compute lane.

    ``begun`` are the operations that :func:`enqueue_early` enqueued.
    """
    lanes = lanes.in_order()
    enqueue_update(plan, subgroups, slots, stagings, lanes, backward=lanes.compute.mark(), begun=begun)
    for op in plan.ops:
        if op.kind in LAST_WRITES:
            await_params(subgroups[op.subgroup], lanes.compute)


def enqueue_update(
    plan: Plan,
    subgroups: Sequence[Subgroup],
    slots: Sequence[Slot],
    stagings: Sequence[Staging],
    lanes: Lanes,
    *,
    backward: Event,
    begun: Collection[Op] = (),
    announce: Callable[[Subgroup], None] = lambda subgroup: None,
) -> None:
    """Enqueue the operations of ``plan``, each after the events it needs. See [Note: who waits for what].

    Touches no compute lane but ``lanes.update``, so that another thread may enqueue a forward pass meanwhile.

    Args:
        backward: the end of the backward pass, on the compute lane.
        begun: operations that were enqueued already.
        announce: called as soon as a subgroup has its ``params_ready``.
    """
    if begun:
        lanes.h2d.wait(backward)
    grads_ready: GradsReady = lambda subgroup: backward  # noqa: E731
    enqueue_in_backward(
        plan, subgroups, slots, stagings, lanes, grads_ready=grads_ready, begun=begun, announce=announce
    )


def enqueue_in_backward(
    plan: Plan,
    subgroups: Sequence[Subgroup],
    slots: Sequence[Slot],
    stagings: Sequence[Staging],
    lanes: Lanes,
    *,
    grads_ready: GradsReady,
    begun: Collection[Op] = (),
    announce: Callable[[Subgroup], None] = lambda subgroup: None,
) -> None:
    """As :func:`enqueue_update`, where each subgroup follows its own gradients. See [Note: updates in backward].

    Args:
        grads_ready: gives the end of a subgroup's gradients on the compute lane. May block the calling thread until
            backward has made them, so the plan has to take subgroups in the order in which that happens.
    """
    ops = [op for op in plan.ops if op not in begun]
    touched = {op.subgroup for op in begun}
    for position, op in enumerate(ops):  # whose rest may be replaced below
        subgroup = subgroups[op.subgroup]
        try:
            if op.kind in (OpKind.UPDATE_GPU, OpKind.UPDATE_RESIDENT):
                lanes.update.wait(grads_ready(subgroup))
            _enqueue(op, subgroup, slots, stagings, lanes, grads_ready=grads_ready)
        except torch.OutOfMemoryError:
            if op.kind is not OpKind.PREFETCH:
                raise
            # See [Note: a slot less].
            assert op.buffer is not None
            slots[op.buffer].buffer = None
            usable = [slot.index for slot in slots if slot.buffer is not None]
            instead = without_slot(ops, position, begun=touched, slots=usable, num_staging=len(stagings))
            if instead is None:
                raise
            ops[position + 1 :] = instead
            continue
        touched.add(op.subgroup)
        if op.kind in LAST_WRITES:
            announce(subgroup)
    for slot in slots:
        if slot.passes:  # see [Note: passing slots]
            slot.buffer = None


def early_operations(plan: Plan) -> list[Op]:
    """The operations of ``plan`` that need no update to come first; see [Note: early transfers]."""
    used, early = set(), []
    for op in plan.ops:
        buffer = (op.kind in (OpKind.GRAD_DOWN, OpKind.UPDATE_CPU, OpKind.UPLOAD), op.buffer)
        if op.kind in (OpKind.GRAD_DOWN, OpKind.PREFETCH) and buffer not in used:
            early.append(op)
        used.add(buffer)
    return early


def enqueue_early(
    op: Op,
    subgroups: Sequence[Subgroup],
    slots: Sequence[Slot],
    stagings: Sequence[Staging],
    lanes: Lanes,
    *,
    grads_ready: Event,
) -> None:
    """Enqueue one of the :func:`early_operations`; ``grads_ready`` is the end of its gradient on the compute lane."""
    _enqueue(op, subgroups[op.subgroup], slots, stagings, lanes, grads_ready=lambda subgroup: grads_ready)


def lend(slot: Slot, buffer: Tensor | None, compute: Lane) -> None:
    """Let a passing slot have memory that the compute lane has done with; see [Note: passing slots]."""
    slot.buffer = buffer
    slot.drained = compute.mark()


def _enqueue(
    op: Op,
    subgroup: Subgroup,
    slots: Sequence[Slot],
    stagings: Sequence[Staging],
    lanes: Lanes,
    *,
    grads_ready: GradsReady,
) -> None:
    if op.buffer is None:
        subgroup.params_ready = lanes.update.submit(subgroup.update_resident())
        return
    if op.kind in (OpKind.PREFETCH, OpKind.UPDATE_GPU, OpKind.FLUSH):
        slot = slots[op.buffer]
    else:
        staging = stagings[op.buffer]
    match op.kind:
        case OpKind.GRAD_DOWN:
            work = subgroup.grad_down(staging)
            subgroup.grad_on_host = lanes.d2h.submit(work, after=(grads_ready(subgroup), staging.uploaded))
        case OpKind.UPDATE_CPU:
            work = subgroup.update_cpu(staging)
            subgroup.updated_on_host = lanes.host.submit(work, after=(subgroup.grad_on_host,))
        case OpKind.UPLOAD:
            work = subgroup.upload(staging)
            subgroup.params_ready = staging.uploaded = lanes.h2d.submit(work, after=(subgroup.updated_on_host,))
        case OpKind.PREFETCH:
            work = subgroup.prefetch(slot)
            slot.filled = lanes.h2d.submit(work, after=(slot.drained, subgroup.flushed))
        case OpKind.UPDATE_GPU:
            work = subgroup.update_gpu(slot)
            subgroup.params_ready = slot.updated = lanes.update.submit(work, after=(slot.filled,))
        case OpKind.FLUSH:
            work = subgroup.flush(slot)
            subgroup.flushed = slot.drained = lanes.d2h.submit(work, after=(slot.updated,))


def await_params(subgroup: Subgroup, compute: Lane) -> None:
    """Let what the compute lane does next come after the update of ``subgroup``'s parameters."""
    assert subgroup.params_ready is not None
    compute.wait(subgroup.params_ready)
