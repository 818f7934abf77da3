"""How the update of a plan hides behind the model's own work: the ways there are, each timed as a whole step.

[Note: a head start]
Under the next forward the CPU updates as fast as forward reads, at best, and forward has to wait for the first of them:
gradient down, update, parameters up. A state that came up in backward is updated at once. So the first subgroups of the
forward visit, as many as keep a slot free for later ones, and the CPU is ahead by as much.

[Note: the share of a whole step]
The fastest split of the update alone need not make the shortest step. Where forward is long enough fewer visits do, as
they leave links and host memory to the CPU; where gradients come down in backward a CPU update costs less than it did.
So quarters of its visits are tried too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from offload.layer_costs import Layer, room_in_backward
from offload.perf_model import Rates
from offload.phases import IN_ORDER, Hiding, StepPrediction, predict_step
from offload.plan import Placement, Plan
from offload.policy import Overlap, evenly
from offload.scheduling import schedule
from offload.subgroup import Subgroup

MAX_PASSING_SLOTS = 4  # beyond those that last; more are tried nowhere, as each hides less than the one before
_WHAT = {
    "none": "update after backward",
    "backward": "gradients and states in backward, update after it",
    "next_forward": "states in backward, update under the next forward",
    "early_gradients": "gradients and states in backward, update under the next forward",
}


def describe(hiding: Hiding) -> str:
    """A way to hide the update, for a reader."""
    early = hiding.overlap == "next_forward" and hiding.early_gradients
    what = _WHAT["early_gradients" if early else hiding.overlap]
    if hiding.in_backward:
        rest = "its rest under the next forward" if hiding.overlap == "next_forward" else "its rest after it"
        what = f"update in backward, {rest}"
    num = hiding.num_passing_slots
    return what if not num else f"{what}, {num} more slot{'s' if num > 1 else ''} in freed activations"


def hide(
    plan: Plan,
    subgroups: Sequence[Subgroup],
    rates: Rates,
    layers: Sequence[Layer],
    ways: Iterable[Hiding],
    visitors: Collection[int] = (),
    *,
    most_staging: int = 0,
) -> list[tuple[Hiding, StepPrediction]]:
    """The step of ``plan`` with its update hidden in each of ``ways``, the shortest first; of equals the first of them.

    A step's own plan says in which order, through how many slots and, among ``visitors``, which subgroups visit: see
    [Note: a head start] and [Note: the share of a whole step]. Where early gradients are asked for, it goes through up
    to ``most_staging`` staging buffers.
    """
    steps = []
    for hiding in ways:
        buffers = _Buffers.of(plan, hiding, most_staging)
        lower = partial(
            schedule, subgroups=subgroups, rates=rates, num_slots=buffers.num_slots, num_staging=buffers.num_staging
        )
        where = plan.placements  # makes them anew
        placements = [where[subgroup.index] for subgroup in subgroups]
        plans = [plan if buffers == _Buffers.of(plan) else lower(placements)]
        if hiding.overlap == "backward" or hiding.in_backward:  # in the order in which backward makes gradients
            plans.append(lower(placements, order=range(len(subgroups) - 1, -1, -1)))
        if hiding.overlap == "next_forward" and not hiding.in_backward:
            plans += map(lower, _head_starts(plan, subgroups, visitors, buffers))
        hidden = (predict_step(each, subgroups, rates, layers, hiding) for each in plans)
        steps.append((hiding, min(hidden, key=lambda step: step.step_s)))
    return sorted(steps, key=lambda item: item[1].step_s)


def ways_to_hide(
    plan: Plan, subgroups: Sequence[Subgroup], layers: Sequence[Layer], *, clips: bool = True
) -> Iterator[Hiding]:
    """What of the update may run beside the model's own work, the simplest first.

    Args:
        clips: gradients are clipped by their global norm, which needs all of them before the first update.
    """
    yield IN_ORDER
    if not layers:
        return
    slot_bytes = max((subgroups[i].state_bytes for i, w in plan.placements.items() if w is Placement.DEVICE), default=0)
    ways: tuple[tuple[Overlap, bool], ...] = (("backward", False), ("next_forward", False), ("next_forward", True))
    for overlap, early in ways:
        room = max(room_in_backward(layers, until_next_forward=overlap == "next_forward"))
        most = min(MAX_PASSING_SLOTS, room // slot_bytes if slot_bytes else 0)
        for in_backward in (False,) if clips or early else (False, True):
            for num in (0,) if in_backward else dict.fromkeys((0, most)):
                yield Hiding(overlap, in_backward, num, early)


class _Buffers(NamedTuple):
    """How many a plan goes through."""

    num_slots: int
    num_staging: int

    @classmethod
    def of(cls, plan: Plan, hiding: Hiding = IN_ORDER, most_staging: int = 0) -> _Buffers:
        """Those of ``plan``, and those that ``hiding`` adds."""
        num_slots, num_staging = plan.num_buffers(Placement.DEVICE), plan.num_buffers(Placement.HOST)
        if hiding.early_gradients and num_staging:
            num_staging = max(num_staging, most_staging)
        return cls(num_slots + hiding.num_passing_slots, num_staging)


def _head_starts(
    plan: Plan, subgroups: Sequence[Subgroup], visitors: Collection[int], buffers: _Buffers
) -> Iterator[list[Placement]]:
    """Placements whose first subgroups visit: those alone, twice as many, and quarters of the visits of ``plan``."""
    able = [s.index for s in subgroups if s.index in visitors]
    first = min(buffers.num_slots - 1, plan.num_visits, len(able))
    if first < 1 or buffers.num_staging == 0:
        return
    quarters = [max(first, plan.num_visits * i // 4) for i in range(1, 5)]
    for num in sorted({first, min(2 * first, plan.num_visits), *quarters}):
        others = evenly(able[first:], num - first)
        yield [
            where if where is Placement.RESIDENT
            else Placement.DEVICE if index in others or index in able[:first]
            else Placement.HOST
            for index, where in sorted(plan.placements.items())
        ]  # fmt: skip
