"""Proof that the executor's waits order every conflicting access of a plan."""

from __future__ import annotations

from collections.abc import Sequence

from offload.executor import run_update
from offload.lanes import Work
from offload.lanes.ordering import AccessHistory, ordering_lanes
from offload.plan import Placement, Plan, PlanError
from offload.subgroup import Slot, Staging, Subgroup


def find_hazards(plans: Sequence[Plan], subgroups: Sequence[Subgroup]) -> list[str]:
    """Run ``plans``, one step each with a backward before and a forward after, and name what no wait orders.

    Returns:
        One sentence for each pair of conflicting accesses that may run in either order; empty if there is none.
    """
    subgroups = [subgroup.sizes_only() for subgroup in subgroups]
    slots = [Slot(i) for i in range(max((plan.num_buffers(Placement.DEVICE) for plan in plans), default=0))]
    stagings = [Staging(i) for i in range(max((plan.num_buffers(Placement.HOST) for plan in plans), default=0))]
    params, grads = tuple(s.param_name for s in subgroups), tuple(s.grad_name for s in subgroups)
    history = AccessHistory()
    lanes = ordering_lanes(history)
    for plan in plans:
        lanes.compute.submit(Work("forward and backward", reads=params, writes=grads))
        run_update(plan, subgroups, slots, stagings, lanes)
    lanes.compute.submit(Work("forward and backward", reads=params, writes=grads))
    return history.hazards


def check_ordering(plans: Sequence[Plan], subgroups: Sequence[Subgroup]) -> None:
    """Raise :class:`PlanError` if :func:`find_hazards` finds any."""
    if hazards := find_hazards(plans, subgroups):
        raise PlanError(f"{len(hazards)} conflicting accesses are unordered, first: {hazards[0]}; plan: {plans[-1]}")
