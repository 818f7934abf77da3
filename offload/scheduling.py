"""The order of a plan's operations: list scheduling, by the durations that a machine's rates give.

Where operations stand in a plan decides who waits for whom: each lane works in order, and the thread that submits an
upload waits for its CPU update first. :func:`offload.plan.lower` needs no rates, but leaves short transfers (gradients,
new parameters) queueing behind long ones (states). Here each lane takes, whenever it is free, what can start first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from offload.bounds import bound_of, load_of_plan
from offload.perf_model import Rates
from offload.plan import CHAINS, Op, OpKind, Placement, Plan, lower
from offload.subgroup import Subgroup

_NUM_LANES = 4
_COMPUTE, _H2D, _D2H, _HOST = range(_NUM_LANES)
# Lane of each operation, and its urgency: of what can start at the same time, the short before the long, and what
# others wait for first.
_LANE_AND_URGENCY = {
    OpKind.UPLOAD: (_H2D, 0),
    OpKind.GRAD_DOWN: (_D2H, 1),
    OpKind.UPDATE_CPU: (_HOST, 2),
    OpKind.UPDATE_GPU: (_COMPUTE, 3),
    OpKind.FLUSH: (_D2H, 4),
    OpKind.PREFETCH: (_H2D, 5),
    OpKind.UPDATE_RESIDENT: (_COMPUTE, 6),
}


@dataclass(slots=True, eq=False)
class _Visit:
    """A subgroup on its way through one buffer: ``kind`` is its next operation, which may start at ``ready_s``."""

    subgroup: Subgroup
    buffer: int | None
    kinds: Iterator[OpKind]
    ready_s: float
    kind: OpKind = OpKind.GRAD_DOWN
    lane: int = 0
    urgency: int = 0

    def advance(self) -> bool:
        """Go on to the next operation; False if there is none."""
        kind = next(self.kinds, None)
        if kind is None:
            return False
        self.kind = kind
        self.lane, self.urgency = _LANE_AND_URGENCY[kind]
        return True


def schedule(
    placements: Sequence[Placement],
    subgroups: Sequence[Subgroup],
    rates: Rates,
    *,
    num_slots: int,
    num_staging: int,
    order: Iterable[int] | None = None,
) -> Plan:
    """Lower ``placements`` to a plan in the order in which its operations would start at ``rates``.

    Subgroups of one placement are taken in ``order``, a permutation of them (default: by index).

    Raises:
        PlanError: if a subgroup needs a slot or a staging buffer and there is none.
    """
    seconds_of = _durations(lower(placements, num_slots=num_slots, num_staging=num_staging), subgroups, rates)
    ordered = [subgroups[i] for i in (range(len(subgroups)) if order is None else order)]
    waiting = {where: iter([s for s in ordered if placements[s.index] is where]) for where in CHAINS}
    visits: list[_Visit] = []

    def enter(where: Placement, buffer: int | None, ready_s: float) -> None:
        """Let the next subgroup of ``where`` have ``buffer``."""
        subgroup = next(waiting[where], None)
        if subgroup is not None:
            visit = _Visit(subgroup, buffer, iter(CHAINS[where]), ready_s)
            visit.advance()
            visits.append(visit)

    for buffer in range(num_staging):
        enter(Placement.HOST, buffer, 0.0)
    for buffer in range(num_slots):
        enter(Placement.DEVICE, buffer, 0.0)
    enter(Placement.RESIDENT, None, 0.0)

    free_s = [0.0] * _NUM_LANES
    ops: list[Op] = []
    while visits:
        first_s, first = math.inf, visits[0]
        for visit in visits:
            start_s = free_s[visit.lane]
            if visit.ready_s > start_s:
                start_s = visit.ready_s
            if start_s < first_s or (start_s == first_s and visit.urgency < first.urgency):
                first_s, first = start_s, visit
        ops.append(Op(first.kind, first.subgroup.index, first.buffer))
        free_s[first.lane] = first.ready_s = first_s + seconds_of(first.kind, first.subgroup)
        if not first.advance():
            visits.remove(first)
            enter(placements[first.subgroup.index], first.buffer, first.ready_s)
    return Plan(tuple(ops))


def _durations(plan: Plan, subgroups: Sequence[Subgroup], rates: Rates) -> Callable[[OpKind, Subgroup], float]:
    """How long an operation takes while ``plan`` keeps both directions of the link and host memory busy."""
    rates = _contended(rates, plan, subgroups)
    up, down = rates.h2d_bytes_per_s, rates.d2h_bytes_per_s

    def seconds_of(kind: OpKind, subgroup: Subgroup) -> float:
        match kind:
            case OpKind.GRAD_DOWN:
                return rates.copy_latency_s + subgroup.down_bytes / down
            case OpKind.FLUSH:
                return rates.copy_latency_s + subgroup.state_bytes / down
            case OpKind.UPLOAD:
                return rates.copy_latency_s + subgroup.param_bytes / up
            case OpKind.PREFETCH:
                return rates.copy_latency_s + subgroup.state_bytes / up
            case OpKind.UPDATE_CPU:
                return subgroup.numel / rates.host_update_params_per_s
            case OpKind.UPDATE_GPU | OpKind.UPDATE_RESIDENT:
                return rates.launch_latency_s + subgroup.numel / rates.device_update_params_per_s

    return seconds_of


def _contended(rates: Rates, plan: Plan, subgroups: Sequence[Subgroup]) -> Rates:
    seconds_of = dict(bound_of(load_of_plan(plan, subgroups), rates).seconds_of)
    memory_s, others_s = seconds_of.pop("host memory"), max(seconds_of.values())
    squeeze = min(1.0, others_s / memory_s) if memory_s else 1.0
    return replace(
        rates,
        h2d_bytes_per_s=min(rates.h2d_bytes_per_s, rates.both_bytes_per_s) * squeeze,
        d2h_bytes_per_s=min(rates.d2h_bytes_per_s, rates.both_bytes_per_s) * squeeze,
        host_update_params_per_s=rates.host_update_params_per_s * squeeze,
    )
