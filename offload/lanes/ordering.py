"""Ordering lanes: run nothing, prove that waits and lane order order every two conflicting accesses to a buffer.

Each lane carries a vector clock (how far it has seen every lane). An access conflicts with an earlier one to the same
buffer if either writes; it is ordered after it if its lane's clock covers it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from offload.lanes.base import Event, Lanes, Work

Clock = dict[str, int]


@dataclass(frozen=True, slots=True)
class OrderingEvent:
    seen: Clock

    def synchronize(self) -> None:
        return


@dataclass(slots=True)
class _Access:
    lane: str
    time: int
    work: str


@dataclass(slots=True)
class AccessHistory:
    """What touched which buffer, and the pairs found unordered, one sentence each."""

    hazards: list[str] = field(default_factory=list)
    _writers: dict[Hashable, _Access] = field(default_factory=dict)
    _readers: dict[Hashable, list[_Access]] = field(default_factory=dict)

    def note(self, work: Work, lane: str, seen: Clock) -> None:
        access = _Access(lane, seen[lane], work.name)
        for buffer in work.reads:
            self._compare(buffer, "reads", access, seen, [self._writers.get(buffer)], "wrote")
            self._readers.setdefault(buffer, []).append(access)
        for buffer in work.writes:
            self._compare(buffer, "writes", access, seen, [self._writers.get(buffer)], "wrote")
            self._compare(buffer, "writes", access, seen, self._readers.pop(buffer, []), "read")
            self._writers[buffer] = access

    def _compare(
        self, buffer: Hashable, verb: str, access: _Access, seen: Clock, earlier: Iterable[_Access | None], did: str
    ) -> None:
        for other in earlier:
            if other is not None and seen.get(other.lane, 0) < other.time:
                self.hazards.append(
                    f"{access.work} on {access.lane} {verb} {buffer} which {other.work} on {other.lane} {did}, "
                    f"and no wait orders them"
                )


class OrderingLane:
    def __init__(self, name: str, history: AccessHistory) -> None:
        self.name = name
        self._seen: Clock = {name: 0}
        self._history = history

    def submit(self, work: Work, after: Iterable[Event | None] = ()) -> Event:
        for event in after:
            if event is not None:
                self.wait(event)
        self._seen[self.name] += 1
        self._history.note(work, self.name, self._seen)
        return self.mark()

    def wait(self, event: Event) -> None:
        assert isinstance(event, OrderingEvent)
        for lane, time in event.seen.items():
            self._seen[lane] = max(self._seen.get(lane, 0), time)

    def mark(self) -> OrderingEvent:
        return OrderingEvent(dict(self._seen))


def ordering_lanes(history: AccessHistory) -> Lanes:
    """Lanes that note every access in ``history``."""
    return Lanes(**{name: OrderingLane(name, history) for name in ("compute", "h2d", "d2h", "host", "update")})
