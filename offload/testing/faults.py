"""Faults on demand: the n-th allocation, pinning, copy, launch or host task fails, on the emulated device or on lanes.

    with faults.fail("copy", nth=3) as fault:
        optimizer.step()          # raises RuntimeError: sim: injected failure of copy 3
    assert fault.happened

Occurrences are counted from the beginning of the block, over all devices and threads of the process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, get_args

from offload.accelerators.sim_device import loaded
from offload.lanes import Event, Lane, Lanes, Work

# What may fail: an allocation of device memory (torch.OutOfMemoryError), pinning of host memory, a copy between host
# and device or on it, the launch of a kernel, an update on a host worker (RuntimeError).
Kind = Literal["allocation", "pin", "copy", "launch", "task"]
_KINDS: tuple[Kind, ...] = get_args(Kind)
FOREVER = 2**63


class InjectedError(RuntimeError):
    """What work on a lane raises that was told to fail."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that was asked for."""

    kind: Kind
    nth: int

    @property
    def num_seen(self) -> int:
        """How often the fault could have happened so far."""
        return int(loaded().num_occurrences(_KINDS.index(self.kind)))

    @property
    def happened(self) -> bool:
        return self.num_seen >= self.nth


@contextmanager
def fail(kind: Kind, nth: int = 1, count: int = 1) -> Iterator[Fault]:
    """Let ``count`` occurrences of ``kind`` on the emulated device fail, from the ``nth`` within this block on.

    The failure is raised where the program asks for the work, before any of it is done. One fault of a kind at a time.

    Args:
        count: ``FOREVER`` for all from the ``nth`` on.

    Raises:
        ValueError: an unknown kind, or numbers below 1.
        RuntimeError: the emulated device is not loaded.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, not {kind!r}")
    if nth < 1 or count < 1:
        raise ValueError(f"nth={nth} and count={count} must be at least 1: the first occurrence has number 1")
    loaded().set_fault(_KINDS.index(kind), nth, count)
    try:
        yield Fault(kind, nth)
    finally:
        loaded().set_fault(_KINDS.index(kind), 0, 0)


@dataclass(slots=True)
class _FailingLane:
    """A lane whose n-th piece of work raises when it runs."""

    lane: Lane
    nth: int
    num_submitted: int = 0

    def submit(self, work: Work, after: Iterable[Event | None] = ()) -> Event:
        self.num_submitted += 1
        if self.num_submitted == self.nth:
            work = replace(work, run=_raise_injected)
        return self.lane.submit(work, after)

    def wait(self, event: Event) -> None:
        self.lane.wait(event)

    def mark(self) -> Event:
        return self.lane.mark()


def _raise_injected() -> None:
    raise InjectedError("injected failure of work on a lane")


def failing_lanes(lanes: Lanes, lane: Literal["compute", "h2d", "d2h", "host", "update"], nth: int = 1) -> Lanes:
    """``lanes`` of any kind, of which one raises :class:`InjectedError` in place of its ``nth`` piece of work."""
    if nth < 1:
        raise ValueError(f"nth={nth} must be at least 1: the first piece of work has number 1")
    return replace(lanes, **{lane: _FailingLane(getattr(lanes, lane), nth)})
