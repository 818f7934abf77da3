"""Virtual lanes: work advances a clock by what it costs. Running a plan on them is the performance model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from offload.lanes.base import Event, Lanes, Work

Cost = Callable[[Work], float]


@dataclass(frozen=True, slots=True)
class VirtualEvent:
    """A time on the virtual clock. ``on_host``: only the submitting thread can wait for it, as for a real worker."""

    time_s: float
    on_host: bool = False

    def synchronize(self) -> None:
        return


@dataclass(slots=True)
class VirtualClock:
    """Time of the thread that submits, and what ran when: (lane, work, start, end) in seconds."""

    now_s: float = 0.0
    spans: list[tuple[str, str, float, float]] = field(default_factory=list)


class VirtualLane:
    def __init__(self, name: str, clock: VirtualClock, cost: Cost) -> None:
        self.name = name
        self.free_s = 0.0
        self._clock = clock
        self._cost = cost

    def submit(self, work: Work, after: Iterable[Event | None] = ()) -> Event:
        start_s = self.free_s
        for event in after:
            assert event is None or isinstance(event, VirtualEvent)
            if event is None:
                continue
            if event.on_host and self.name != "host":  # a stream cannot wait for a worker: the submitter does
                self._clock.now_s = max(self._clock.now_s, event.time_s)
            start_s = max(start_s, event.time_s)
        start_s = max(start_s, self._clock.now_s)
        self.free_s = start_s + self._cost(work)
        self._clock.spans.append((self.name, work.name, start_s, self.free_s))
        return self.mark()

    def wait(self, event: Event) -> None:
        assert isinstance(event, VirtualEvent)
        self.free_s = max(self.free_s, event.time_s)

    def mark(self) -> VirtualEvent:
        return VirtualEvent(self.free_s, on_host=self.name == "host")


def virtual_lanes(clock: VirtualClock, costs: dict[str, Cost]) -> Lanes:
    """Lanes on ``clock``; ``costs`` gives seconds for a piece of work of the lanes compute, h2d, d2h and host."""
    return Lanes(**{name: VirtualLane(name, clock, costs[name]) for name in ("compute", "h2d", "d2h", "host")})
