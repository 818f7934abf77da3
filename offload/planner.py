"""The search for a plan: which subgroups are updated where, through how many buffers, given rates and budgets.

Every candidate is a plan that the executor can run, and its time is that plan's on virtual lanes. The search only
decides which candidates are worth timing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offload.bounds import Bound, plan_bound
from offload.homes import Homes
from offload.perf_model import Prediction, Predictor, Rates
from offload.plan import Placement, Plan, lower
from offload.policy import evenly
from offload.scheduling import schedule
from offload.subgroup import Subgroup

GRID = 8  # shares timed before the search narrows down around the best of them


@dataclass(frozen=True, slots=True)
class Choice:
    """A plan, what it is called, where its states live, and what it takes.

    Attributes:
        bound: what no schedule of the same placements can beat, and the resource that sets it.
    """

    name: str
    homes: Homes
    prediction: Prediction
    bound: Bound

    @property
    def plan(self) -> Plan:
        return self.prediction.plan

    @property
    def update_s(self) -> float:
        return self.prediction.update_s

    @property
    def num_device(self) -> int:
        """Subgroups whose state visits the device."""
        return sum(where is Placement.DEVICE for where in self.plan.placements.values())


class Search:
    """Times plans for the same subgroups on the same machine."""

    def __init__(self, subgroups: Sequence[Subgroup], rates: Rates) -> None:
        self.subgroups = subgroups
        self.rates = rates
        self._predictor = Predictor(subgroups, rates)

    def choice(self, name: str, homes: Homes, plan: Plan) -> Choice:
        return Choice(name, homes, self._predictor.predict(plan), plan_bound(plan, self.subgroups, self.rates))

    def spread(self, homes: Homes, num_device: int) -> Plan:
        """``num_device`` of the visitors on the device, evenly spread among those that the CPU updates."""
        placements = spread(self.subgroups, homes, num_device)
        return schedule(
            placements, self.subgroups, self.rates, num_slots=homes.num_slots, num_staging=homes.num_staging
        )

    def best_share(self, homes: Homes) -> Choice:
        """The fastest of all shares of device updates; of equals the smallest, which moves fewest bytes."""
        if homes.num_staging == 0 and homes.visitors:  # no buffers for CPU updates, so there is no choice
            num_device = len(homes.visitors)
        else:
            num_device = minimum(lambda num: self.share_s(homes, num), len(homes.visitors))
        name = f"{num_device} of {len(self.subgroups)} visit"
        return self.choice(name, homes, self.spread(homes, num_device))

    def share_s(self, homes: Homes, num_device: int) -> float:
        """Predicted seconds of the update with ``num_device`` visits, evenly spread."""
        return self._predictor.predict(self.spread(homes, num_device)).update_s


def best_plan(subgroups: Sequence[Subgroup], rates: Rates, homes: Homes) -> Prediction:
    """The fastest plan, by prediction, in memory that is settled: any share of the visitors on the device."""
    return Search(subgroups, rates).best_share(homes).prediction


def spread(subgroups: Sequence[Subgroup], homes: Homes, num_device: int) -> list[Placement]:
    """Placements with ``num_device`` of the visitors on the device, evenly spread among the others."""
    placements = [Placement.RESIDENT if s.index in homes.residents else Placement.HOST for s in subgroups]
    for i in evenly(sorted(homes.visitors), num_device):
        placements[i] = Placement.DEVICE
    return placements


def stride_plan(homes: Homes, num_subgroups: int, update_stride: int) -> Plan:
    """The paper's: one of every ``update_stride`` subgroups visits (Deep Optimizer States, arXiv 2410.21316)."""
    placements = [
        Placement.RESIDENT if i in homes.residents
        else Placement.DEVICE if (i + 1) % update_stride == 0 and i in homes.visitors
        else Placement.HOST
        for i in range(num_subgroups)
    ]  # fmt: skip
    return lower(placements, num_slots=homes.num_slots, num_staging=homes.num_staging)


def minimum(seconds_of: Callable[[int], float], highest: int) -> int:
    """Where ``seconds_of`` is least in 0 to ``highest``, if it falls and then rises; of equals the smallest.

    Times a grid, then narrows down around its best point.
    """
    known: dict[int, float] = {}

    def time(nums: Sequence[int]) -> int:
        for num in nums:
            if 0 <= num <= highest and num not in known:
                known[num] = seconds_of(num)
        return min(sorted(known), key=lambda num: known[num])

    step = max(1, -(-highest // GRID))
    best = time([*range(0, highest, step), highest])
    while step > 1:
        step = -(-step // 2)
        best = time([best - step, best + step])
    return best
