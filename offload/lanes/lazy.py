"""Lazy lanes: work runs as late, or in as odd an order, as its declared waits allow.

A missing wait then gives wrong numbers, on a machine without an accelerator and the same way each time: the order is
drawn from a seed. Each lane is in order, as a stream is; across lanes only waits order work.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from offload.lanes.base import Event, Lanes, Work


@dataclass(eq=False, slots=True)
class LazyEvent:
    world: LazyWorld
    done: bool = False

    def synchronize(self) -> None:
        self.world.run_until(self)


class LazyLane:
    def __init__(self, world: LazyWorld) -> None:
        self.world = world
        self.queue: deque[tuple[Work, tuple[LazyEvent, ...], LazyEvent]] = deque()

    def submit(self, work: Work, after: Iterable[Event | None] = ()) -> Event:
        event = LazyEvent(self.world)
        waits = []
        for needed in after:
            assert needed is None or isinstance(needed, LazyEvent)
            if needed is not None:
                waits.append(needed)
        self.queue.append((work, tuple(waits), event))
        self.world.maybe_run()
        return event

    def wait(self, event: Event) -> None:
        self.submit(Work("wait"), after=(event,))

    def mark(self) -> Event:
        return self.submit(Work("mark"))

    @property
    def runnable(self) -> bool:
        return bool(self.queue) and all(event.done for event in self.queue[0][1])

    def run_one(self) -> None:
        work, _, event = self.queue.popleft()
        work.run()
        event.done = True


class LazyWorld:
    """Decides which lane runs next.

    Args:
        seed: of the order in which runnable lanes are picked.
        eagerness: probability, after each submission, that a runnable piece runs at once: 0 runs nothing before it
            is waited for, values towards 1 run nearly everything at submission.
        favour: name of a lane that runs whenever it can, the others only when it cannot; None draws at random.
            The adversaries that find overwrites and late producers are those that favour one lane.
    """

    LANES = ("compute", "h2d", "d2h", "host", "update")

    def __init__(self, seed: int, *, eagerness: float = 0.0, favour: str | None = None) -> None:
        self._random = random.Random(seed)
        self._eagerness = eagerness
        self._lanes = {name: LazyLane(self) for name in self.LANES}
        self._favoured = None if favour is None else self._lanes[favour]

    def lanes(self) -> Lanes:
        return Lanes(**self._lanes)

    def maybe_run(self) -> None:
        while self._random.random() < self._eagerness and self._run_one():
            pass

    def run_until(self, event: LazyEvent) -> None:
        while not event.done:
            if not self._run_one():
                raise RuntimeError("deadlock: no lane can go on; an event is waited for that no submitted work reaches")

    def _run_one(self) -> bool:
        if self._favoured is not None and self._favoured.runnable:
            self._favoured.run_one()
            return True
        runnable = [lane for lane in self._lanes.values() if lane.runnable]
        if not runnable:
            return False
        self._random.choice(runnable).run_one()
        return True


def lazy_lanes(seed: int, *, eagerness: float = 0.0, favour: str | None = None) -> Lanes:
    """Lanes over CPU tensors whose order is adversarial; see :class:`LazyWorld`."""
    return LazyWorld(seed, eagerness=eagerness, favour=favour).lanes()
