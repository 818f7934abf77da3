"""Which subgroup is updated where: the policies that a user names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from offload.plan import Placement, Plan, PlanError
from offload.subgroup import Subgroup


@dataclass(frozen=True, slots=True)
class Static:
    """A fixed share of the optimizer state lives on the accelerator, the rest is updated by the CPU (TwinFlow).

    ``resident_fraction`` is the accelerator's share, 0 to 1; DeepSpeed's ``ratio`` is the CPU's, 1 minus this.
    """

    resident_fraction: float

    def __post_init__(self) -> None:
        if not 0 <= self.resident_fraction <= 1:
            raise ValueError(f"resident_fraction={self.resident_fraction} is no share; give 0 (all host) to 1")


@dataclass(frozen=True, slots=True)
class Stride:
    """One of every ``update_stride`` subgroups visits the accelerator (Deep Optimizer States, arXiv 2410.21316)."""

    update_stride: int

    def __post_init__(self) -> None:
        if self.update_stride < 1:
            raise ValueError(f"update_stride={self.update_stride} is no stride; give 1 (all on the device) or more")


Policy = Literal["auto", "host", "device"] | Static | Stride | Plan
Overlap = Literal["auto", "none", "backward", "next_forward"]
OVERLAPS: tuple[Overlap, ...] = get_args(Overlap)
POLICY_NAMES = ("auto", "host", "device")


def parse_policy(policy: object) -> Policy:
    """What the ``plan`` argument means: a policy, a :class:`Plan`, or a plan's text.

    Raises:
        TypeError: for anything else.
        PlanError: for a text that is neither a policy's name nor a plan.
    """
    if isinstance(policy, (Static, Stride, Plan)):
        return policy
    if policy == "auto" or policy == "host" or policy == "device":
        return policy
    if isinstance(policy, str):
        try:
            return Plan.parse(policy)
        except PlanError as error:
            raise PlanError(f"plan={policy!r} is none of {POLICY_NAMES} and no plan: {error}") from None
    raise TypeError(
        f"plan must be one of {POLICY_NAMES}, Static(resident_fraction), Stride(update_stride), a Plan or its text, "
        f"not {policy!r}"
    )


def parse_overlap(overlap: object) -> Overlap:
    """What the ``overlap`` argument means. Raises ValueError for anything but a name of :data:`OVERLAPS`."""
    for known in OVERLAPS:
        if overlap == known:
            return known
    raise ValueError(f"overlap={overlap!r} is none of {OVERLAPS}")


def choose_residents(policy: Policy, subgroups: Sequence[Subgroup], device_bytes: int | None) -> frozenset[int]:
    """Subgroups whose state lives on the accelerator, decided once, when the state is allocated.

    ``Static`` keeps its share of the parameters, ``"auto"`` what ``device_bytes`` hold beside two slots, a plan says so
    itself. They keep the head: residents are updated at once, so the next forward, which begins there, runs while the
    CPU updates the rest, and backward makes the gradients of the rest first.
    """
    if isinstance(policy, Plan):
        return frozenset(i for i, where in policy.placements.items() if where is Placement.RESIDENT)
    if isinstance(policy, Static):
        limit = policy.resident_fraction * sum(s.numel for s in subgroups)
        return _head(subgroups, limit, [s.numel for s in subgroups])
    if policy == "auto" and device_bytes is not None and subgroups:
        state_bytes = [s.state_bytes for s in subgroups]
        if sum(state_bytes) <= device_bytes:
            return frozenset(range(len(subgroups)))
        return _head(subgroups, device_bytes - 2 * max(state_bytes), state_bytes)
    return frozenset()


def _head(subgroups: Sequence[Subgroup], limit: float, sizes: Sequence[int]) -> frozenset[int]:
    chosen, total = [], 0
    for i in range(len(subgroups)):
        total += sizes[i]
        if total > limit:
            break
        chosen.append(i)
    return frozenset(chosen)


def choose_placements(policy: Policy, num_subgroups: int, residents: Collection[int]) -> list[Placement]:
    """Placement of each subgroup under a policy other than a plan; ``"auto"`` starts like ``"host"``."""
    placements = []
    for i in range(num_subgroups):
        visits = policy == "device" or (isinstance(policy, Stride) and (i + 1) % policy.update_stride == 0)
        if i in residents:
            placements.append(Placement.RESIDENT)
        else:
            placements.append(Placement.DEVICE if visits else Placement.HOST)
    return placements


def evenly(items: Sequence[int], num: int) -> list[int]:
    """``num`` of ``items``, evenly spread among the others."""
    count = len(items)
    return [item for rank, item in enumerate(items) if (rank + 1) * num // count > rank * num // count]
