"""The order of a plan's operations: list scheduling, by the durations that a machine's rates give.

Where operations stand in a plan decides who waits for whom: each lane works in order, and the thread that submits an
upload waits for its CPU update first. :func:`offload.plan.lower` needs no rates, but leaves short transfers (gradients,
new parameters) queueing behind long ones (states). Here each lane takes, whenever it is free, what can start first.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

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
    number: int  # in the order in which they entered
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


_Start = tuple[float, int, int]  # when, urgency and number: the least goes first
_NEVER: _Start = (math.inf, 0, 0)


@dataclass(slots=True, eq=False)
class _LaneOrder:
    """Visits whose next operation is one lane's, which is free from ``free_s`` on; many may wait for it."""

    free_s: float = 0.0
    _later: list[tuple[_Start, _Visit]] = field(default_factory=list)  # a heap
    _ready: list[tuple[int, int, _Visit]] = field(default_factory=list)  # a heap of those that wait for the lane alone

    def add(self, visit: _Visit) -> None:
        heapq.heappush(self._later, ((visit.ready_s, visit.urgency, visit.number), visit))

    def next_start(self) -> _Start:
        """Of the operation that may start first."""
        while self._later and self._later[0][0][0] <= self.free_s:
            (_, urgency, number), visit = heapq.heappop(self._later)
            heapq.heappush(self._ready, (urgency, number, visit))
        if self._ready:
            return (self.free_s, *self._ready[0][:2])
        return self._later[0][0] if self._later else _NEVER

    def pop(self) -> _Visit:
        """The visit of :meth:`next_start`, which was asked for since the last change."""
        return heapq.heappop(self._ready)[-1] if self._ready else heapq.heappop(self._later)[1]


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
    lanes = [_LaneOrder() for _ in range(_NUM_LANES)]
    starts = [_NEVER] * _NUM_LANES  # what each lane may start next
    numbers = itertools.count()

    def wait_for_lane(visit: _Visit) -> None:
        lanes[visit.lane].add(visit)
        starts[visit.lane] = lanes[visit.lane].next_start()

    def enter(where: Placement, buffer: int | None, ready_s: float) -> None:
        """Let the next subgroup of ``where`` have ``buffer``."""
        subgroup = next(waiting[where], None)
        if subgroup is not None:
            visit = _Visit(subgroup, buffer, iter(CHAINS[where]), ready_s, next(numbers))
            visit.advance()
            wait_for_lane(visit)

    for buffer in range(num_staging):
        enter(Placement.HOST, buffer, 0.0)
    for buffer in range(num_slots):
        enter(Placement.DEVICE, buffer, 0.0)
    enter(Placement.RESIDENT, None, 0.0)

    ops: list[Op] = []
    while (start := min(starts)) < _NEVER:
        lane = lanes[at := starts.index(start)]
        visit = lane.pop()
        ops.append(Op(visit.kind, visit.subgroup.index, visit.buffer))
        lane.free_s = visit.ready_s = start[0] + seconds_of(visit.kind, visit.subgroup)
        starts[at] = lane.next_start()
        if visit.advance():
            wait_for_lane(visit)
        else:
            enter(placements[visit.subgroup.index], visit.buffer, visit.ready_s)
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
