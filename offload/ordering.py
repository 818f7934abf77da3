"""Proof that the executor's waits order every conflicting access of a plan."""

from __future__ import annotations

from collections.abc import Sequence

from offload.executor import (
    await_params,
    early_operations,
    enqueue_early,
    enqueue_in_backward,
    enqueue_update,
    lend,
    run_update,
)
from offload.lanes import Event, Lanes, Work
from offload.lanes.ordering import AccessHistory, ordering_lanes
from offload.plan import OpKind, Placement, Plan, PlanError
from offload.subgroup import Slot, Staging, Subgroup


def find_hazards(
    plans: Sequence[Plan], subgroups: Sequence[Subgroup], *, overlapped: bool = False, num_passing_slots: int = 0
) -> list[str]:
    """Run ``plans``, one step each with a backward before and a forward after, and name what no wait orders.

    Args:
        overlapped: each update runs beside the next forward, which waits for a subgroup where it reads that, and what
            may be enqueued early is enqueued in backward.
        num_passing_slots: of the slots, the last, whose memory the last layer's backward uses before.

    Returns:
        One sentence for each pair of conflicting accesses that may run in either order; empty if there is none.
    """
    subgroups = [subgroup.sizes_only() for subgroup in subgroups]
    slots = [Slot(i) for i in range(max((plan.num_buffers(Placement.DEVICE) for plan in plans), default=0))]
    stagings = [Staging(i) for i in range(max((plan.num_buffers(Placement.HOST) for plan in plans), default=0))]
    history = AccessHistory()
    lanes = ordering_lanes(history)
    for plan in plans:
        _submit_forward(subgroups, lanes, overlapped)
        begun = early_operations(plan) if overlapped else []
        up = {op.buffer: op for op in begun if op.kind is OpKind.PREFETCH}
        down = {op.subgroup: op for op in begun if op.kind is OpKind.GRAD_DOWN}
        passing = slots[len(slots) - num_passing_slots :]
        for slot in passing:
            if slot.drained is not None:
                lanes.compute.wait(slot.drained)  # as the allocator hands memory on
        for slot in slots:
            if slot.index in up and slot not in passing:
                op = up[slot.index]
                enqueue_early(op, subgroups, slots, stagings, lanes, grads_ready=lanes.compute.mark())
        lanes.compute.submit(Work("backward", writes=tuple(slot.name for slot in passing)))
        for slot in passing:
            lend(slot, None, lanes.compute)
            if slot.index in up:
                op = up[slot.index]
                enqueue_early(op, subgroups, slots, stagings, lanes, grads_ready=lanes.compute.mark())
        for subgroup in reversed(subgroups):
            lanes.compute.submit(Work("backward", reads=(subgroup.param_name,), writes=(subgroup.grad_name,)))
            if subgroup.index in down:
                op = down[subgroup.index]
                enqueue_early(op, subgroups, slots, stagings, lanes, grads_ready=lanes.compute.mark())
        # Whatever backward reads last: parameters that a tied or recomputed layer shares.
        lanes.compute.submit(Work("backward", reads=tuple(subgroup.param_name for subgroup in subgroups)))
        if overlapped:
            enqueue_update(plan, subgroups, slots, stagings, lanes, backward=lanes.compute.mark(), begun=begun)
        else:
            run_update(plan, subgroups, slots, stagings, lanes)
    _submit_forward(subgroups, lanes, overlapped)
    return history.hazards


def find_hazards_in_backward(plans: Sequence[Plan], subgroups: Sequence[Subgroup]) -> list[str]:
    """As :func:`find_hazards` where each subgroup is updated as soon as backward has made its gradients.

    Backward makes them from the last subgroup to the first. ``plans`` may take them in any order: what comes before its
    gradients waits for them.
    """
    subgroups = [subgroup.sizes_only() for subgroup in subgroups]
    slots = [Slot(i) for i in range(max((plan.num_buffers(Placement.DEVICE) for plan in plans), default=0))]
    stagings = [Staging(i) for i in range(max((plan.num_buffers(Placement.HOST) for plan in plans), default=0))]
    history = AccessHistory()
    lanes = ordering_lanes(history)
    for plan in plans:
        _submit_forward(subgroups, lanes, overlapped=True)
        to_come, made = list(subgroups), dict[int, Event]()

        def grads_ready(subgroup: Subgroup, to_come: list[Subgroup] = to_come, made: dict[int, Event] = made) -> Event:
            while subgroup.index not in made:
                each = to_come.pop()
                lanes.compute.submit(Work("backward", reads=(each.param_name,), writes=(each.grad_name,)))
                made[each.index] = lanes.compute.mark()
            return made[subgroup.index]

        enqueue_in_backward(plan, subgroups, slots, stagings, lanes, grads_ready=grads_ready)
        for subgroup in reversed(to_come):
            grads_ready(subgroup)
    _submit_forward(subgroups, lanes, overlapped=True)
    return history.hazards


def _submit_forward(subgroups: Sequence[Subgroup], lanes: Lanes, overlapped: bool) -> None:
    """A forward pass, which waits where an update runs beside it."""
    for subgroup in subgroups:
        if overlapped and subgroup.params_ready is not None:
            await_params(subgroup, lanes.compute)
        lanes.compute.submit(Work("forward", reads=(subgroup.param_name,)))


def check_ordering(
    plans: Sequence[Plan], subgroups: Sequence[Subgroup], *, overlapped: bool = False, num_passing_slots: int = 0
) -> None:
    """Raise :class:`PlanError` if :func:`find_hazards` finds any."""
    _refuse(find_hazards(plans, subgroups, overlapped=overlapped, num_passing_slots=num_passing_slots), plans)


def check_ordering_in_backward(plans: Sequence[Plan], subgroups: Sequence[Subgroup]) -> None:
    """Raise :class:`PlanError` if :func:`find_hazards_in_backward` finds any."""
    _refuse(find_hazards_in_backward(plans, subgroups), plans)


def _refuse(hazards: Sequence[str], plans: Sequence[Plan]) -> None:
    if hazards:
        raise PlanError(f"{len(hazards)} conflicting accesses are unordered, first: {hazards[0]}; plan: {plans[-1]}")
