"""What every set of lanes offers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol


def nothing() -> None:
    """Work that has a cost and accesses, but no bytes: what prediction and ordering checks submit."""


@dataclass(frozen=True, slots=True)
class Work:
    """One piece of work for a lane.

    ``run`` does it (on a stream lane: enqueues it). The rest describes it to lanes that do not run anything:
    ``num_bytes`` cross the link, ``numel`` parameters are updated, ``host_bytes`` are read and written in host memory
    by the CPU, and ``reads`` / ``writes`` name the buffers touched, by names that are equal for the same buffer.
    """

    name: str
    run: Callable[[], None] = nothing
    num_bytes: int = 0
    numel: int = 0
    host_bytes: int = 0
    reads: tuple[Hashable, ...] = ()
    writes: tuple[Hashable, ...] = ()


class Event(Protocol):
    """A point in a lane's work. Waiting for it raises what the work before it raised."""

    def synchronize(self) -> None:
        """Block the calling thread until the point is reached."""


class Lane(Protocol):
    """Runs work in the order of submission, each piece after the events it was submitted with."""

    def submit(self, work: Work, after: Iterable[Event | None] = ()) -> Event:
        """Queue ``work`` behind what the lane holds and behind ``after``; None stands for an event long past."""

    def wait(self, event: Event) -> None:
        """Hold all later work of this lane until ``event``."""

    def mark(self) -> Event:
        """An event for all that was submitted so far."""


@dataclass(frozen=True, slots=True)
class Lanes:
    """The lanes of one device.

    ``compute`` is the model's, ``update`` that of updates on the device: the same lane where these keep its order.
    """

    compute: Lane
    h2d: Lane
    d2h: Lane
    host: Lane
    update: Lane

    def in_order(self) -> Lanes:
        """These lanes, with updates on the device in the model's own order."""
        return replace(self, update=self.compute)

    def synchronize(self) -> None:
        """Block until every lane has done all that was submitted, and raise the first error of a worker."""
        for lane in (self.host, self.h2d, self.d2h, self.update, self.compute):
            lane.mark().synchronize()
