"""The core loop: one optimizer step as the plan says, on whatever lanes it is given.

[Note: who waits for what]
Between backward and the next forward, each wait below orders one pair of conflicting accesses:

- a gradient goes down once backward has produced it (``backward``) and its staging buffer's previous user was uploaded;
- the CPU updates a state once its gradient is on the host. A state that an earlier step updated on the device was
  flushed by then: the gradient came down the same lane, behind it;
- new parameters go up once the CPU wrote them. Backward has read the old ones by then: it came before the gradient;
- a slot is refilled once drained, with a state that was flushed;
- the device updates a slot once filled, and the slot is flushed once updated. Where updates have a lane of their own,
  it follows ``backward``, which read the old parameters and made the gradients;
- the next forward reads the parameters of a subgroup once they were written. That also keeps each gradient until it
  was read, and the next backward from writing it before.

Flushes are not waited for here: they overlap the next forward, and whoever reads the state next waits for them.
Lane order does the rest. Remove a wait, and `offload.ordering.find_hazards` names what became unordered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from offload.lanes import Event, Lane, Lanes
from offload.plan import OpKind, Plan
from offload.subgroup import Slot, Staging, Subgroup


def run_update(
    plan: Plan, subgroups: Sequence[Subgroup], slots: Sequence[Slot], stagings: Sequence[Staging], lanes: Lanes
) -> None:
    """Enqueue a whole update between backward and the next forward, in the order of the compute lane."""
    lanes = lanes.in_order()
    enqueue_update(plan, subgroups, slots, stagings, lanes, backward=lanes.compute.mark())
    for op in plan.ops:
        if op.kind in LAST_WRITES:
            await_params(subgroups[op.subgroup], lanes.compute)


# The operations that write the parameters of a subgroup; each plan has one of them for each subgroup.
LAST_WRITES = (OpKind.UPLOAD, OpKind.UPDATE_GPU, OpKind.UPDATE_RESIDENT)


def enqueue_update(
    plan: Plan,
    subgroups: Sequence[Subgroup],
    slots: Sequence[Slot],
    stagings: Sequence[Staging],
    lanes: Lanes,
    *,
    backward: Event,
    announce: Callable[[Subgroup], None] = lambda subgroup: None,
) -> None:
    """Enqueue the operations of ``plan``, each after the events it needs. See [Note: who waits for what].

    Touches no compute lane but ``lanes.update``, so that another thread may enqueue a forward pass meanwhile.

    Args:
        backward: the end of the backward pass, on the compute lane.
        announce: called as soon as a subgroup has its ``params_ready``.
    """
    lanes.update.wait(backward)
    for op in plan.ops:
        subgroup = subgroups[op.subgroup]
        if op.buffer is None:
            subgroup.params_ready = lanes.update.submit(subgroup.update_resident())
            announce(subgroup)
            continue
        if op.kind in (OpKind.PREFETCH, OpKind.UPDATE_GPU, OpKind.FLUSH):
            slot = slots[op.buffer]
        else:
            staging = stagings[op.buffer]
        match op.kind:
            case OpKind.GRAD_DOWN:
                work = subgroup.grad_down(staging)
                subgroup.grad_on_host = lanes.d2h.submit(work, after=(backward, staging.uploaded))
            case OpKind.UPDATE_CPU:
                work = subgroup.update_cpu(staging)
                subgroup.updated_on_host = lanes.host.submit(work, after=(subgroup.grad_on_host,))
            case OpKind.UPLOAD:
                work = subgroup.upload(staging)
                subgroup.params_ready = staging.uploaded = lanes.h2d.submit(work, after=(subgroup.updated_on_host,))
                announce(subgroup)
            case OpKind.PREFETCH:
                work = subgroup.prefetch(slot)
                slot.filled = lanes.h2d.submit(work, after=(slot.drained, subgroup.flushed))
            case OpKind.UPDATE_GPU:
                work = subgroup.update_gpu(slot)
                subgroup.params_ready = slot.updated = lanes.update.submit(work, after=(slot.filled,))
                announce(subgroup)
            case OpKind.FLUSH:
                work = subgroup.flush(slot)
                subgroup.flushed = slot.drained = lanes.d2h.submit(work, after=(slot.updated,))


def await_params(subgroup: Subgroup, compute: Lane) -> None:
    """Let what the compute lane does next come after the update of ``subgroup``'s parameters."""
    assert subgroup.params_ready is not None
    compute.wait(subgroup.params_ready)
