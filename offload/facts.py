"""What the host was doing and allowed to do while a step was measured: what times alone cannot tell."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from typing import Any

from offload.kernels import num_threads
from offload.processors import allowed_processors, numa_nodes

_IDLE = ("idle", "iowait", "guest", "guest_nice")  # guests are counted in user time already


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The host around one measured step.

    Attributes:
        num_processors: that the machine has.
        num_allowed: that this process may run on.
        num_remote: of the allowed ones, those on another NUMA node than the device; 0 where that is unknown.
        num_threads: of a CPU update.
        busy_elsewhere: processors' worth of time that other processes took, on average.
    """

    num_processors: int
    num_allowed: int
    num_remote: int
    num_threads: int
    busy_elsewhere: float


def host_facts(device_node: int | None, busy_elsewhere: float) -> HostFacts:
    """The facts of this process now."""
    allowed = allowed_processors()
    near = allowed if device_node is None else numa_nodes().get(device_node, frozenset())
    return HostFacts(
        num_processors=_psutil().cpu_count() or len(allowed),
        num_allowed=len(allowed),
        num_remote=len(allowed - near),
        num_threads=num_threads(),
        busy_elsewhere=busy_elsewhere,
    )


class ProcessorMeter:
    """Processors' worth of time that others take, from construction on."""

    def __init__(self) -> None:
        self._start = _readings()

    def busy_elsewhere(self) -> float:
        """0 on an idle machine; two processes that compute all the time give 2."""
        wall_s, busy_s, own_s = (now - before for now, before in zip(_readings(), self._start, strict=True))
        return max(0.0, (busy_s - own_s) / wall_s) if wall_s > 0 else 0.0


def _readings() -> tuple[float, float, float]:
    """Wall-clock, time that all processors were busy, and that this process kept them so; in seconds."""
    psutil = _psutil()
    times, own = psutil.cpu_times()._asdict(), psutil.Process().cpu_times()
    busy_s = sum(seconds for name, seconds in times.items() if name not in _IDLE)
    return time.perf_counter(), busy_s, own.user + own.system


def _psutil() -> Any:
    """Imported when a step is measured, not with the package."""
    return importlib.import_module("psutil")
