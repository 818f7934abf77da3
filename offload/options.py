"""What a runtime is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from offload.perf_model import Rates
from offload.policy import Overlap, Policy
from offload.pool import Budgets


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for, checked."""

    policy: Policy
    budgets: Budgets
    subgroup_numel: int | None
    num_slots: int | None
    rates: Rates | None = None  # believed until measured, with "auto"
    overlap: Overlap = "none"
    allocates: bool = True  # False: nothing is but billed
    chooses_overlap: bool = False  # starts with ``overlap``, and follows what whole steps are predicted to take
