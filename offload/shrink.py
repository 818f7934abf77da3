"""Going on with one slot less, when the device has no memory left for what should go into it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import count

from offload.plan import CHAINS, PLACEMENT_OF, Op, Placement


def without_slot(
    ops: Sequence[Op], position: int, *, begun: Collection[int], slots: Sequence[int], num_staging: int
) -> list[Op] | None:
    """What to do in place of ``ops[position:]``, when ``ops[position]`` and its slot can't be had.

    What was begun goes on as it was. Other subgroups that would have visited the device do so through ``slots``, or are
    updated on the CPU where there are none.

    Args:
        begun: subgroups of which an operation was enqueued.
        slots: those that may still be used.

    Returns:
        None if a subgroup can be updated nowhere: there is neither a slot nor a staging buffer.
    """
    rest, turns = ops[position:], count()
    replaced = [op for op in rest if op.subgroup in begun]
    for subgroup, where in {op.subgroup: PLACEMENT_OF[op.kind] for op in rest if op.subgroup not in begun}.items():
        if where is Placement.DEVICE and not slots:
            where = Placement.HOST
        buffers: Sequence[int | None] = {
            Placement.DEVICE: slots,
            Placement.HOST: range(num_staging),
            Placement.RESIDENT: (None,),
        }[where]
        if not buffers:
            return None
        buffer = buffers[next(turns) % len(buffers)]
        replaced += [Op(kind, subgroup, buffer) for kind in CHAINS[where]]
    return replaced
