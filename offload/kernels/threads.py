"""How many threads an update may use, and on which processors."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable
from pathlib import Path

from offload.kernels import affinity, native

# Below this many elements a call stays on its own thread: waking the others costs as much as they save.
MIN_PARALLEL_NUMEL = 1 << 20

_chosen: int | None = None


def num_threads() -> int:
    """Threads a call of :func:`offload.kernels.adam_step` uses at most, the calling one included.

    What :func:`set_num_threads` set, else the environment's OFFLOAD_NUM_THREADS, else one for each processor of
    :func:`offload.kernels.cpu_affinity`, else the processors that this process may run on (affinity, and the control
    group's quota). torch.get_num_threads() plays no part.
    """
    if _chosen is not None:
        return _chosen
    value = os.environ.get("OFFLOAD_NUM_THREADS")
    if value is None:
        bound = affinity.cpu_affinity()
        return _usable_processors() if bound is None else len(bound)
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"OFFLOAD_NUM_THREADS must be a whole number from 1 upward, not {value!r}")
    return int(value)


def set_num_threads(count: int | None) -> None:
    """Sets :func:`num_threads` for this process; None goes back to the default."""
    global _chosen
    if count is not None and count < 1:
        raise ValueError(f"the number of threads must be at least 1, not {count!r} (None for the default)")
    _chosen = count


def set_cpu_affinity(cpus: str | Iterable[int] | None) -> None:
    """Binds the threads of every following update to processors, thread i to ``cpus[i % len(cpus)]``.

    That keeps memory near the thread that works on it: state is first written, and from then on updated, by the same
    thread. The calling thread, which takes part, is bound for the length of each call that others share with it.

    Args:
        cpus: numbers of processors, a text such as ``"0-3,8"``, ``"node:1"`` for those of a NUMA node, or None to go
            back to the environment's OFFLOAD_CPU_AFFINITY (the same texts), or to no binding.

    Raises ValueError for processors that this process may not use, and RuntimeError without the compiled kernel, whose
    threads these are.
    """
    if cpus is not None and native.load() is None:
        raise RuntimeError(
            f"set_cpu_affinity({cpus!r}) binds the threads of the compiled kernel, which isn't there: install a C++ "
            "compiler and this package again, or start the process under taskset or numactl"
        )
    affinity.choose(cpus)


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
