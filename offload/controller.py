"""Choosing plans while training runs: measured times correct the rates, and the plan follows, few subgroups at a time.

Which plan runs never changes a bit of the result, so the controller may be wrong without harm but time. It sees nothing
but measurements: fed with those of a log, it decides again what it decided then.
"""

from __future__ import annotations

import json
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

from offload.candidates import sampled
from offload.homes import Homes, first_plan
from offload.perf_model import Predictor, Rates
from offload.plan import Placement, Plan
from offload.planner import Search, minimum, spread
from offload.scheduling import schedule
from offload.subgroup import Subgroup

WARM_UP_STEPS = 1  # first touch of memory and compilation of kernels are not what later steps cost
WINDOW = 5  # measured steps whose median rate counts: two disturbed ones change nothing
HYSTERESIS = 0.02  # gain, by prediction, below which the plan stays: less than rates vary from step to step
MOVED_SHARE = 8  # one of so many visitors moves at a time,
MIN_MOVED = 2  # and so many at least
SETTLED = 3  # measurements that leave the plan alone before they become rarer
SURPRISE = 0.1  # error of a prediction after which the next step is measured again
MAX_INTERVAL = 16  # steps between measurements at the most
PROBE_AFTER = 8  # measurements without an update on one side, after which one subgroup goes there to be measured
MAX_SAMPLE = 48  # subgroups that the search for the best share looks at

Action = Literal["kept", "reordered", "moved", "probed"]

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
    """

    step: int
    work: Mapping[str, tuple[float, float]]
    update_s: float


def num_visits(plan: Plan) -> int:
    """Subgroups whose state visits the device."""
    return sum(where is Placement.DEVICE for where in plan.placements.values())


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
        action: what was done about the plan: "probed" moves subgroups only to measure a side, "reordered" none.
        moved: subgroups whose placement changes with the next step.
        plan: of the next step.
        current_s, target_s: predicted at ``rates``: of the plan that ran, and of the best share there is.
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

    @property
    def error(self) -> float | None:
        """Prediction over measurement less 1; None when nothing was predicted."""
        return None if self.predicted_s is None else self.predicted_s / self.measurement.update_s - 1

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        seen = self.measurement
        return {
            "measurement": {"step": seen.step, "work": dict(seen.work), "update_s": seen.update_s},
            "ran": str(self.ran),
            "predicted_s": self.predicted_s,
            "rates": asdict(self.rates),
            "action": self.action,
            "moved": self.moved,
            "plan": str(self.plan),
            "current_s": self.current_s,
            "target_s": self.target_s,
        }


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

    def take_in(self, work: Mapping[str, tuple[float, float]], num_visits: int) -> None:
        for lane, (amount, seconds) in work.items():
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


class Controller:
    """Measures, corrects and re-plans for one layout of subgroups.

    Args:
        subgroups, homes: what there is to place; homes never change.
        start: rates believed until measured, for example a profile's; None to measure both sides first.
        first_step: number of the first step, which warms up and is not measured.
    """

    def __init__(
        self, subgroups: Sequence[Subgroup], homes: Homes, start: Rates | None = None, *, first_step: int = 0
    ) -> None:
        self.start = start
        self.decisions: list[Decision] = []
        self._subgroups = [subgroup.sizes_only() for subgroup in subgroups]
        self._homes = homes
        self._visitors = sorted(homes.visitors)
        self._beliefs = Beliefs(start)
        # Measurements since a side was last measured; at first it never was.
        self._unseen = {Placement.HOST: PROBE_AFTER, Placement.DEVICE: PROBE_AFTER}
        self._num_settled = 0
        self._next_step = first_step + WARM_UP_STEPS
        self._before_probe: Plan | None = None  # what to go on from, after a step without visits
        self._ran: Plan | None = None
        self.first_plan = self._first_plan()

    # ---- what the runtime asks

    def wants(self, step: int) -> bool:
        """Whether step number ``step`` is to be measured."""
        return step >= self._next_step

    @property
    def rates(self) -> Rates | None:
        """What is believed of the plan measured last: measured, or else from the start; None without either."""
        return self._beliefs.at(0 if self._ran is None else num_visits(self._ran))

    def observe(self, measurement: Measurement, ran: Plan) -> Decision | None:
        """Take in the measurement of a step that ran ``ran``, and decide; None while too little is known."""
        predicted_s = None if self._beliefs.at(num_visits(ran)) is None else self._predict_s(ran)
        self._beliefs.take_in(measurement.work, num_visits(ran))
        self._ran = ran
        placements = set(ran.placements.values())
        for where in self._unseen:
            self._unseen[where] = 0 if where in placements else self._unseen[where] + 1
        rates = self.rates
        if rates is None:  # not both sides were measured: forgotten, so that a log of decisions is all there is
            self._beliefs.forget()
            self._next_step = measurement.step + 1
            return None
        choice = self._choose(ran)
        surprised = predicted_s is None or abs(predicted_s / measurement.update_s - 1) > SURPRISE
        self._num_settled = 0 if surprised or choice.action != "kept" else self._num_settled + 1
        interval = 1 << min(MAX_INTERVAL.bit_length() - 1, max(0, self._num_settled - SETTLED + 1))
        self._next_step = measurement.step + interval
        moved = tuple(i for i, where in ran.placements.items() if choice.plan.placements[i] is not where)
        decision = Decision(measurement, ran, predicted_s, rates, moved=tuple(sorted(moved)), **choice._asdict())
        self.decisions.append(decision)
        return decision

    # ---- deciding

    def _first_plan(self) -> Plan:
        """The best by ``start``, with both sides in it; without ``start`` one that measures both."""
        if self.start is None:
            return first_plan("auto", len(self._subgroups), self._homes)
        return self._lower(spread(self._subgroups, self._homes, self._with_both_sides(self._best_num())))

    def _choose(self, ran: Plan) -> _Choice:
        plan, self._before_probe = self._before_probe or ran, None
        placements = [plan.placements[s.index] for s in self._subgroups]
        best_num, current_s = self._best_num(), self._predict_s(plan)
        target_s, target = self._predict_s(self._spread(best_num)), self._with_both_sides(best_num)
        if self._beliefs.lack_alone and self._homes.num_staging:
            self._before_probe = plan
            return _Choice("probed", self._spread(0), current_s, target_s)
        if target == best_num and target_s > (1 - HYSTERESIS) * current_s:
            return _Choice("kept" if plan is ran else "moved", plan, current_s, target_s)
        moved = self._moves(placements, target)
        for i in moved:
            placements[i] = Placement.DEVICE if placements[i] is Placement.HOST else Placement.HOST
        action: Action = "probed" if target != best_num else "moved" if moved or plan is not ran else "reordered"
        return _Choice(action, self._lower(placements), current_s, target_s)

    def _moves(self, placements: Sequence[Placement], target: int) -> tuple[int, ...]:
        """Visitors that change sides on the way to ``target`` visits: few, and evenly spread."""
        current = sum(placements[i] is Placement.DEVICE for i in self._visitors)
        source = Placement.HOST if target > current else Placement.DEVICE
        candidates = [i for i in self._visitors if placements[i] is source]
        num = min(abs(target - current), max(MIN_MOVED, len(self._visitors) // MOVED_SHARE))
        return tuple(candidates[(2 * k + 1) * len(candidates) // (2 * num)] for k in range(num))

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
        return Predictor(self._subgroups, self._rates_at(num_visits(plan))).predict(plan).update_s

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
        measurements = [
            Measurement(m["step"], {lane: (a, s) for lane, (a, s) in m["work"].items()}, m["update_s"])
            for m in (record["measurement"] for record in records)
        ]
        expected, ran = [record["plan"] for record in records], [Plan.parse(record["ran"]) for record in records]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no log of decisions: {error!r}") from error
    controller = Controller(subgroups, homes, start)
    for measurement, plan, then in zip(measurements, ran, expected, strict=True):
        decision = controller.observe(measurement, plan)
        if decision is None or str(decision.plan) != then:
            raise ValueError(
                f"{path}: with the measurement of step {measurement.step} the plan is now "
                f"{None if decision is None else decision.plan}, and was {then}; another version wrote this log"
            )
    return controller
