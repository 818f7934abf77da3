"""The search that ``plan="auto"`` does once it knows the machine's rates."""

from __future__ import annotations

from collections.abc import Sequence

from offload.homes import Homes
from offload.perf_model import Prediction, Rates, predict
from offload.plan import Placement, Plan, lower
from offload.subgroup import Subgroup

MAX_CANDIDATES = 33  # shares that the search tries; finer steps change the predicted time by less than rates vary


def best_plan(subgroups: Sequence[Subgroup], rates: Rates, homes: Homes) -> Prediction:
    """The fastest plan, by prediction, among shares of device updates from none to all, evenly spread.

    Ties go to the smaller share, which moves fewer bytes.
    """
    visitors = sorted(homes.visitors)
    steps = min(len(visitors), MAX_CANDIDATES - 1)
    num_device = [round(step * len(visitors) / steps) for step in range(steps + 1)] if steps else [0]
    candidates = (predict(_spread(subgroups, homes, visitors, num), subgroups, rates) for num in num_device)
    return min(candidates, key=lambda prediction: prediction.update_s)  # the first of equals


def _spread(subgroups: Sequence[Subgroup], homes: Homes, visitors: Sequence[int], num_device: int) -> Plan:
    """``num_device`` of the visitors on the device, evenly spread among those updated by the CPU."""
    placements = [Placement.RESIDENT if s.index in homes.residents else Placement.HOST for s in subgroups]
    for rank, i in enumerate(visitors):
        if (rank + 1) * num_device // len(visitors) > rank * num_device // len(visitors):
            placements[i] = Placement.DEVICE
    return lower(placements, num_slots=homes.num_slots, num_staging=homes.num_staging)
