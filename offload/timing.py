"""When each operation of a step ran, by the events of its stream or the clock of its worker."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from offload.accelerators import accelerator_for
from offload.lanes import Lanes
from offload.lanes.accelerator import HostLane, StreamLane
from offload.plan import OpKind
from offload.subgroup import Subgroup
from offload.timeline import Span, lanes_of


class StepTimer:
    """Records one step on accelerator lanes, from construction until :meth:`spans`.

    Costs two timed events an operation, and makes the host wait for the compute lane once, to line up the clocks.

    Attributes:
        origin_s: when what was on the compute lane before was done, by the host's clock.
    """

    def __init__(self, lanes: Lanes, device: torch.device) -> None:
        self._records: list[tuple[str, str, object, object]] = []
        self._lanes = [lane for lane in (lanes.compute, lanes.h2d, lanes.d2h, lanes.host)
                       if isinstance(lane, (StreamLane, HostLane))]  # fmt: skip
        self._origin = torch.Event(device, enable_timing=True)
        self._origin.record(torch.accelerator.current_stream(device))
        self._origin.synchronize()
        self._accelerator = accelerator_for(device)
        self.origin_s = self._accelerator.host_time_s()
        for lane in self._lanes:
            lane.recorder = self._record

    def _record(self, lane: str, work: str, begin: object, end: object) -> None:
        self._records.append((lane, work, begin, end))

    def stop(self) -> None:
        for lane in self._lanes:
            lane.recorder = None

    def spans(self) -> list[Span]:
        """What ran when, in seconds since construction. The caller has synchronized the lanes."""
        return [Span(lane, work, self._seconds(begin), self._seconds(end)) for lane, work, begin, end in self._records]

    def _seconds(self, stamp: object) -> float:
        if isinstance(stamp, torch.Event):
            return float(self._origin.elapsed_time(stamp)) / 1e3
        return self._accelerator.stamp_s(stamp) - self.origin_s


def work_of(spans: Sequence[Span], subgroups: Sequence[Subgroup]) -> dict[str, tuple[float, float]]:
    """By lane, what the operations in ``spans`` did (bytes copied, or parameters updated) and the seconds they took."""
    amounts: dict[str, float] = defaultdict(float)
    seconds: dict[str, float] = defaultdict(float)
    for span in spans:
        kind, subgroup = OpKind(span.name[0]), subgroups[int(span.name[1:].split("@")[0])]
        if kind in (OpKind.PREFETCH, OpKind.FLUSH):
            amounts[span.lane] += subgroup.state_bytes
        elif kind is OpKind.GRAD_DOWN:
            amounts[span.lane] += subgroup.down_bytes
        elif kind is OpKind.UPLOAD:
            amounts[span.lane] += subgroup.param_bytes
        else:
            amounts[span.lane] += subgroup.numel
        seconds[span.lane] += span.duration_s
    return {lane: (amounts[lane], seconds[lane]) for lane in lanes_of(spans)}
