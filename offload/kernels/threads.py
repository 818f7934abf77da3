"""How many threads an update may use."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path

# Below this many elements a call stays on its own thread: waking the others costs as much as they save.
MIN_PARALLEL_NUMEL = 1 << 20

_chosen: int | None = None


def num_threads() -> int:
    """Threads a call of :func:`offload.kernels.adam_step` uses at most, the calling one included.

    What :func:`set_num_threads` set, else the environment's OFFLOAD_NUM_THREADS, else the processors that this process
    may run on (affinity, and the control group's quota). torch.get_num_threads() plays no part.
    """
    if _chosen is not None:
        return _chosen
    value = os.environ.get("OFFLOAD_NUM_THREADS")
    if value is None:
        return _usable_processors()
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"OFFLOAD_NUM_THREADS must be a whole number from 1 upward, not {value!r}")
    return int(value)


def set_num_threads(count: int | None) -> None:
    """Sets :func:`num_threads` for this process; None goes back to the default."""
    global _chosen
    if count is not None and count < 1:
        raise ValueError(f"the number of threads must be at least 1, not {count!r} (None for the default)")
    _chosen = count


@functools.cache
def _usable_processors() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_processors(Path("/sys/fs/cgroup/cpu.max"))
    available = available if quota is None else max(1, min(available, quota))
    # Launchers of several ranks (torchrun, deepspeed) bind nobody: each rank takes its share.
    return max(1, available // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _cgroup_processors(cpu_max: Path) -> int | None:
    """Processors' worth of time per period that a control group (version 2) grants, rounded up; None: no limit."""
    try:
        quota, period = cpu_max.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else math.ceil(int(quota) / int(period))
