"""Inline lanes: all work is done at submission, in order. For parameters on the CPU, and as the reference order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from offload.lanes.base import Event, Lanes, Work


@dataclass(frozen=True, slots=True)
class Done:
    """An event that has always happened."""

    def synchronize(self) -> None:
        return


DONE = Done()


class InlineLane:
    """Runs work at once, in the calling thread."""

    def submit(self, work: Work, after: Iterable[Event | None] = ()) -> Event:
        work.run()
        return DONE

    def wait(self, event: Event) -> None:
        return

    def mark(self) -> Event:
        return DONE


def inline_lanes() -> Lanes:
    lane = InlineLane()
    return Lanes(compute=lane, h2d=lane, d2h=lane, host=lane, update=lane)
