"""Which gradients are final while backward still runs, and plans that take them in the order in which they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from offload.executor import early_operations
from offload.plan import Op, OpKind, Placement, Plan, lower


class FinalGradients:
    """Takes gradients for final that arrived as often as in the last backward pass that was watched.

    Once each is not enough: layers that are recomputed by a backward pass of their own (reentrant checkpointing) add to
    the gradient of a shared parameter one by one. A parameter that got none in that pass may get one in this, so what
    belongs to the same subgroup is not final before this pass is over.
    """

    def __init__(self) -> None:
        self._num_expected: Counter[tuple[int, int]] = Counter()
        self._num_arrived: Counter[tuple[int, int]] = Counter()
        self._by_last_arrival: dict[int, None] = {}  # subgroups of the pass that is watched now, as an ordered set
        self._order: list[int] = []

    def arrived(self, subgroup: int, position: int, positions: Collection[int]) -> bool:
        """A gradient arrived, of the parameter at ``position`` in ``subgroup``.

        Returns whether all of the subgroup's are final, where those at ``positions`` can get any.
        """
        self._num_arrived[subgroup, position] += 1
        self._by_last_arrival.pop(subgroup, None)
        self._by_last_arrival[subgroup] = None
        return all(0 < self._num_expected[subgroup, i] == self._num_arrived[subgroup, i] for i in positions)

    def end(self) -> None:
        """The pass that was watched is over, and what the next is compared with."""
        self._num_expected, self._num_arrived = self._num_arrived, Counter()
        self._order, self._by_last_arrival = list(self._by_last_arrival), {}

    def forget(self) -> None:
        """The pass that was watched failed: the next one is compared with the one before it."""
        self._num_arrived, self._by_last_arrival = Counter(), {}

    def order(self, num_subgroups: int) -> list[int]:
        """Subgroups in the order in which their gradients were final; those without any come last."""
        known = [index for index in self._order if index < num_subgroups]
        return [*known, *sorted(set(range(num_subgroups)) - set(known))]


def in_order_of(plan: Plan, order: list[int], *, num_slots: int) -> Plan:
    """The same placements and buffers as ``plan``, taking subgroups in ``order`` as their gradients become final.

    ``num_slots`` are there; the plan may go through more.

    First come the prefetches that need nothing; each gradient goes down right before its update, because whoever
    enqueues it waits until it is there, and must not hold back the update before it.
    """
    placements = plan.placements
    lowered = lower(
        [placements[i] for i in range(len(placements))],
        num_slots=min(num_slots, plan.num_buffers(Placement.DEVICE)),
        num_staging=plan.num_buffers(Placement.HOST),
        order=order,
    )
    first = [op for op in early_operations(lowered) if op.kind is OpKind.PREFETCH]
    down = {op.subgroup: op for op in lowered.ops if op.kind is OpKind.GRAD_DOWN}
    ops: list[Op] = list(first)
    for op in lowered.ops:
        if op.kind is OpKind.UPDATE_CPU:
            ops.append(down[op.subgroup])
        if op.kind is not OpKind.GRAD_DOWN and op not in first:
            ops.append(op)
    return Plan(tuple(ops))
