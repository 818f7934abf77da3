"""What is believed of a machine: rates and times as measured steps give them, robust against disturbed ones."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from offload.perf_model import Rates

WINDOW = 5  # measured steps whose median counts: two disturbed ones change nothing

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


class Beliefs:
    """Rates as they were measured, each the median of its last few steps, or as they were told before.

    [Note: what visits cost the CPU]
    Copies and device updates take host memory (on some machines also cores) from the CPU's updates, so these are faster
    in a plan with fewer visits than in the one that was measured. A CPU update of one parameter is taken to cost some
    time, measured in a step without visits, and so much more for each visit. Without the first, a plan in which both
    sides slow each other down would look like the best there is.
    """

    def __init__(self, start: Rates | None) -> None:
        self._start = start
        self._windows: dict[str, deque[float]] = {lane: deque(maxlen=WINDOW) for lane in RATE_OF_LANE}
        self._alone_s: deque[float] = deque(maxlen=WINDOW)  # of a parameter's CPU update, without visits
        self._beside: deque[tuple[int, float]] = deque(maxlen=WINDOW)  # number of visits, and the same beside them
        self._passes_s: deque[float] = deque(maxlen=WINDOW)

    def take_in(self, measurement: Measurement, num_visits: int) -> None:
        if measurement.passes_s is not None:
            self._passes_s.append(measurement.passes_s)
        for lane, (amount, seconds) in measurement.work.items():
            if amount > 0 and seconds > 0:
                self._windows[lane].append(amount / seconds)
                if lane == "host" and num_visits:
                    self._beside.append((num_visits, seconds / amount))
                elif lane == "host":
                    self._alone_s.append(seconds / amount)

    def forget(self) -> None:
        for window in self._windows.values():
            window.clear()
        self._alone_s.clear()
        self._beside.clear()
        self._passes_s.clear()

    @property
    def passes_s(self) -> float | None:
        """Of a step's forward and backward passes together; None while not measured."""
        return statistics.median(self._passes_s) if self._passes_s else None

    @property
    def lack_alone(self) -> bool:
        """Whether CPU updates were measured, but only beside visits."""
        return bool(self._beside) and not self._alone_s

    def at(self, num_visits: int) -> Rates | None:
        """Rates of a step with so many visits; None while a rate is neither measured nor told."""
        measured = {RATE_OF_LANE[lane]: statistics.median(window) for lane, window in self._windows.items() if window}
        if self._alone_s and self._beside:
            beside_s = statistics.median(seconds for _, seconds in self._beside)
            alone_s = min(statistics.median(self._alone_s), beside_s)
            per_visit_s = statistics.median(max(0.0, seconds - alone_s) / num for num, seconds in self._beside)
            measured[RATE_OF_LANE["host"]] = 1 / (alone_s + per_visit_s * num_visits)
        if len(measured) == len(RATE_OF_LANE):  # measured beside each other, so that sharing is part of them
            return Rates(**measured)
        return None if self._start is None else replace(self._start, **measured)
