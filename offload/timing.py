"""When each operation of a step ran, by the events of its stream or the clock of its worker."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from offload.accelerators import accelerator_for
from offload.lanes import Lanes
from offload.lanes.accelerator import HostLane, StreamLane
from offload.perf_model import Rates
from offload.plan import OpKind
from offload.subgroup import Subgroup
from offload.timeline import Span

_Stamp = torch.Event | float


class StepTimer:
    """Records one step on accelerator lanes, from construction until :meth:`spans`.

    Costs two timed events an operation, and makes the host wait for the compute lane once, to line up the clocks.
    """

    def __init__(self, lanes: Lanes, device: torch.device) -> None:
        self._records: list[tuple[str, str, _Stamp, _Stamp]] = []
        self._lanes = [lane for lane in (lanes.compute, lanes.h2d, lanes.d2h, lanes.host)
                       if isinstance(lane, (StreamLane, HostLane))]  # fmt: skip
        self._origin = torch.Event(device, enable_timing=True)
        self._origin.record(torch.accelerator.current_stream(device))
        self._origin.synchronize()
        self._origin_s = accelerator_for(device).host_time_s()
        for lane in self._lanes:
            lane.recorder = self._record

    def _record(self, lane: str, work: str, begin: _Stamp, end: _Stamp) -> None:
        self._records.append((lane, work, begin, end))

    def stop(self) -> None:
        for lane in self._lanes:
            lane.recorder = None

    def spans(self) -> list[Span]:
        """What ran when, in seconds since construction. The caller has synchronized the lanes."""
        return [Span(lane, work, self._seconds(begin), self._seconds(end)) for lane, work, begin, end in self._records]

    def _seconds(self, stamp: _Stamp) -> float:
        if isinstance(stamp, torch.Event):
            return float(self._origin.elapsed_time(stamp)) / 1e3
        return stamp - self._origin_s


def measured_rates(spans: Sequence[Span], subgroups: Sequence[Subgroup]) -> Rates | None:
    """Rates of a step that has operations on both sides; None if a lane did nothing measurable."""
    seconds: dict[OpKind, float] = defaultdict(float)
    amounts: dict[OpKind, int] = defaultdict(int)
    for span in spans:
        kind, subgroup = OpKind(span.name[0]), subgroups[int(span.name[1:].split("@")[0])]
        seconds[kind] += span.end_s - span.start_s
        copies_state = kind in (OpKind.PREFETCH, OpKind.FLUSH)
        updates = kind in (OpKind.UPDATE_CPU, OpKind.UPDATE_GPU)
        amounts[kind] += subgroup.numel if updates else subgroup.state_bytes if copies_state else subgroup.param_bytes
    needed = (OpKind.PREFETCH, OpKind.FLUSH, OpKind.UPDATE_CPU, OpKind.UPDATE_GPU)
    if any(seconds[kind] <= 0 for kind in needed):
        return None
    h2d, d2h, host, device = (amounts[kind] / seconds[kind] for kind in needed)
    return Rates(h2d, d2h, host, device)
