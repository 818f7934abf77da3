"""Where each subgroup's state lives, and how many buffers stand beside it: decided once, from policy and budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from offload.accelerators import Accelerator
from offload.plan import Placement, Plan, PlanError, lower
from offload.policy import Policy, choose_placements, choose_residents
from offload.pool import Budgets, MemoryBill
from offload.ring import RING_BYTES
from offload.subgroup import Subgroup

DEFAULT_NUM_SLOTS = 2  # so that one slot fills while another drains, and both link directions are busy
NUM_STAGING = 2  # so that the CPU updates one subgroup while another's gradient comes down or parameters go up
MAX_NUM_STAGING = 4  # where budgets hold all: the CPU need not stand still while these queue behind visiting states


@dataclass(frozen=True, slots=True)
class Homes:
    """Where states live.

    Attributes:
        residents: subgroups whose state lives on the device.
        visitors: subgroups whose state lives in host memory but may visit the device, so it is pinned there.
            All others live in pageable host memory and are always updated by the CPU.
        ringed: visitors whose state could not be pinned: it passes through a ring of pinned buffers.
        num_slots: device buffers for visitors.
        num_staging: host buffers for gradients and new parameters of CPU updates.
        num_passing_slots: of the slots, the last, whose memory backward gives back and the next forward may take.
    """

    residents: frozenset[int] = frozenset()
    visitors: frozenset[int] = frozenset()
    num_slots: int = 0
    num_staging: int = 0
    ringed: frozenset[int] = frozenset()
    num_passing_slots: int = 0

    def slot_bytes(self, subgroups: Sequence[Subgroup]) -> int:
        """Size of one slot: the largest state that may visit."""
        return max((subgroups[i].state_bytes for i in self.visitors), default=0)

    def staging_bytes(self, subgroups: Sequence[Subgroup]) -> int:
        """Size of a staging buffer's two halves, each: the largest gradient that may come down."""
        return max((s.param_bytes for s in subgroups if s.index not in self.residents), default=0)

    def bill(self, subgroups: Sequence[Subgroup], accelerator: Accelerator | None = None) -> MemoryBill:
        """What all of it takes; with what pinning by ``accelerator`` rounds up to, None: to the byte."""
        pinned = _exact if accelerator is None else accelerator.pinned_size
        pinned_state_bytes = sum(pinned(subgroups[i].state_bytes) for i in self.visitors - self.ringed)
        pageable = frozenset(range(len(subgroups))) - self.residents - (self.visitors - self.ringed)
        return MemoryBill(
            host_state_bytes=pinned_state_bytes + sum(subgroups[i].state_bytes for i in pageable),
            pinned_state_bytes=pinned_state_bytes,
            staging_bytes=2 * self.num_staging * pinned(self.staging_bytes(subgroups)),
            ring_bytes=RING_BYTES if self.ringed else 0,
            slot_bytes=(self.num_slots - self.num_passing_slots) * self.slot_bytes(subgroups),
            passing_bytes=self.num_passing_slots * self.slot_bytes(subgroups),
            resident_bytes=sum(subgroups[i].state_bytes for i in self.residents),
        )

    def within(self, pinnable_bytes: int, subgroups: Sequence[Subgroup], accelerator: Accelerator) -> Homes:
        """These with as many visitors ringed, from the last, as it takes to pin no more than ``pinnable_bytes``."""
        homes = self
        for index in sorted(self.visitors - self.ringed, reverse=True):
            if homes.bill(subgroups, accelerator).pinned_bytes <= pinnable_bytes:
                break
            homes = replace(homes, ringed=homes.ringed | {index})
        return homes

    def host_only(self, subgroups: Sequence[Subgroup]) -> frozenset[int]:
        return frozenset(range(len(subgroups))) - self.residents - self.visitors


NOTHING_SETTLED = Homes()


def _exact(num_bytes: int) -> int:
    return num_bytes


def settle(
    policy: Policy,
    subgroups: Sequence[Subgroup],
    budgets: Budgets,
    num_slots: int | None = None,
    *,
    settled: Homes = NOTHING_SETTLED,
    num_settled: int = 0,
    accelerator: Accelerator | None = None,
) -> Homes:
    """Decide for ``subgroups[num_settled:]``, without moving those that ``settled`` has decided already.

    Policies that name placements get what they need, and the bill says whether the budgets hold it; ``"auto"`` takes
    what the budgets leave. That no budget is exceeded is for :meth:`offload.pool.MemoryBill.check`.

    Args:
        num_slots: that last, as the user asked, or None for the default.
        accelerator: whose memory it will be; None: any, to the byte.
    """
    if isinstance(policy, Plan):
        if num_settled:
            raise PlanError(
                "this optimizer runs a fixed plan, which covers the parameters it was constructed with; "
                "use a policy such as plan='auto' where parameters join later"
            )
        return Homes(
            residents=choose_residents(policy, subgroups, None),
            visitors=frozenset(i for i, where in policy.placements.items() if where is Placement.DEVICE),
            num_slots=policy.num_buffers(Placement.DEVICE) if num_slots is None else num_slots,
            num_staging=policy.num_buffers(Placement.HOST),
        )
    added = subgroups[num_settled:]
    taken = settled.bill(subgroups[:num_settled], accelerator) if num_settled else MemoryBill()
    device_left = None if budgets.device_bytes is None else budgets.device_bytes - taken.device_bytes
    residents = settled.residents | {added[i].index for i in choose_residents(policy, added, device_left)}
    on_host = [s for s in added if s.index not in residents]
    num_staging = NUM_STAGING if policy != "device" and (on_host or settled.num_staging) else 0
    homes = Homes(residents, settled.visitors, num_slots or DEFAULT_NUM_SLOTS, num_staging, settled.ringed)
    if policy == "auto":
        wide = replace(homes, num_staging=max(num_staging, min(len(subgroups) - len(residents), MAX_NUM_STAGING)))
        wide, narrow = (_fill_budgets(each, subgroups, on_host, budgets, accelerator) for each in (wide, homes))
        bill = wide.bill(subgroups, accelerator)
        holds_all = wide.num_slots == homes.num_slots and not wide.host_only(subgroups)
        return wide if holds_all and (budgets.host_bytes is None or bill.host_bytes <= budgets.host_bytes) else narrow
    placements = choose_placements(policy, len(subgroups), residents)
    visitors = settled.visitors | {s.index for s in on_host if placements[s.index] is Placement.DEVICE}
    return replace(homes, visitors=visitors, num_slots=homes.num_slots if visitors else 0)


def stage_gradients(
    homes: Homes,
    policy: Policy,
    subgroups: Sequence[Subgroup],
    budgets: Budgets,
    accelerator: Accelerator | None = None,
) -> Homes:
    """``homes`` with a staging buffer for each gradient that may go down, so that all may do so during backward.

    With as many as ``budgets`` hold beside the rest; a plan has the buffers that it names.
    """
    if isinstance(policy, Plan):
        return homes
    most = choose_placements(policy, len(subgroups), homes.residents).count(Placement.HOST)
    one = replace(homes, num_staging=1).bill(subgroups, accelerator).staging_bytes
    bill = homes.bill(subgroups, accelerator)
    held = ((budgets.host_bytes, bill.host_bytes), (budgets.pinned_bytes, bill.pinned_bytes))
    more = [(budget - num_bytes) // one for budget, num_bytes in held if budget is not None and one]
    num_staging = min([most, *(homes.num_staging + num for num in more)])
    return replace(homes, num_staging=max(homes.num_staging, num_staging))


def _fill_budgets(
    homes: Homes,
    subgroups: Sequence[Subgroup],
    on_host: Sequence[Subgroup],
    budgets: Budgets,
    accelerator: Accelerator | None,
) -> Homes:
    """Let as many host states visit the device as pinned memory holds, through as many slots as device memory holds."""
    pinned_bytes = homes.bill(subgroups, accelerator).pinned_bytes
    visitors = set(homes.visitors)
    for subgroup in on_host:
        pinned_bytes += subgroup.state_bytes if accelerator is None else accelerator.pinned_size(subgroup.state_bytes)
        if budgets.pinned_bytes is not None and pinned_bytes > budgets.pinned_bytes:
            break
        visitors.add(subgroup.index)
    for chosen in (replace(homes, visitors=frozenset(visitors)), homes):
        num_slots = chosen.num_slots if chosen.visitors else 0
        if num_slots and budgets.device_bytes is not None:
            left = budgets.device_bytes - chosen.bill(subgroups).resident_bytes
            num_slots = min(num_slots, left // chosen.slot_bytes(subgroups))
        if num_slots:
            return replace(chosen, num_slots=num_slots)
    return replace(homes, num_slots=0)  # nothing can visit, so nothing more need be pinned


def first_plan(policy: Policy, num_subgroups: int, homes: Homes) -> Plan:
    """The plan of the first steps; ``"auto"`` sends every other visitor to the device, to measure both sides.

    One visitor among subgroups that never visit goes there too.
    """
    if isinstance(policy, Plan):
        return through_slots(policy, homes)
    placements = choose_placements(policy, num_subgroups, homes.residents)
    if policy == "auto":
        visitors = sorted(homes.visitors)
        alone = len(visitors) == 1 and num_subgroups - len(homes.residents) > 1
        for i in visitors if alone else visitors[1::2]:
            placements[i] = Placement.DEVICE
    return lower(placements, num_slots=homes.num_slots, num_staging=homes.num_staging)


def through_slots(plan: Plan, homes: Homes) -> Plan:
    """``plan``, or its placements lowered anew where there are fewer slots than it goes through."""
    return plan if plan.num_buffers(Placement.DEVICE) <= homes.num_slots else lowered(plan, homes)


def lowered(plan: Plan, homes: Homes) -> Plan:
    """The placements of ``plan``, lowered to the slots there are; without any, the CPU updates what visited."""
    placements = [
        Placement.HOST if each is Placement.DEVICE and homes.num_slots == 0 else each
        for _, each in sorted(plan.placements.items())
    ]
    return lower(placements, num_slots=homes.num_slots, num_staging=homes.num_staging)
