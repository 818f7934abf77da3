"""Taking memory for subgroups: what they will need is decided and refused first, and allocated after."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from offload.accelerators import Accelerator
from offload.adam import AdamSubgroup
from offload.homes import NUM_STAGING, Homes, settle, stage_gradients
from offload.lanes import Lanes
from offload.lanes.accelerator import StreamLane
from offload.layout import Packed
from offload.limits import host_limits, local_ranks
from offload.options import Options
from offload.policy import Policy
from offload.pool import Budgets, MemoryBill, Pool, format_bytes
from offload.state_layout import StateKind, StateLayout
from offload.subgroup import Subgroup

logger = logging.getLogger("offload")


@dataclass(frozen=True, slots=True)
class Claim:
    """Where states live, and what that takes."""

    homes: Homes = field(default_factory=Homes)
    bill: MemoryBill = field(default_factory=MemoryBill)

    @classmethod
    def of(cls, homes: Homes, subgroups: Sequence[Subgroup], accelerator: Accelerator | None) -> Claim:
        return cls(homes, replace(homes.bill(subgroups, accelerator), is_pinned=accelerator is not None))


def claim(
    policy: Policy,
    subgroups: Sequence[Subgroup],
    budgets: Budgets,
    num_slots: int | None,
    accelerator: Accelerator | None,
    *,
    taken: Claim,
    num_settled: int,
    early_gradients: bool = False,
) -> Claim:
    """Decide for ``subgroups[num_settled:]``, beside what ``taken`` holds. Allocates nothing.

    Args:
        early_gradients: there are to be staging buffers for all gradients that go down, as far as budgets hold them.

    Raises:
        BudgetError: if a budget, the machine, a control group or a resource limit does not hold it.
    """
    pinnable_bytes = None if accelerator is None else accelerator.pinnable_bytes()
    pinnable = budgets
    if pinnable_bytes is not None:
        pinnable_bytes += taken.bill.pinned_bytes
        pinned_budget = pinnable_bytes if budgets.pinned_bytes is None else budgets.pinned_bytes
        pinnable = replace(budgets, pinned_bytes=min(pinnable_bytes, pinned_budget))
    if policy == "auto":
        budgets = pinnable
    homes = settle(
        policy, subgroups, budgets, num_slots, settled=taken.homes, num_settled=num_settled, accelerator=accelerator
    )
    if early_gradients:
        homes = stage_gradients(homes, policy, subgroups, pinnable, accelerator)
    if pinnable_bytes is not None and accelerator is not None:
        homes = homes.within(pinnable_bytes, subgroups, accelerator)
    wanted = Claim.of(homes, subgroups, accelerator)
    wanted.bill.check(budgets)
    wanted.bill.check_limits(taken.bill, host_limits(), local_ranks())
    logger.info("memory that the optimizer takes: %s", wanted.bill)
    return wanted


def allocate_buffers(pool: Pool, homes: Homes, subgroups: Sequence[Subgroup], streams: Sequence[torch.Stream]) -> Homes:
    """Make staging buffers and slots: as ``homes`` says, or fewer slots where the device has no more memory.

    They come before states: every step uses them, so they are the last to go without pinned memory.

    Returns:
        The homes with the number of slots that there are.

    Raises:
        torch.OutOfMemoryError: if the device does not even hold one slot.
    """
    pool.set_stagings(homes.num_staging, homes.staging_bytes(subgroups))
    pool.set_slots(homes.num_slots, homes.slot_bytes(subgroups), streams)
    if len(pool.slots) < homes.num_slots:
        logger.warning(
            "the device has no memory for more than %d of %d slots of %s: transfers overlap less. Give device_budget "
            "to leave room for the model, or lower subgroup_numel",
            len(pool.slots), homes.num_slots, format_bytes(homes.slot_bytes(subgroups)),
        )  # fmt: skip
    return replace(homes, num_slots=len(pool.slots))


def allocate_states(
    pool: Pool, homes: Homes, subgroups: Sequence[Subgroup], layouts: Sequence[StateLayout]
) -> tuple[Homes, list[Tensor]]:
    """Make the states of ``subgroups``, zeros.

    Returns:
        The homes, in which what could not be pinned is ringed, and the states in order.
    """
    states, ringed = [], set(homes.ringed)
    for subgroup, layout in zip(subgroups, layouts, strict=True):
        if subgroup.index in homes.residents:
            states.append(pool.device_state(*layout.shape, dtype=layout.dtype))
            continue
        pinned = subgroup.index in homes.visitors and subgroup.index not in ringed
        states.append(pool.host_state(*layout.shape, pinned=pinned, dtype=layout.dtype))
        if pinned and pool.refused is not None:
            ringed.add(subgroup.index)
    return replace(homes, ringed=frozenset(ringed)), states


def warn_of_ring(homes: Homes, subgroups: Sequence[Subgroup], bill: MemoryBill, refused: BaseException | None) -> None:
    """Say what could not be pinned, and what that costs."""
    num_bytes = sum(subgroups[i].state_bytes for i in homes.ringed)
    why = "the limit on locked memory (ulimit -l) does not hold it" if refused is None else str(refused)
    logger.warning(
        "%s of state that visits the device is not pinned (%s): it passes through a pinned ring of %s. Each visit then "
        "costs one more pass over host memory each way, and blocks the thread that enqueues the step. Allow more "
        "locked memory, lower pinned_budget with plan='auto', or use plan='host'",
        format_bytes(num_bytes), why, format_bytes(bill.ring_bytes),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Addition:
    """Subgroups that are to join others. Nothing is allocated yet.

    Attributes:
        packed, layouts: of those that join.
        subgroups: all, those that join last.
        claim: what all of them will take.
    """

    packed: Sequence[Packed]
    layouts: Sequence[StateLayout]
    subgroups: Sequence[Subgroup]
    claim: Claim

    @property
    def added(self) -> Sequence[Subgroup]:
        """Those that join."""
        return self.subgroups[len(self.subgroups) - len(self.packed) :]


class SubgroupMemory:
    """The subgroups of one device and all memory that is taken for them.

    Attributes:
        actions: of the subgroups, in order; empty where nothing is allocated. Always the same list.
    """

    def __init__(self, device: torch.device, accelerator: Accelerator | None, lanes: Lanes, options: Options) -> None:
        self.pool = Pool(device, accelerator)
        self.subgroups: list[Subgroup] = []
        self.actions: list[AdamSubgroup] = []
        self._accelerator = accelerator
        self._lanes = lanes
        self._options = options
        self._claim = Claim()

    @property
    def homes(self) -> Homes:
        """Where states live."""
        return self._claim.homes

    @property
    def bill(self) -> MemoryBill:
        """What was taken."""
        return self._claim.bill

    def claim(self, packed: Sequence[Packed], kind: StateKind) -> Addition:
        """Decide where the state of more subgroups will live. Changes nothing. Raises as :func:`claim`."""
        layouts = [StateLayout(kind, item.numel) for item in packed]
        added = [
            Subgroup(
                index=len(self.subgroups) + i,
                numel=item.numel,
                param_bytes=item.numel * item.dtype.itemsize,
                state_bytes=layout.num_bytes,
                master_in_param=kind.master_in_param,
            )
            for i, (item, layout) in enumerate(zip(packed, layouts, strict=True))
        ]
        subgroups, options = [*self.subgroups, *added], self._options
        wanted = claim(
            options.policy, subgroups, options.budgets, options.num_slots, self._accelerator,
            taken=self._claim, num_settled=len(self.subgroups), early_gradients=options.early_gradients,
        )  # fmt: skip
        return Addition(packed, layouts, subgroups, wanted)

    def bill_only(self, wanted: Addition) -> None:
        """Take ``wanted`` into the bill, and allocate nothing."""
        self.subgroups, self._claim = list(wanted.subgroups), wanted.claim

    def allocate(self, wanted: Addition, given_less: Callable[[Homes], None]) -> list[AdamSubgroup]:
        """Take the memory of ``wanted``, and let its subgroups join. Nothing is in flight.

        Args:
            given_less: called with the homes where the system gave less than was wanted; may raise.

        Raises:
            Exception: whatever failed, most likely for want of memory; what was there before goes on working.
        """
        added_actions: list[AdamSubgroup] = []
        try:
            homes = self.allocate_buffers(wanted.claim.homes, wanted.subgroups)
            homes = self._allocate_states(wanted, homes, added_actions)
            if homes != wanted.claim.homes:
                given_less(homes)
        except BaseException:
            added_actions.clear()
            for subgroup in wanted.added:
                subgroup.actions = None
            self.allocate_buffers(self.homes, self.subgroups)
            raise
        newly_ringed = homes.ringed - self.homes.ringed
        self.subgroups, self._claim = list(wanted.subgroups), Claim.of(homes, wanted.subgroups, self._accelerator)
        if newly_ringed:
            warn_of_ring(homes, self.subgroups, self.bill, self.pool.refused)
        self.actions += added_actions
        return added_actions

    def _allocate_states(self, wanted: Addition, homes: Homes, actions: list[AdamSubgroup]) -> Homes:
        """Append the actions of what is added. Returns the homes that the system gave."""
        missing = [i for i, item in enumerate(wanted.packed) if item.state is None]
        added, layouts = wanted.added, wanted.layouts
        homes, states = allocate_states(self.pool, homes, [added[i] for i in missing], [layouts[i] for i in missing])
        given = dict(zip(missing, states, strict=True))
        del states
        for i, (subgroup, item, layout) in enumerate(zip(added, wanted.packed, layouts, strict=True)):
            state = given.pop(i) if item.state is None else item.state
            ring = self.pool.set_ring() if subgroup.index in homes.ringed else None
            subgroup.actions = AdamSubgroup(item.slices, item.dtype, state, self._accelerator, layout, ring)
            del state
            actions.append(subgroup.actions)
        return homes

    def allocate_buffers(self, homes: Homes, subgroups: Sequence[Subgroup]) -> Homes:
        """Make staging buffers and slots anew. Returns what the system gave."""
        lanes = self._lanes
        streams = [lane.stream for lane in (lanes.h2d, lanes.d2h) if isinstance(lane, StreamLane)]
        given = allocate_buffers(self.pool, homes, subgroups, streams)
        lanes.h2d.wait(lanes.compute.mark())  # which may have yet to let go of a slot's memory
        return given

    def drop_lost_slots(self) -> bool:
        """Go on without the slots whose memory was given back, see [Note: a slot less] in :mod:`offload.executor`.

        Returns whether there were any.
        """
        had, num_lasting = self.num_lasting_slots, self.pool.drop_lost_slots()
        if num_lasting == had:
            return False
        logger.warning(
            "the device ran out of memory in a prefetch: %d of %d slots were given back. Training goes on, the same "
            "bit for bit; give a device_budget that leaves the model more room",
            had - num_lasting, had,
        )  # fmt: skip
        num_slots = len(self.pool.slots)
        homes = replace(self.homes, num_slots=num_slots, num_passing_slots=num_slots - num_lasting)
        if num_slots == 0 and homes.num_staging == 0:  # that step went through passing slots, which are none alone
            homes = replace(homes, num_staging=NUM_STAGING)
            self.pool.set_stagings(homes.num_staging, homes.staging_bytes(self.subgroups))
        self._claim = Claim.of(homes, self.subgroups, self._accelerator)
        return True

    @property
    def accelerator_device(self) -> torch.device | None:
        """Of the parameters; None for the CPU."""
        return None if self._accelerator is None else self._accelerator.device

    @property
    def num_lasting_slots(self) -> int:
        """Slots that have their memory all the time."""
        return self.homes.num_slots - self.homes.num_passing_slots

    def set_passing_slots(self, num_slots: int) -> None:
        """Have so many slots beside those that last, see [Note: passing slots] in :mod:`offload.executor`.

        New ones have no memory yet. No update is in flight.
        """
        self.pool.set_passing_slots(num_slots)
        homes = replace(self.homes, num_slots=self.num_lasting_slots + num_slots, num_passing_slots=num_slots)
        self._claim = Claim.of(homes, self.subgroups, self._accelerator)
