"""Times cases that take turns, so that a disturbance of the machine meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Case = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds that one case took, a value for each turn."""

    turns_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.turns_s)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        if len(self.turns_s) < 2:
            return self.turns_s[0], self.turns_s[0]
        first, _, third = statistics.quantiles(self.turns_s, n=4, method="inclusive")
        return first, third

    def over(self, other: Times) -> float:
        """How many times as long as ``other``: the median of the ratios within each turn.

        Both ran within moments of each other in a turn, so a slow spell of the machine cancels out of the ratio.
        """
        return statistics.median(mine / theirs for mine, theirs in zip(self.turns_s, other.turns_s, strict=True))


def take_turns(cases: Mapping[str, Case], num_turns: int) -> dict[str, Times]:
    """Times each case once a turn, after one untimed turn. Each turn begins with another case."""
    turns_s: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases)
    for turn in range(-1, num_turns):
        for name in (*order[turn % len(order) :], *order[: turn % len(order)]):
            start_s = time.perf_counter()
            cases[name]()
            if turn >= 0:
                turns_s[name].append(time.perf_counter() - start_s)
    return {name: Times(tuple(each)) for name, each in turns_s.items()}
