"""Virtual lanes: work takes the time it would cost on some machine. Running a plan on them is the performance model.

Submitting only notes the work; :meth:`VirtualMachine.run` then finds when each piece starts and ends. Four things slow
work down that would be faster alone:

- a link whose two directions, both busy, are slower than each alone;
- updates on the device beside the model, on lanes of their own: each runs at half its speed meanwhile;
- one stream for both directions (``serial_link``), in which they take turns;
- host memory: what is running asks for so many bytes/s of it, and if that is more than there is, all of it slows by the
  same factor. Lanes of several ranks on one machine share its memory.

[Note: the submitting thread]
A stream cannot wait for a CPU worker, so the thread that submits does, as it does for any event it synchronizes with;
whatever it submits afterwards, on whatever lane, starts no earlier. Each rank has one such thread, or
two where updates have a conductor.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from offload.lanes.base import Event, Lanes, Work

LANE_NAMES = ("compute", "h2d", "d2h", "host", "update")
DEVICE_SHARE = 0.5  # of its speed that work on the device keeps beside work of the other lane there
MARK = "mark"  # the name of work that only marks a point


@dataclass(frozen=True, slots=True)
class Cost:
    """What work of one lane costs while nothing else runs.

    Attributes:
        seconds: time it takes.
        host_bytes: host memory that it reads and writes meanwhile, evenly.
    """

    seconds: Callable[[Work], float]
    host_bytes: Callable[[Work], float] = lambda work: 0.0


@dataclass(frozen=True, slots=True)
class TimedWork(Work):
    """Work whose time alone is known beforehand (a layer's forward), whatever the lane's costs."""

    seconds: float = 0.0


@dataclass(slots=True, eq=False)
class VirtualEvent:
    """One piece of work, and the event of its end. ``start_s`` and ``end_s`` are NaN until the machine has run."""

    lane: VirtualLane
    stream: _Stream
    name: str
    seconds: float
    host_bytes_per_s: float
    after: list[VirtualEvent]
    start_s: float = math.nan
    end_s: float = math.nan
    done: bool = False
    paired_speed: float = 1.0  # as the opposite stream allows; 1 is alone
    speed: float = 1.0  # as host memory allows too

    def synchronize(self) -> None:
        self.lane.thread.wait(self)


class VirtualThread:
    """The thread that submits; see [Note: the submitting thread]."""

    def __init__(self) -> None:
        self.waited_for: list[VirtualEvent] = []

    def wait(self, event: VirtualEvent) -> None:
        self.waited_for.append(event)


@dataclass(slots=True, eq=False)
class _Stream:
    """Work in order, one piece at a time, and the stream it shares a link or the device with."""

    waiting: deque[VirtualEvent] = field(default_factory=deque)
    last: VirtualEvent | None = None  # submitted
    running: VirtualEvent | None = None
    opposite: _Stream | None = None
    duplex_speed: float = 1.0  # while the opposite stream runs too


class VirtualLane:
    def __init__(self, name: str, cost: Cost, stream: _Stream, thread: VirtualThread) -> None:
        self.name = name
        self.thread = thread
        self._cost = cost
        self._stream = stream
        self._waits: list[VirtualEvent] = []
        self._num_seen = 0  # of what the thread waited for

    def submit(self, work: Work, after: Iterable[Event | None] = ()) -> Event:
        needed, thread = self._waits, self.thread
        self._waits = []
        for event in after:
            if event is not None:
                assert isinstance(event, VirtualEvent)
                if event.lane.name == "host" and self.name != "host":
                    thread.wait(event)
                elif not event.done:
                    needed.append(event)
        if self._num_seen < len(thread.waited_for):
            needed += thread.waited_for[self._num_seen :]
            self._num_seen = len(thread.waited_for)
        seconds = work.seconds if isinstance(work, TimedWork) else self._cost.seconds(work)
        host_bytes_per_s = self._cost.host_bytes(work) / seconds if seconds else 0.0
        submitted = VirtualEvent(self, self._stream, work.name, seconds, host_bytes_per_s, needed)
        self._stream.waiting.append(submitted)
        self._stream.last = submitted
        return submitted

    def wait(self, event: Event) -> None:
        assert isinstance(event, VirtualEvent)
        self._waits.append(event)

    def mark(self) -> Event:
        if self._waits:
            return self.submit(TimedWork(MARK))
        return self._stream.last or VirtualEvent(self, self._stream, MARK, 0.0, 0.0, [], 0.0, 0.0, done=True)


class VirtualMachine:
    """Clock and host memory of one machine, and the lanes of its ranks.

    Args:
        host_bytes_per_s: bandwidth of host memory, reads and writes together.
    """

    def __init__(self, host_bytes_per_s: float = math.inf) -> None:
        self.now_s = 0.0
        self.events: list[VirtualEvent] = []  # finished, in the order of their starts
        self._host_bytes_per_s = host_bytes_per_s
        self._streams: list[_Stream] = []

    def lanes(
        self,
        costs: Mapping[str, Cost],
        *,
        duplex_speeds: tuple[float, float] = (1.0, 1.0),
        serial_link: bool = False,
        overlapped: bool = False,
    ) -> Lanes:
        """The lanes of one more rank.

        Args:
            costs: of work on each lane of :data:`LANE_NAMES`.
            duplex_speeds: share of its rate alone that h2d, and d2h, keeps while the other is busy.
            serial_link: both directions in one stream, as where one thing moves down before the next moves up.
            overlapped: the compute lane has a submitting thread of its own, as beside a conductor.
        """
        thread = VirtualThread()
        threads = {name: VirtualThread() if overlapped and name == "compute" else thread for name in LANE_NAMES}
        streams = {name: _Stream() for name in LANE_NAMES}
        shared = [("compute", "update", DEVICE_SHARE), ("update", "compute", DEVICE_SHARE)]
        if serial_link:
            streams["d2h"] = streams["h2d"]
        else:
            shared += [("h2d", "d2h", duplex_speeds[0]), ("d2h", "h2d", duplex_speeds[1])]
        for name, opposite, speed in shared:
            streams[name].opposite, streams[name].duplex_speed = streams[opposite], speed
        self._streams += dict.fromkeys(streams.values())
        return Lanes(**{name: VirtualLane(name, costs[name], streams[name], threads[name]) for name in LANE_NAMES})

    def run(self) -> float:
        """Run all that was submitted and not run yet; the time at which the last piece ends, in seconds."""
        running: list[VirtualEvent] = []
        while True:
            while self._start(running):
                pass
            if not running:
                break
            self._share(running)
            self.now_s = now_s = min([event.end_s for event in running])
            still_running = []
            for event in running:
                if event.end_s > now_s:
                    still_running.append(event)
                else:
                    event.done = True
                    event.stream.running = None
            running = still_running
        assert not any(stream.waiting for stream in self._streams), "work waits for itself"
        return self.now_s

    def _start(self, running: list[VirtualEvent]) -> bool:
        """Start the next work of each idle stream whose events are done; True if some took no time at all."""
        again, now_s = False, self.now_s
        for stream in self._streams:
            if stream.running is not None or not stream.waiting:
                continue
            event = stream.waiting[0]
            for needed in event.after:
                if not needed.done:
                    break
            else:
                stream.waiting.popleft()
                event.after = []  # they may be forgotten
                event.start_s, event.end_s = now_s, now_s + event.seconds
                self.events.append(event)
                if event.seconds:
                    stream.running = event
                    running.append(event)
                else:
                    event.done = again = True
        return again

    def _share(self, running: list[VirtualEvent]) -> None:
        """Give each piece of running work its speed from now on, and the end that follows from it."""
        asked = 0.0  # bytes/s of host memory
        for event in running:
            opposite = event.stream.opposite
            event.paired_speed = 1.0 if opposite is None or opposite.running is None else event.stream.duplex_speed
            asked += event.paired_speed * event.host_bytes_per_s
        squeeze = min(1.0, self._host_bytes_per_s / asked) if asked else 1.0
        for event in running:
            speed = event.paired_speed * squeeze if event.host_bytes_per_s else event.paired_speed
            if speed != event.speed:
                event.end_s = self.now_s + (event.end_s - self.now_s) * event.speed / speed
                event.speed = speed
