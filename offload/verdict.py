"""Why a step took as long as it did: verdicts from a measured step, the costliest first.

Each verdict is a comparison of two predictions on virtual lanes: the plan at the rates that were measured, and what it
would take if one thing were different (the link at its expected rate, a second slot, more visits to the device). The
difference is what that thing costs. What the host was doing says which cause a slow rate has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from offload._table import format_table
from offload.bounds import Bound, plan_bound
from offload.homes import DEFAULT_NUM_SLOTS, NUM_STAGING, Homes
from offload.perf_model import Rates, predict
from offload.plan import Placement, PlanError, lower
from offload.planner import Search
from offload.pool import format_bytes
from offload.record import StepRecord
from offload.timeline import busy_fraction, busy_s, elapsed_s, exposed_s
from offload.timing import work_of

Cause = Literal[
    "core binding", "CPU busy", "slow CPU update", "pageable memory", "slow link", "one slot", "stride too large",
    "stride too small", "budget too small", "update after backward",
]  # fmt: skip

NOTICEABLE = 0.05  # of the step: less is noise
SLOW = 0.8  # of what was expected: a rate below that has a cause
BUSY_SHARE = 0.2  # of the processors: other processes that take more are named

_RATE_OF_LANE = {
    "h2d": "h2d_bytes_per_s", "d2h": "d2h_bytes_per_s", "host": "host_update_params_per_s",
    "compute": "device_update_params_per_s",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """One thing that made the step slow.

    Attributes:
        text: what is so, and what to do, for a reader.
        gain_s: seconds that the step would be shorter without it, by prediction.
    """

    cause: Cause
    text: str
    gain_s: float


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A step explained.

    Attributes:
        update_s: measured, from the first operation's start to the last one's end.
        predicted_s: of the same plan at the expected rates; None where nothing was expected.
        rates: measured; expected or unlimited where a lane did nothing.
        bound: what the plan's placements need at least at these rates, by resource.
        verdicts: the costliest first; empty where nothing is wrong.
    """

    record: StepRecord
    update_s: float
    predicted_s: float | None
    rates: Rates
    bound: Bound
    verdicts: tuple[Verdict, ...]


def diagnose(record: StepRecord, expected: Rates | None = None) -> Diagnosis:
    """Explain a step; ``expected`` rates (default: those in the record) say what the machine should do."""
    expected = record.expected if expected is None else expected
    rates = measured_rates(record, expected)
    update_s, subgroups = elapsed_s(record.spans), record.subgroups
    healthy = _healthy(record, rates, expected)
    # A plan is to blame only if it would be wrong on the machine as it should be.
    found = [*_slow_rates(record, rates, healthy, expected), *_plan(record, healthy), *_exposed(record, update_s)]
    worth = NOTICEABLE * (update_s + record.model_s)
    verdicts = sorted((each for each in found if each.gain_s > worth), key=lambda each: -each.gain_s)
    return Diagnosis(
        record=record,
        update_s=update_s,
        predicted_s=None if expected is None else predict(record.plan, subgroups, expected).update_s,
        rates=rates,
        bound=plan_bound(record.plan, subgroups, rates),
        verdicts=tuple(verdicts),
    )


def measured_rates(record: StepRecord, expected: Rates | None) -> Rates:
    """What each lane did a second while it worked, with the others beside it."""
    work = work_of(record.spans, record.subgroups)
    rates = {}
    for lane, name in _RATE_OF_LANE.items():
        amount, seconds = work.get(lane, (0.0, 0.0))
        rates[name] = amount / seconds if amount and seconds else getattr(expected, name, math.inf)
    return Rates(**rates)


# ---- rates that are lower than expected


def _healthy(record: StepRecord, rates: Rates, expected: Rates | None) -> Rates:
    """The measured rates, with those that something slowed down as they would be without it."""
    host = rates.host_update_params_per_s
    factor = _host_cause(record)[2]
    if expected is not None and host < SLOW * expected.host_update_params_per_s:
        rates = replace(rates, host_update_params_per_s=expected.host_update_params_per_s)
    elif factor > 1 / SLOW:
        rates = replace(rates, host_update_params_per_s=host * factor)
    if expected is not None and _link_share(rates, expected) < SLOW:
        up, down = (max(rates.h2d_bytes_per_s, expected.h2d_bytes_per_s),
                    max(rates.d2h_bytes_per_s, expected.d2h_bytes_per_s))  # fmt: skip
        rates = replace(rates, h2d_bytes_per_s=up, d2h_bytes_per_s=down)
    return rates


def _link_share(rates: Rates, expected: Rates) -> float:
    """What the slower direction has of what was expected of it."""
    return min(
        rates.h2d_bytes_per_s / expected.h2d_bytes_per_s, rates.d2h_bytes_per_s / expected.d2h_bytes_per_s
    )  # fmt: skip


def _slow_rates(record: StepRecord, rates: Rates, healthy: Rates, expected: Rates | None) -> Iterator[Verdict]:
    before_s = _predicted_s(record, rates)
    if healthy.host_update_params_per_s > rates.host_update_params_per_s:
        restored = replace(rates, host_update_params_per_s=healthy.host_update_params_per_s)
        cause, text, _ = _host_cause(record)
        seen = f"CPU updates run at {rates.host_update_params_per_s / 1e9:.3g} Gparam/s"
        if expected is not None:
            seen += f", {expected.host_update_params_per_s / 1e9:.3g} were expected"
        yield Verdict(cause, f"{text}: {seen}", before_s - _predicted_s(record, restored))
    if healthy.h2d_bytes_per_s > rates.h2d_bytes_per_s or healthy.d2h_bytes_per_s > rates.d2h_bytes_per_s:
        assert expected is not None
        restored = replace(rates, h2d_bytes_per_s=healthy.h2d_bytes_per_s, d2h_bytes_per_s=healthy.d2h_bytes_per_s)
        seen = (
            f"copies run at {rates.h2d_bytes_per_s / 1e9:.3g} GB/s up and {rates.d2h_bytes_per_s / 1e9:.3g} down, "
            f"{expected.h2d_bytes_per_s / 1e9:.3g} and {expected.d2h_bytes_per_s / 1e9:.3g} were expected"
        )
        gain_s = before_s - _predicted_s(record, restored)
        if record.pageable_bytes:
            text = f"{format_bytes(record.pageable_bytes)} of what crosses the link is not pinned: {seen}; raise "
            yield Verdict("pageable memory", f"{text}the limit on locked memory or pinned_budget", gain_s)
        else:
            text = f"the link is slow: {seen}; look at its width and generation (`offload doctor`), and at other users"
            yield Verdict("slow link", text, gain_s)


def _host_cause(record: StepRecord) -> tuple[Cause, str, float]:
    """What the host's facts say about slow CPU updates, and by what factor they explain it (1: not at all)."""
    facts = record.facts
    if facts.num_threads > facts.num_allowed:
        text = (
            f"{facts.num_threads} threads share the {facts.num_allowed} of {facts.num_processors} processors that this "
            f"process is bound to; bind it to more"
        )
        return "core binding", text, facts.num_threads / facts.num_allowed
    if facts.num_remote:
        text = (
            f"{facts.num_remote} of the {facts.num_allowed} processors of this process are on another NUMA node than "
            f"the device; bind the process to the device's node"
        )
        return "core binding", text, 1.0
    if facts.busy_elsewhere > BUSY_SHARE * facts.num_allowed:
        text = f"other processes keep {facts.busy_elsewhere:.1f} of {facts.num_processors} processors busy; move them"
        return "CPU busy", text, facts.num_allowed / max(1.0, facts.num_allowed - facts.busy_elsewhere)
    return "slow CPU update", "the CPU is slow, for no reason that shows (other use of host memory, clocks)", 1.0


def _predicted_s(record: StepRecord, rates: Rates) -> float:
    return predict(record.plan, record.subgroups, rates).update_s


# ---- plans that are worse than others


def _plan(record: StepRecord, rates: Rates) -> Iterator[Verdict]:
    """What other placements and buffers would gain at these rates. Silent where a side was never measured."""
    subgroups, homes = record.subgroups, record.homes
    if not all(math.isfinite(getattr(rates, name)) for name in _RATE_OF_LANE.values()):
        return
    placements = record.plan.placements
    num_visits = sum(where is Placement.DEVICE for where in placements.values())
    if num_visits > 1 and record.plan.num_buffers(Placement.DEVICE) == 1:
        yield from _one_slot(record, rates)
    free = frozenset(range(len(subgroups))) - homes.residents
    unlimited = Homes(
        homes.residents, free, max(DEFAULT_NUM_SLOTS, homes.num_slots), max(NUM_STAGING, homes.num_staging)
    )
    search = Search(subgroups, rates)
    best = search.best_share(unlimited)
    gain_s = search.share_s(unlimited, num_visits) - best.update_s
    said = f"{num_visits} of {len(subgroups)} subgroups visit the device and {best.num_device} would be best"
    if _is_limited(record, free):
        gain_s = _lowered_s(record, rates, homes.num_slots) - best.update_s
        text = f"{_limits(record)} leave {homes.num_slots} slots and {len(homes.visitors)} subgroups that may visit"
        yield Verdict("budget too small", f"{text}: {said}; raise them", gain_s)
    elif best.num_device > num_visits:
        yield Verdict("stride too large", f"too few updates on the device ({record.policy}): {said}", gain_s)
    elif best.num_device < num_visits:
        yield Verdict("stride too small", f"too many updates on the device ({record.policy}): {said}", gain_s)


def _one_slot(record: StepRecord, rates: Rates) -> Iterator[Verdict]:
    gain_s = _lowered_s(record, rates, 1) - _lowered_s(record, rates, DEFAULT_NUM_SLOTS)
    text = "states go up and down in turns through one slot: give num_slots=2, so that both directions are busy"
    if record.asked_slots == 1:
        yield Verdict("one slot", text, gain_s)


def _lowered_s(record: StepRecord, rates: Rates, num_slots: int) -> float:
    """The same placements through so many slots, in the usual order: like is compared with like."""
    placements = record.plan.placements
    ordered = [placements[i] for i in sorted(placements)]
    subgroups = [record.subgroups[i] for i in sorted(placements)]
    try:
        plan = lower(ordered, num_slots=num_slots, num_staging=max(record.homes.num_staging, 1))
    except PlanError:
        return _predicted_s(record, rates)
    return predict(plan, subgroups, rates).update_s


def _is_limited(record: StepRecord, free: frozenset[int]) -> bool:
    """Whether budgets, and not the user, decided what may visit the device."""
    budgets, homes = record.budgets, record.homes
    if record.policy != "auto" or (budgets.device_bytes is None and budgets.pinned_bytes is None):
        return False
    return homes.visitors != free or homes.num_slots < (record.asked_slots or DEFAULT_NUM_SLOTS)


def _limits(record: StepRecord) -> str:
    limits = {"device_budget": record.budgets.device_bytes, "pinned_budget": record.budgets.pinned_bytes}
    return " and ".join(f"{name} {format_bytes(limit)}" for name, limit in limits.items() if limit is not None)


# ---- an update that nothing hides


def _exposed(record: StepRecord, update_s: float) -> Iterator[Verdict]:
    if record.overlap == "none" and record.model_s > 0:
        text = (
            f"the update begins when backward is over and nothing hides it, while forward and backward leave the link "
            f"and the CPU idle for {_ms(record.model_s)}: construct the optimizer with overlap='auto'"
        )
        yield Verdict("update after backward", text, min(update_s, record.model_s))


# ---- text


def report(diagnosis: Diagnosis) -> str:
    """The diagnosis for a reader: where the time went, what bound it, what was predicted, and the verdicts."""
    record, update_s = diagnosis.record, diagnosis.update_s
    bound = diagnosis.bound
    rows = [("lane", "busy ms", "busy", "exposed ms")]
    for lane, seconds in busy_s(record.spans).items():
        share, alone_s = busy_fraction(record.spans)[lane], exposed_s(record.spans, lane)
        rows.append((lane, f"{seconds * 1e3:.2f}", f"{share:.0%}", f"{alone_s * 1e3:.2f}"))
    lines = [_headline(diagnosis), format_table(rows)]
    if record.model_s:
        lines.append(f"forward and backward before it took {_ms(record.model_s)}")
    lines.append(f"{bound.binds} binds: this plan needs at least {_ms(bound.seconds)} at the rates that were measured")
    if diagnosis.predicted_s is not None:
        off = diagnosis.predicted_s / update_s - 1
        lines.append(
            f"predicted from the expected rates: {_ms(diagnosis.predicted_s)} ({off:+.0%} against the measurement)"
        )
    if not diagnosis.verdicts:
        lines.append("nothing that was looked for is wrong")
    for number, verdict in enumerate(diagnosis.verdicts, start=1):
        lines.append(f"{number}. {verdict.cause}: {verdict.text}. Without it about {_ms(verdict.gain_s)} less.")
    return "\n".join(lines)


def _headline(diagnosis: Diagnosis) -> str:
    idle_s = diagnosis.update_s - busy_s(diagnosis.record.spans).get("compute", 0.0)
    why = diagnosis.verdicts[0].cause if diagnosis.verdicts else f"{diagnosis.bound.binds} bound"
    return f"the update took {_ms(diagnosis.update_s)}, the accelerator waited for {_ms(idle_s)} of it: {why}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
