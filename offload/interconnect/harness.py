"""Time work that starts together: streams are blocked, filled, released, and their events read.

[Note: how the streams are blocked]
No call of ``torch.accelerator`` holds a stream until the host says so. A gate does: copies on a stream of its own,
whose end every measured stream waits for. That it was still closed when the last piece was enqueued is checked, not
assumed: an event on an idle stream stamps that moment on the device's clock. Where the gate had opened before, a longer
one is tried. So no measured stream ever waits for the thread that fills it.

Work of the host is stamped by events on the same idle stream, so every time is one clock's: the device's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from offload.accelerators import Accelerator

_GATE_BYTES = 4 << 20  # each takes longer than to enqueue it, on any link
_MAX_GATE_COPIES = 4096
_MAX_PIECES = 512  # of one activity: more launches would take longer than what they launch
_CLOCK_STEP_S = 1e-6  # events of real devices tick in half microseconds


@dataclass(frozen=True, slots=True)
class Activity:
    """Something that keeps a part of the machine busy.

    ``run`` does one piece of it: enqueues it on the current stream, or with ``on_host`` does it on the calling thread.
    ``amount`` is what one piece does, in ``unit``: bytes copied, parameters updated or floating-point operations.
    """

    name: str
    run: Callable[[], object]
    amount: float
    unit: str
    on_host: bool = False


@dataclass(frozen=True, slots=True)
class Timing:
    """When each activity ran, in seconds since the release, in the order they were given.

    ``was_held``: everything was enqueued before the release.
    """

    begins_s: tuple[float, ...]
    ends_s: tuple[float, ...]
    was_held: bool

    def duration_s(self, index: int) -> float:
        return max(self.ends_s[index] - self.begins_s[index], 1e-9)

    @property
    def total_s(self) -> float:
        """From the release to the last end."""
        return max(self.ends_s)


class Harness:
    """Runs activities on streams of one device, each on its own, at most one of them on the host."""

    def __init__(self, accelerator: Accelerator, repeats: int) -> None:
        if repeats < 1:
            raise ValueError(f"repeats={repeats} measures nothing; give 1 or more")
        self.accelerator = accelerator
        self.repeats = repeats
        self._gate_source = accelerator.pinned_empty(_GATE_BYTES)
        self._gate_target = torch.empty(_GATE_BYTES, dtype=torch.uint8, device=accelerator.device)
        self._gate_stream, self._idle = torch.Stream(accelerator.device), torch.Stream(accelerator.device)
        self._streams: list[torch.Stream] = []
        self._num_gate_copies = 1

    def time(self, *work: tuple[Activity, int], gated: bool = True) -> list[Timing]:
        """Run each activity so many times, all of them together, over and over after one run that does not count.

        With ``gated`` False nothing is blocked: for work that makes the host wait, which a gate would wait for.
        """
        while len(self._streams) < len(work):
            self._streams.append(torch.Stream(self.accelerator.device))
        self._run(work, gated)
        timings: list[Timing] = []
        while len(timings) < self.repeats:
            timing = self._run(work, gated)
            if gated and not timing.was_held and self._num_gate_copies < _MAX_GATE_COPIES:
                self._num_gate_copies *= 2
                timings.clear()
                continue
            timings.append(timing)
        return timings

    def alone_s(self, activity: Activity, count: int = 1, *, gated: bool = True) -> float:
        """Median seconds of ``count`` pieces with nothing beside them."""
        return statistics.median(timing.duration_s(0) for timing in self.time((activity, count), gated=gated))

    def pieces(self, activity: Activity, min_s: float) -> int:
        """How many pieces take ``min_s`` or more, by the time that a few of them take; never more than 512."""
        few = 4
        return max(1, min(_MAX_PIECES, round(few * min_s / self.alone_s(activity, few) + 0.5)))

    def outlasted(self, measured: tuple[Activity, int], *others: tuple[Activity, int]) -> list[Timing]:
        """As :meth:`time`, but ``others`` repeated until in every run each of them ends after ``measured``."""
        counts = [count for _, count in others]
        while True:
            timings = self.time(measured, *((other, n) for (other, _), n in zip(others, counts, strict=True)))
            too_short = [
                i for i in range(len(counts)) if any(timing.ends_s[i + 1] < timing.ends_s[0] for timing in timings)
            ]
            if not too_short:
                return timings
            for i in too_short:
                counts[i] *= 2

    # ---- one run

    def _run(self, work: Sequence[tuple[Activity, int]], gated: bool) -> Timing:
        torch.accelerator.synchronize(self.accelerator.device)
        origin, opened, filled = self._event(), self._event(), self._event()
        stamps = [(self._event(), self._event()) for _ in work]
        origin.record(self._gate_stream)
        if gated:
            with self._gate_stream:
                for _ in range(self._num_gate_copies):
                    self._gate_target.copy_(self._gate_source, non_blocking=True)
        opened.record(self._gate_stream)
        for (activity, count), stream, stamp in zip(work, self._streams, stamps, strict=False):
            if not activity.on_host:
                stream.wait_event(opened)
                self._enqueue(activity, count, stream, stamp)
        filled.record(self._idle)
        for (activity, count), stamp in zip(work, stamps, strict=True):
            if activity.on_host:
                opened.synchronize()
                self._do(activity, count, stamp)
        torch.accelerator.synchronize(self.accelerator.device)
        opened_s = _seconds(origin, opened)
        return Timing(
            begins_s=tuple(_seconds(origin, begin) - opened_s for begin, _ in stamps),
            ends_s=tuple(_seconds(origin, end) - opened_s for _, end in stamps),
            was_held=gated and _seconds(origin, filled) <= opened_s + _CLOCK_STEP_S,
        )

    def _event(self) -> torch.Event:
        return torch.Event(self.accelerator.device, enable_timing=True)

    @staticmethod
    def _enqueue(activity: Activity, count: int, stream: torch.Stream, stamp: tuple[torch.Event, torch.Event]) -> None:
        stamp[0].record(stream)
        with stream:
            for _ in range(count):
                activity.run()
        stamp[1].record(stream)

    def _do(self, activity: Activity, count: int, stamp: tuple[torch.Event, torch.Event]) -> None:
        stamp[0].record(self._idle)
        start_s = time.perf_counter()
        for _ in range(count):
            activity.run()
        self.accelerator.charge_host_time(time.perf_counter() - start_s, activity.name)
        stamp[1].record(self._idle)


def _seconds(origin: torch.Event, event: torch.Event) -> float:
    return float(origin.elapsed_time(event)) / 1e3
