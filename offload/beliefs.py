"""What is believed of a machine: rates and times as measured steps give them, robust against disturbed ones."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from offload.perf_model import Rates

WINDOW = 5  # measured steps whose median counts: two disturbed ones change nothing
GAIN_ALONE = 0.1  # without the other side, less of which is measured once more

# What a rate is measured by: the lane whose spans count, and whether by bytes or by parameters.
RATE_OF_LANE = {
    "h2d": "h2d_bytes_per_s",
    "d2h": "d2h_bytes_per_s",
    "host": "host_update_params_per_s",
    "compute": "device_update_params_per_s",
}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured step.

    Attributes:
        step: its number, from 0.
        work: by lane, bytes copied or parameters updated, and the seconds in which they were.
        update_s: from the first operation's start to the last one's end.
        passes_s: what the forward and backward passes before it took, where nothing of an update ran beside them: after
            a step that was measured too; else None.
    """

    step: int
    work: Mapping[str, tuple[float, float]]
    update_s: float
    passes_s: float | None = None


class _Cost:
    """Seconds that a lane takes for one unit of its work, in a plan with some number of updates on the other side.

    [Note: what the sides cost each other]
    The CPU's updates and the copies of visiting states take host memory (on some machines also cores) from each other,
    so each is faster in a plan with less of the other than in the one that was measured. A unit of work is taken to
    cost some time, measured in a step without the other side, and so much more for each subgroup that is updated there.
    Without the first, a plan in which both sides slow each other down would look like the best there is.
    """

    def __init__(self) -> None:
        self._alone_s: deque[float] = deque(maxlen=WINDOW)
        self._beside: deque[tuple[int, float]] = deque(maxlen=WINDOW)  # number on the other side, and the same beside

    def add(self, num_others: int, seconds: float) -> None:
        if num_others:
            self._beside.append((num_others, seconds))
        else:
            self._alone_s.append(seconds)

    def forget(self) -> None:
        self._alone_s.clear()
        self._beside.clear()

    @property
    def is_known(self) -> bool:
        return bool(self._alone_s or self._beside)

    @property
    def lacks_alone(self) -> bool:
        """Whether it was measured beside the other side, but not without it, or once and as slow: maybe disturbed."""
        if not self._beside or len(self._alone_s) > 1:
            return False
        beside_s = statistics.median(seconds for _, seconds in self._beside)
        return not self._alone_s or self._alone_s[0] > (1 - GAIN_ALONE) * beside_s

    @property
    def slowdown(self) -> float:
        """What the other side made of it, as a factor of its time alone; 1 while not both were measured."""
        if not (self._alone_s and self._beside):
            return 1.0
        return max(1.0, statistics.median(s for _, s in self._beside) / statistics.median_low(self._alone_s))

    def at(self, num_others: int) -> float:
        """Seconds in a plan with so many updates on the other side; to be asked only once some were measured."""
        if not self._beside:
            return statistics.median(self._alone_s)
        beside_s = statistics.median(seconds for _, seconds in self._beside)
        if not self._alone_s:
            return beside_s
        alone_s = min(statistics.median_low(self._alone_s), beside_s)
        for_each = statistics.median(max(0.0, seconds - alone_s) / num for num, seconds in self._beside)
        return alone_s + for_each * num_others


class Beliefs:
    """Rates as they were measured, from the median of their last few steps, or as they were told before.

    Args:
        start: what was told; None for nothing.
        num_visitors: subgroups that either side may update. See [Note: what the sides cost each other].
    """

    def __init__(self, start: Rates | None, num_visitors: int) -> None:
        self._start = start
        self._num_visitors = num_visitors
        self._costs = {lane: _Cost() for lane in RATE_OF_LANE}
        self._passes_s: deque[float] = deque(maxlen=WINDOW)

    def take_in(self, measurement: Measurement, num_visits: int) -> None:
        if measurement.passes_s is not None:
            self._passes_s.append(measurement.passes_s)
        for lane, (amount, seconds) in measurement.work.items():
            if amount > 0 and seconds > 0:
                self._costs[lane].add(self._num_others(lane, num_visits), seconds / amount)

    def _num_others(self, lane: str, num_visits: int) -> int:
        """Of the visitors, those updated on the other side than the one that ``lane`` works for."""
        return num_visits if lane == "host" else self._num_visitors - num_visits

    def forget(self) -> None:
        for cost in self._costs.values():
            cost.forget()
        self._passes_s.clear()

    @property
    def passes_s(self) -> float | None:
        """Of a step's forward and backward passes together; None while not measured."""
        return statistics.median(self._passes_s) if self._passes_s else None

    @property
    def lack_cpu_alone(self) -> bool:
        """Whether CPU updates were measured, but only beside visits."""
        return self._costs["host"].lacks_alone

    @property
    def lack_links_alone(self) -> bool:
        """Whether copies were measured, but only beside CPU updates."""
        return self._costs["h2d"].lacks_alone or self._costs["d2h"].lacks_alone

    def at(self, num_visits: int) -> Rates | None:
        """Rates of a step with so many visits; None while a rate is neither measured nor told."""
        measured = {
            RATE_OF_LANE[lane]: 1 / cost.at(self._num_others(lane, num_visits))
            for lane, cost in self._costs.items()
            if cost.is_known
        }
        if len(measured) == len(RATE_OF_LANE):  # measured beside each other, so that sharing is part of them
            return Rates(**measured)
        return None if self._start is None else replace(self._start, **measured)

    def without_cpu_updates(self) -> Rates | None:
        """Rates of a step in which all visitors visit, if copies were slowed down beside CPU updates as these were."""
        rates, slowdown = self.at(self._num_visitors), self._costs["host"].slowdown
        return rates and replace(
            rates,
            h2d_bytes_per_s=rates.h2d_bytes_per_s * slowdown,
            d2h_bytes_per_s=rates.d2h_bytes_per_s * slowdown,
        )
