"""What the callbacks for Trainer and for Lightning log of an optimizer and of the memory beside it."""

from __future__ import annotations

import offload
from offload.optimizer import OffloadedOptimizer
from offload.plan import Placement


def figures_of(monitor: offload.MemoryMonitor, optimizer: OffloadedOptimizer) -> dict[str, int]:
    """Of the last steps; see :class:`offload.integrations.transformers.OffloadCallback` for the names."""
    figures = {}
    for phase, seen in monitor.profile().items():
        if seen.peak_allocated_bytes is not None:
            figures[f"offload_{phase.value}_peak_bytes"] = seen.peak_allocated_bytes
        elif seen.rss_bytes is not None:
            figures[f"offload_{phase.value}_rss_bytes"] = seen.rss_bytes
    placements = optimizer.plan.placements.values()
    on_device = sum(placement is not Placement.HOST for placement in placements)
    return {**figures, "offload_updates_on_device": on_device, "offload_num_subgroups": len(placements)}
