"""Choosing plans while training runs: measured times correct the rates, and the plan follows, few subgroups at a time.

Which plan runs never changes a bit of the result, so the controller may be wrong without harm but time. It sees nothing
but measurements: fed with those of a log, it decides again what it decided then.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

from offload.beliefs import Beliefs, Measurement
from offload.candidates import sampled
from offload.homes import Homes, first_plan
from offload.layer_costs import BACKWARD_OPERATIONS, FORWARD_OPERATIONS, Layer
from offload.perf_model import Predictor, Rates
from offload.phases import Hiding, predict_step
from offload.plan import Placement, Plan
from offload.planner import Search, minimum, spread
from offload.policy import Overlap
from offload.scheduling import schedule
from offload.subgroup import Subgroup

WARM_UP_STEPS = 1  # first touch of memory and compilation of kernels are not what later steps cost
HYSTERESIS = 0.02  # gain, by prediction, below which the plan stays: less than rates vary from step to step
MOVED_SHARE = 8  # one of so many visitors moves at a time,
MIN_MOVED = 2  # and so many at least
SETTLED = 3  # measurements that leave the plan alone before they become rarer
HOPE = 0.25  # what all on the device may be predicted to take more, and is tried still
SURPRISE = 0.1  # error of a prediction after which the next step is measured again
MAX_INTERVAL = 16  # steps between measurements at the most
PROBE_AFTER = 8  # measurements without an update on one side, after which one subgroup goes there to be measured
MAX_SAMPLE = 48  # subgroups that the search for the best share looks at
NUM_LAYERS = 24  # that the model is taken to have where a whole step is predicted
AUTO_OVERLAPS: tuple[Overlap, ...] = ("none", "next_forward")  # those that need no promise of the user's

Action = Literal["kept", "reordered", "moved", "returned", "probed"]


class _Choice(NamedTuple):
    action: Action
    plan: Plan
    current_s: float
    target_s: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What a measurement led to.

    Attributes:
        ran: the plan that was measured.
        predicted_s: its update by the rates known before; None when there were none.
        rates: known after it.
        action: what was done about the plan: "probed" moves subgroups only to measure a side, "reordered" none,
            "returned" moves them towards a share that was measured to be shorter.
        moved: subgroups whose placement changes with the next step.
        plan: of the next step.
        current_s, target_s: predicted at ``rates``: of the plan that ran, and of the best share there is.
        step_s: predicted seconds of a whole step of ``plan`` by how its update hides; empty while forward and backward
            were not measured.
    """

    measurement: Measurement
    ran: Plan
    predicted_s: float | None
    rates: Rates
    action: Action
    moved: tuple[int, ...]
    plan: Plan
    current_s: float
    target_s: float
    step_s: Mapping[Overlap, float]

    @property
    def overlap(self) -> Overlap | None:
        """How the update hides best: under the next forward, unless a step is shorter without. None for not known."""
        if not self.step_s:
            return None
        return "none" if self.step_s["none"] < (1 - HYSTERESIS) * self.step_s["next_forward"] else "next_forward"

    @property
    def error(self) -> float | None:
        """Prediction over measurement less 1; None when nothing was predicted."""
        return None if self.predicted_s is None else self.predicted_s / self.measurement.update_s - 1

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        seen = self.measurement
        return {
            "measurement": {
                "step": seen.step, "work": dict(seen.work), "update_s": seen.update_s, "passes_s": seen.passes_s,
            },
            "ran": str(self.ran),
            "predicted_s": self.predicted_s,
            "rates": asdict(self.rates),
            "action": self.action,
            "moved": self.moved,
            "plan": str(self.plan),
            "current_s": self.current_s,
            "target_s": self.target_s,
            "step_s": dict(self.step_s),
        }  # fmt: skip


class Controller:
    """Measures, corrects and re-plans for one layout of subgroups.

    Args:
        subgroups, homes: what there is to place; homes never change.
        start: rates believed until measured, for example a profile's; None to measure both sides first.
        first_step: number of the first step, which warms up and is not measured.
        early_gradients: gradients come down in backward, however the update hides.
    """

    def __init__(
        self,
        subgroups: Sequence[Subgroup],
        homes: Homes,
        start: Rates | None = None,
        *,
        first_step: int = 0,
        early_gradients: bool = False,
    ) -> None:
        self.start = start
        self._early_gradients = early_gradients
        self.decisions: list[Decision] = []
        self._subgroups = [subgroup.sizes_only() for subgroup in subgroups]
        self._homes = homes
        self._visitors = sorted(homes.visitors)
        self._beliefs = Beliefs(start, len(self._visitors))
        # Measurements since a side was last measured; at first it never was.
        self._unseen = {Placement.HOST: PROBE_AFTER, Placement.DEVICE: PROBE_AFTER}
        self._num_settled = 0
        self._next_step = first_step + WARM_UP_STEPS
        self._before_probe: Plan | None = None  # what to go on from, after a step with one side alone
        self._ran: Plan | None = None
        self._seen_s: dict[int, deque[float]] = {}  # the last two updates since a surprise, by number of visits
        self._step_s: dict[Overlap, float] = {}  # see Decision
        self.first_plan = self._first_plan()

    # ---- what the runtime asks

    def wants(self, step: int) -> bool:
        """Whether step number ``step`` is to be measured."""
        return step >= self._next_step

    @property
    def rates(self) -> Rates | None:
        """What is believed of the plan measured last: measured, or else from the start; None without either."""
        return self._beliefs.at(0 if self._ran is None else self._ran.num_visits)

    def observe(self, measurement: Measurement, ran: Plan) -> Decision | None:
        """Take in the measurement of a step that ran ``ran``, and decide; None while too little is known."""
        predicted_s = None if self._beliefs.at(ran.num_visits) is None else self._predict_s(ran)
        self._beliefs.take_in(measurement, ran.num_visits)
        self._ran = ran
        placements = set(ran.placements.values())
        for where in self._unseen:
            self._unseen[where] = 0 if where in placements else self._unseen[where] + 1
        rates = self.rates
        if rates is None:  # not both sides were measured: forgotten, so that a log of decisions is all there is
            self._beliefs.forget()
            self._next_step = measurement.step + 1
            return None
        surprised = predicted_s is None or abs(predicted_s / measurement.update_s - 1) > SURPRISE
        seen_s = self._seen_s.get(ran.num_visits)
        if seen_s is not None and abs(seen_s[-1] / measurement.update_s - 1) > SURPRISE:
            self._seen_s.clear()  # disturbed, or the machine changed
        self._seen_s.setdefault(ran.num_visits, deque(maxlen=2)).append(measurement.update_s)
        choice = self._choose(ran)
        self._num_settled = 0 if surprised or choice.action != "kept" else self._num_settled + 1
        interval = 1 << min(MAX_INTERVAL.bit_length() - 1, max(0, self._num_settled - SETTLED + 1))
        self._next_step = measurement.step + interval
        moved = tuple(i for i, where in ran.placements.items() if choice.plan.placements[i] is not where)
        if measurement.passes_s is not None or choice.plan != ran:
            self._step_s = self._predict_steps(choice.plan)
        decision = Decision(
            measurement, ran, predicted_s, rates, moved=tuple(sorted(moved)), step_s=self._step_s, **choice._asdict()
        )
        self.decisions.append(decision)
        return decision

    # ---- deciding

    def _first_plan(self) -> Plan:
        """The best by ``start``, with both sides in it; without ``start`` one that measures both."""
        if self.start is None:
            return first_plan("auto", len(self._subgroups), self._homes)
        return self._lower(spread(self._subgroups, self._homes, self._with_both_sides(self._best_num())))

    def _choose(self, ran: Plan) -> _Choice:
        before_probe, self._before_probe = self._before_probe, None
        plan = ran if before_probe is None else min(ran, before_probe, key=self._predict_s)
        placements = [plan.placements[s.index] for s in self._subgroups]
        best_num, current_s = self._best_num(), self._predict_s(plan)
        target_s, target = self._predict_s(self._spread(best_num)), self._with_both_sides(best_num)
        if (alone := self._side_to_try_alone(current_s)) is not None:
            self._before_probe = plan
            return _Choice("probed", self._spread(alone), current_s, target_s)
        if target == best_num and target_s > (1 - HYSTERESIS) * current_s:
            return _Choice("kept" if plan is ran else "moved", plan, current_s, target_s)
        next_placements = self._towards(target, placements)
        if target == best_num and self._was_no_shorter(next_placements.count(Placement.DEVICE), plan.num_visits):
            shortest = min(self._seen_s, key=lambda num: self._seen_s[num][-1])
            if self._was_no_shorter(shortest, plan.num_visits):
                return _Choice("kept" if plan is ran else "moved", plan, current_s, target_s)
            return _Choice("returned", self._lower(self._towards(shortest, placements)), current_s, target_s)
        moves = next_placements != placements or plan is not ran
        action: Action = "probed" if target != best_num else "moved" if moves else "reordered"
        return _Choice(action, self._lower(next_placements), current_s, target_s)

    def _side_to_try_alone(self, current_s: float) -> int | None:
        """Visits of a step that tells what one side does without the other; None if nothing is to be learnt from it.

        All on the device may take long where the link is slow: only if it may be the fastest plan, were copies slowed
        down by CPU updates about as much as these by copies.
        """
        if not self._homes.num_staging:
            return None
        if self._beliefs.lack_cpu_alone:
            return 0
        rates = self._beliefs.without_cpu_updates() if self._beliefs.lack_links_alone else None
        if rates is None:
            return None
        num = len(self._visitors)
        plan = self._spread(num)
        return num if Predictor(self._subgroups, rates).predict(plan).update_s < (1 + HOPE) * current_s else None

    def _was_no_shorter(self, num_visits: int, than: int) -> bool:
        """Whether an update with so many visits was measured to gain no more than the hysteresis over one with others.

        What is predicted of a share may be more wrong than shares differ: near the best one, where all are about as
        long, the plan would move to and fro. Another order of the same share is tried once.
        """
        tried, current = self._seen_s.get(num_visits), self._seen_s.get(than)
        if num_visits == than:
            return tried is not None and len(tried) > 1
        return tried is not None and current is not None and tried[-1] > (1 - HYSTERESIS) * current[-1]

    def _towards(self, target: int, placements: Sequence[Placement]) -> list[Placement]:
        """``placements`` after one move on the way to ``target`` visits: of few visitors, and evenly spread ones."""
        current = sum(placements[i] is Placement.DEVICE for i in self._visitors)
        source, where = (
            (Placement.HOST, Placement.DEVICE) if target > current else (Placement.DEVICE, Placement.HOST)
        )  # fmt: skip
        candidates = [i for i in self._visitors if placements[i] is source]
        num = min(abs(target - current), max(MIN_MOVED, len(self._visitors) // MOVED_SHARE))
        moved = list(placements)
        for k in range(num):
            moved[candidates[(2 * k + 1) * len(candidates) // (2 * num)]] = where
        return moved

    def _best_num(self) -> int:
        """How many visitors the device updates in the best share; of large models, as in a sample of them."""
        sample, homes = sampled(self._subgroups, self._homes, MAX_SAMPLE)
        num_sampled = len(homes.visitors)
        scale = len(self._visitors) / max(1, num_sampled)
        if not homes.num_staging:
            return len(self._visitors)

        def seconds_of(num: int) -> float:
            return Search(sample, self._rates_at(round(num * scale))).share_s(homes, num)

        return round(minimum(seconds_of, num_sampled) * scale)

    def _with_both_sides(self, num_device: int) -> int:
        """``num_device``, or one off where a side would stay unmeasured for long."""
        num = len(self._visitors)
        if num < 2 or self._homes.num_staging == 0:
            return num_device
        if self._unseen[Placement.HOST] >= PROBE_AFTER:
            num_device = min(num_device, num - 1)
        if self._unseen[Placement.DEVICE] >= PROBE_AFTER:
            num_device = max(num_device, 1)
        return num_device

    def _rates_at(self, num_visits: int) -> Rates:
        rates = self._beliefs.at(num_visits)
        assert rates is not None
        return rates

    def _spread(self, num_device: int) -> Plan:
        return self._lower(spread(self._subgroups, self._homes, num_device))

    def _lower(self, placements: Sequence[Placement]) -> Plan:
        rates, homes = self._rates_at(sum(where is Placement.DEVICE for where in placements)), self._homes
        return schedule(
            placements, self._subgroups, rates, num_slots=homes.num_slots, num_staging=homes.num_staging
        )  # fmt: skip

    def _predict_s(self, plan: Plan) -> float:
        return Predictor(self._subgroups, self._rates_at(plan.num_visits)).predict(plan).update_s

    def _predict_steps(self, plan: Plan) -> dict[Overlap, float]:
        """Predicted seconds of a step with the update of ``plan`` after backward, and under the next forward.

        Gradients in backward are no candidate, as autograd does not tell of every change that comes after: they come
        early either way or neither. The passes are taken as equal layers, with twice the arithmetic in backward.
        """
        passes_s = self._beliefs.passes_s
        if passes_s is None:
            return {}
        forward_s = passes_s * FORWARD_OPERATIONS / (FORWARD_OPERATIONS + BACKWARD_OPERATIONS) / NUM_LAYERS
        layers = [Layer(forward_s, passes_s / NUM_LAYERS - forward_s)] * NUM_LAYERS
        rates, early = self._rates_at(plan.num_visits), self._early_gradients
        in_order = Hiding("backward" if early else "none")
        under_forward = Hiding("next_forward", early_gradients=early)
        return {
            overlap: predict_step(plan, self._subgroups, rates, layers, hiding).step_s
            for overlap, hiding in zip(AUTO_OVERLAPS, (in_order, under_forward), strict=True)
        }

    # ---- the log

    def save(self, path: str | PathLike[str]) -> None:
        """Write the decisions, and all that is needed to take them again, as JSON lines."""
        homes = self._homes
        header = {
            "subgroups": [[s.numel, s.param_bytes, s.state_bytes] for s in self._subgroups],
            "residents": sorted(homes.residents),
            "visitors": self._visitors,
            "num_slots": homes.num_slots,
            "num_staging": homes.num_staging,
            "early_gradients": self._early_gradients,
            "start": None if self.start is None else asdict(self.start),
            "first_plan": str(self.first_plan),
        }
        records = [header, *(decision.as_dict() for decision in self.decisions)]
        Path(path).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def replay(path: str | PathLike[str]) -> Controller:
    """A controller that was fed with the measurements of a log of :meth:`Controller.save`.

    Raises:
        ValueError: if the file is no such log, or if a decision comes out otherwise than it is written there.
    """
    try:
        header, *records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        subgroups = [Subgroup(i, *sizes) for i, sizes in enumerate(header["subgroups"])]
        homes = Homes(
            frozenset(header["residents"]), frozenset(header["visitors"]), header["num_slots"], header["num_staging"]
        )
        start = None if header["start"] is None else Rates(**header["start"])
        early_gradients = header.get("early_gradients", False)
        measurements = [
            Measurement(
                m["step"], {lane: (a, s) for lane, (a, s) in m["work"].items()}, m["update_s"], m.get("passes_s")
            )
            for m in (record["measurement"] for record in records)
        ]
        expected, ran = [record["plan"] for record in records], [Plan.parse(record["ran"]) for record in records]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no log of decisions: {error!r}") from error
    controller = Controller(subgroups, homes, start, early_gradients=early_gradients)
    for measurement, plan, then in zip(measurements, ran, expected, strict=True):
        decision = controller.observe(measurement, plan)
        if decision is None or str(decision.plan) != then:
            raise ValueError(
                f"{path}: with the measurement of step {measurement.step} the plan is now "
                f"{None if decision is None else decision.plan}, and was {then}; another version wrote this log"
            )
    return controller
