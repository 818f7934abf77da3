"""Accelerator lanes: four streams and a worker thread, over the device-agnostic torch API."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from offload.accelerators import Accelerator, accelerator_for
from offload.lanes.base import Event, Lanes, Work
from offload.watchdog import wait_for

_IDLE = "has nothing to do"
_NUM_ENDS = 256  # pieces of work of a stream that are remembered by name

# Called once for each piece of work of a timed lane: lane's name, work's name, and its begin and end: events of a
# stream, or stamps of the host's clock.
Recorder = Callable[[str, str, object, object], None]


class HostEvent:
    """Completion of work on the host lane. Waiting for it raises the work's exception, with its traceback."""

    __slots__ = ("_accelerator", "_future", "_worker", "name")

    def __init__(self, name: str, future: Future[object], worker: _Worker, accelerator: Accelerator) -> None:
        self.name = name
        self._future = future
        self._worker = worker
        self._accelerator = accelerator

    def synchronize(self) -> None:
        """Raises also :class:`offload.watchdog.StuckStepError`, if it takes too long."""
        self._accelerator.host_join(wait_for(self._future, self._describe, self._worker.started))

    def _describe(self) -> str:
        return f"the step waits for {self.name} of lane host, whose worker {self._worker.doing}"


@dataclass(slots=True)
class _Worker:
    """A worker thread as others see it: itself, once it runs, and what it does, for whoever waits too long."""

    started: list[threading.Thread] = field(default_factory=list)
    doing: str = _IDLE


class StreamEvent(torch.Event):
    """A point in a stream that knows which work it is the end of. (torch takes no subclass where it measures time.)"""

    name = "an event"

    def __str__(self) -> str:
        return self.name


class StreamLane:
    """Work enqueued on one stream, or on whatever stream is current when ``stream`` is None (the compute lane).

    A stream cannot wait for a host thread, so the thread that submits waits for host events itself: plans put such
    work (uploads) late enough that it seldom has to.
    """

    def __init__(self, name: str, device: torch.device, stream: torch.Stream | None) -> None:
        self.name = name
        self.recorder: Recorder | None = None
        self._device = device
        self._stream = stream
        self._accelerator = accelerator_for(device)
        self._ends: deque[tuple[str, torch.Event]] = deque(maxlen=_NUM_ENDS)  # of the last pieces of work, by name

    @property
    def stream(self) -> torch.Stream:
        return torch.accelerator.current_stream(self._device) if self._stream is None else self._stream

    def submit(self, work: Work, after: Iterable[Event | None] = ()) -> Event:
        stream = self.stream
        for event in after:
            self._wait(stream, event)
        begin = self._record(stream) if self.recorder else None
        with stream, self._accelerator.annotate(f"offload {self.name} {work.name}"):
            work.run()
        end = self._record(stream, work.name)
        self._ends.append((work.name, end))
        if self.recorder and begin is not None:
            self.recorder(self.name, work.name, begin, end)
        return end

    def wait(self, event: Event) -> None:
        self._wait(self.stream, event)

    def mark(self) -> torch.Event:
        return self._record(self.stream)

    def unfinished(self) -> str | None:
        """The first of the last pieces of work that is not done; None if all are. From any thread."""
        first = next((name for name, end in list(self._ends) if not end.query()), None)
        return None if first is None else f"{self.name} has not done {first}"

    def _record(self, stream: torch.Stream, name: str = "a mark") -> torch.Event:
        if self.recorder is None:
            event: torch.Event = StreamEvent(self._device)
            event.name = f"{name} of lane {self.name}"  # type: ignore[attr-defined]
        else:
            event = torch.Event(self._device, enable_timing=True)
        event.record(stream)
        return event

    @staticmethod
    def _wait(stream: torch.Stream, event: Event | None) -> None:
        if isinstance(event, torch.Event):
            stream.wait_event(event)
        elif event is not None:
            event.synchronize()


class HostLane:
    """Work run by one worker thread, in order, off the caller's thread (kernels release the GIL).

    Once a piece of work has failed, nothing later runs: every later event raises the same exception.
    """

    name = "host"

    def __init__(self, accelerator: Accelerator) -> None:
        self.recorder: Recorder | None = None
        self._accelerator = accelerator
        self._error: BaseException | None = None
        self._worker = _Worker()
        self._queue = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="offload-host",
            initializer=start_worker,
            initargs=(accelerator, self._worker.started),
        )

    def submit(self, work: Work, after: Iterable[Event | None] = ()) -> Event:
        mark = self._accelerator.host_mark()
        future = self._queue.submit(self._run, work, tuple(after), mark)
        return HostEvent(work.name, future, self._worker, self._accelerator)

    def wait(self, event: Event) -> None:
        self.submit(Work("wait"), after=(event,))

    def mark(self) -> Event:
        return self.submit(Work("mark"))

    def unfinished(self) -> str | None:
        """What the worker does now; None if nothing. From any thread."""
        return None if self._worker.doing == _IDLE else f"the worker of {self.name} {self._worker.doing}"

    def _run(self, work: Work, after: tuple[Event | None, ...], submitted: object) -> object:
        """Run ``work`` after ``after`` and after what the submitting thread did; returns the mark of its end."""
        if self._error is not None:
            raise self._error
        accelerator = self._accelerator
        try:
            accelerator.host_join(submitted)
            for event in after:
                if event is not None:
                    self._worker.doing = f"waits for {event} before {work.name}"
                    event.synchronize()
            self._worker.doing = f"runs {work.name}"
            if work.numel:
                accelerator.begin_host_task()
            begin, start_s = accelerator.host_stamp(), time.perf_counter()
            with accelerator.annotate(f"offload {self.name} {work.name}"):
                work.run()
            took_s = time.perf_counter() - start_s
            accelerator.charge_host_time(took_s, work.name, numel=work.numel, num_bytes=work.host_bytes)
            if self.recorder:
                self.recorder(self.name, work.name, begin, accelerator.host_stamp())
            return accelerator.host_mark()
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._worker.doing = _IDLE


def start_worker(accelerator: Accelerator, started: list[threading.Thread] | None = None) -> None:
    """What a thread that works for ``accelerator`` does first; it adds itself to ``started``."""
    if started is not None:
        started.append(threading.current_thread())
    # A new thread's device is number 0: waiting for an event from there would open a context on it, in every rank.
    if accelerator.device.type != "cpu":
        torch.accelerator.set_device_index(accelerator.device)
    accelerator.own_host_clock()


def accelerator_lanes(device: torch.device) -> Lanes:
    """Lanes of ``device``: the current stream, one for each link direction, one for updates, and a worker thread."""
    return Lanes(
        compute=StreamLane("compute", device, None),
        h2d=StreamLane("h2d", device, torch.Stream(device)),
        d2h=StreamLane("d2h", device, torch.Stream(device)),
        host=HostLane(accelerator_for(device)),
        update=StreamLane("update", device, torch.Stream(device)),
    )


def unfinished(lanes: Lanes) -> str:
    """What accelerator lanes have yet to do, for whoever waits too long: the first piece of work of each."""
    own = [lane for lane in (lanes.h2d, lanes.d2h, lanes.update, lanes.compute, lanes.host)
           if isinstance(lane, (StreamLane, HostLane))]  # fmt: skip
    said = [text for lane in own if (text := lane.unfinished()) is not None]
    return ", ".join(said) or "what it waits for is none of its own work, but the model's, or another rank's"
