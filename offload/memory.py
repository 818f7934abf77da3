"""Taking memory for subgroups: what they will need is decided and refused first, and allocated after."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from offload.accelerators import Accelerator
from offload.homes import Homes, settle
from offload.limits import host_limits, local_ranks
from offload.policy import Policy
from offload.pool import Budgets, MemoryBill, Pool, format_bytes
from offload.state_layout import StateLayout
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
) -> Claim:
    """Decide for ``subgroups[num_settled:]``, beside what ``taken`` holds. Allocates nothing.

    Raises:
        BudgetError: if a budget, the machine, a control group or a resource limit does not hold it.
    """
    pinnable_bytes = None if accelerator is None else accelerator.pinnable_bytes()
    if pinnable_bytes is not None:
        pinnable_bytes += taken.bill.pinned_bytes
        if policy == "auto":
            pinned_budget = pinnable_bytes if budgets.pinned_bytes is None else budgets.pinned_bytes
            budgets = replace(budgets, pinned_bytes=min(pinnable_bytes, pinned_budget))
    homes = settle(
        policy, subgroups, budgets, num_slots, settled=taken.homes, num_settled=num_settled, accelerator=accelerator
    )
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
