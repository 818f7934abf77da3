"""What a runtime is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from offload.monitor import MemoryMonitor
from offload.perf_model import Rates
from offload.policy import Overlap, Policy
from offload.pool import Budgets


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for, checked."""

    policy: Policy
    budgets: Budgets
    subgroup_numel: int | None
    num_slots: int | None  # that last
    rates: Rates | None = None  # believed until measured, with "auto"
    overlap: Overlap = "none"
    early_gradients: bool = False  # whatever ``overlap`` is, with staging buffers for them
    allocates: bool = True  # False: nothing is but billed
    chooses_overlap: bool = False  # starts with ``overlap``, and follows what whole steps are predicted to take
    num_passing_slots: int = 0
    memory_monitor: MemoryMonitor | None = None  # tells where there is room for those

    @property
    def brings_gradients_early(self) -> bool:
        """Whether gradients come down while backward runs."""
        return self.overlap == "backward" or self.early_gradients
