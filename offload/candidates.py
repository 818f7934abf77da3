"""The plans worth trying for a model on a machine, under budgets; and the one to take, with its runners-up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from offload.homes import DEFAULT_NUM_SLOTS, MAX_NUM_STAGING, NUM_STAGING, Homes
from offload.perf_model import Rates
from offload.plan import Placement, Plan, lower
from offload.planner import Choice, Search, spread, stride_plan
from offload.pool import BudgetError, Budgets, MemoryBill, format_bytes
from offload.subgroup import Subgroup

# (slots, staging buffers): those of plan="auto"; a third slot fills both link directions where updates on the device
# are not instant; more staging buffers keep the CPU busy where gradients or new parameters queue behind states.
BUFFERS = ((DEFAULT_NUM_SLOTS, MAX_NUM_STAGING), (3, 4), (3, 8))
STRIDES = (2, 3, 4, 5, 6, 8, 10)  # those the paper's authors measured
MAX_RANKED = 48  # subgroups in the sample that candidates of large models are ranked by
NUM_EXACT = 4  # candidates of large models whose whole plan is timed
NUM_RUNNERS_UP = 3

BuildPlan = Callable[[Search, Homes], Plan]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to plan: a name, homes of states and buffers, and how to make the plan of some subgroups."""

    name: str
    homes: Homes
    build: BuildPlan


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate's place: seconds of its update, of the whole plan or, for large models, of a sample scaled up."""

    name: str
    update_s: float
    is_exact: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """What to run, and what else there was.

    Attributes:
        best: the fastest plan that the budgets hold.
        runners_up: the next ones, fastest first.
        ranking: all candidates that the budgets hold, fastest first.
        refused: the others, by name, and what each would need.
    """

    best: Choice
    runners_up: tuple[Choice, ...]
    ranking: tuple[Ranked, ...]
    refused: dict[str, str]

    @property
    def binds(self) -> str:
        """The resource that sets the lower bound of the best plan's placements."""
        return self.best.bound.binds


def decide(
    subgroups: Sequence[Subgroup], rates: Rates, budgets: Budgets | None = None, *, num_slots: int | None = None
) -> Decision:
    """The fastest plan for ``subgroups`` under ``budgets``.

    Args:
        budgets: None for host memory without limit and no device memory beyond slots.
        num_slots: device buffers; None lets the search choose.

    Raises:
        BudgetError: if no candidate fits, with the least that would do.
    """
    budgets = Budgets() if budgets is None else budgets
    fitting, refused, bills = [], {}, []
    for candidate in _candidates(subgroups, budgets, num_slots):
        bill = candidate.homes.bill(subgroups)
        bills.append(bill)
        try:
            bill.check(budgets)
        except BudgetError as error:
            refused[candidate.name] = str(error)
        else:
            fitting.append(candidate)
    if not fitting:
        raise BudgetError(_least(bills, budgets))
    return _rank(fitting, refused, Search(subgroups, rates))


def _rank(fitting: Sequence[Candidate], refused: dict[str, str], search: Search) -> Decision:
    num = len(search.subgroups)
    sample = Search(sampled(search.subgroups, Homes(), MAX_RANKED)[0], search.rates)
    scale = sum(s.numel for s in search.subgroups) / max(1, sum(s.numel for s in sample.subgroups))
    ranked = []
    for candidate in fitting:
        _, homes = sampled(search.subgroups, candidate.homes, MAX_RANKED)
        choice = sample.choice(candidate.name, homes, candidate.build(sample, homes))
        ranked.append((choice.update_s * scale, candidate, choice))
    ranked.sort(key=lambda item: item[0])  # of equals the first, which is the simplest
    if len(sample.subgroups) == num:
        choices = [choice for _, _, choice in ranked]
    else:
        exact = [_whole(candidate, choice, search) for _, candidate, choice in ranked[:NUM_EXACT]]
        choices = sorted(exact, key=lambda choice: choice.update_s)
    ranking = [Ranked(choice.name, choice.update_s, True) for choice in choices]
    ranking += [Ranked(candidate.name, seconds, False) for seconds, candidate, _ in ranked[len(choices) :]]
    return Decision(choices[0], tuple(choices[1 : 1 + NUM_RUNNERS_UP]), tuple(ranking), refused)


def _whole(candidate: Candidate, sampled: Choice, search: Search) -> Choice:
    """The candidate for all subgroups, at the share that was best in the sample."""
    build = candidate.build
    if build is _best_split and sampled.homes.visitors:
        build = partial(_split, sampled.num_device / len(sampled.homes.visitors))
    return search.choice(candidate.name, candidate.homes, build(search, candidate.homes))


def _candidates(subgroups: Sequence[Subgroup], budgets: Budgets, num_slots: int | None) -> Iterator[Candidate]:
    everyone, nobody = frozenset(range(len(subgroups))), frozenset[int]()
    yield Candidate("all host", Homes(num_staging=NUM_STAGING), _no_visits)
    for residents, where in _resident_sets(subgroups, budgets.device_bytes, slot_bytes=0):
        yield Candidate(f"{where}, others on the CPU", Homes(residents, num_staging=NUM_STAGING), _no_visits)
    for stride in STRIDES:
        if stride <= len(subgroups):
            homes = Homes(nobody, everyone, num_slots or 2, NUM_STAGING)
            yield Candidate(f"stride {stride}", homes, partial(_stride, stride))
    for slots in dict.fromkeys(num_slots or slots for slots, _ in BUFFERS):
        yield Candidate(f"all visit through {slots} slots", Homes(nobody, everyone, slots), _all_visit)
    largest = max((s.state_bytes for s in subgroups), default=0)
    for slots, staging in dict.fromkeys((num_slots or slots, staging) for slots, staging in BUFFERS):
        homes = _pin(Homes(nobody, nobody, slots, staging), subgroups, budgets)
        yield Candidate(f"split, {slots} slots, {staging} staging", homes, _best_split)
    for slots, staging in dict.fromkeys((num_slots or slots, staging) for slots, staging in BUFFERS[:2]):
        for residents, where in _resident_sets(subgroups, budgets.device_bytes, slot_bytes=slots * largest):
            homes = _pin(Homes(residents, nobody, slots, staging), subgroups, budgets)
            name = f"{where}, others split, {slots} slots, {staging} staging"
            yield Candidate(name, homes, _best_split)


def _pin(homes: Homes, subgroups: Sequence[Subgroup], budgets: Budgets) -> Homes:
    """Let as many states visit, evenly spread, as pinned memory holds beside the staging buffers."""
    on_host = [s for s in subgroups if s.index not in homes.residents]
    if budgets.pinned_bytes is None or not on_host:
        return replace(homes, visitors=frozenset(s.index for s in on_host))
    left = budgets.pinned_bytes - homes.bill(subgroups).pinned_bytes
    num = min(len(on_host), max(0, left) // max(s.state_bytes for s in on_host))
    chosen = {on_host[i * len(on_host) // num].index for i in range(num)}
    return replace(homes, visitors=frozenset(chosen), num_slots=homes.num_slots if chosen else 0)


def _resident_sets(
    subgroups: Sequence[Subgroup], device_bytes: int | None, *, slot_bytes: int
) -> Iterator[tuple[frozenset[int], str]]:
    """States that may live on the device in what the budget leaves beside the slots: of the head, and of the tail.

    Of large models only the head: both are updated in the same time, and the head hides better.
    """
    if device_bytes is None:
        return
    seen: set[frozenset[int]] = {frozenset()}
    wheres = (("head", subgroups), ("tail", subgroups[::-1]))
    for where, ordered in wheres[:1] if len(subgroups) > MAX_RANKED else wheres:
        left, chosen = device_bytes - slot_bytes, []
        for subgroup in ordered:
            left -= subgroup.state_bytes
            if left < 0:
                break
            chosen.append(subgroup.index)
        residents = frozenset(chosen)
        if residents not in seen:
            seen.add(residents)
            yield residents, f"{len(residents)} resident ({where})"


# ---- ways to make a plan


def _no_visits(search: Search, homes: Homes) -> Plan:
    placements = spread(search.subgroups, homes, 0)
    return lower(placements, num_slots=0, num_staging=homes.num_staging)


def _all_visit(search: Search, homes: Homes) -> Plan:
    return lower([Placement.DEVICE] * len(search.subgroups), num_slots=homes.num_slots, num_staging=0)


def _stride(update_stride: int, search: Search, homes: Homes) -> Plan:
    return stride_plan(homes, len(search.subgroups), update_stride)


def _best_split(search: Search, homes: Homes) -> Plan:
    return search.best_share(homes).plan


def _split(share: float, search: Search, homes: Homes) -> Plan:
    return search.spread(homes, round(share * len(homes.visitors)))


def sampled(subgroups: Sequence[Subgroup], homes: Homes, max_num: int) -> tuple[list[Subgroup], Homes]:
    """At most ``max_num`` subgroups, evenly picked and numbered anew, and their homes: a small model of a large one."""
    step = max(1, -(-len(subgroups) // max_num))
    picked = list(enumerate(subgroups[::step]))
    return [replace(s.sizes_only(), index=i) for i, s in picked], replace(
        homes,
        residents=frozenset(i for i, s in picked if s.index in homes.residents),
        visitors=frozenset(i for i, s in picked if s.index in homes.visitors),
    )


def _least(bills: Sequence[MemoryBill], budgets: Budgets) -> str:
    """What to say when no candidate fits: of those that exceed fewest budgets, the one that needs least."""

    def excess(bill: MemoryBill) -> int:
        pairs = (
            (bill.device_bytes, budgets.device_bytes),
            (bill.host_bytes, budgets.host_bytes),
            (bill.pinned_bytes, budgets.pinned_bytes),
        )
        return sum(max(0, needed - budget) for needed, budget in pairs if budget is not None)

    bill = min(bills, key=excess)
    return (
        f"no plan fits these budgets; the least that would do is device_budget {format_bytes(bill.device_bytes)} "
        f"({bill.device_bytes} bytes), host_budget {format_bytes(bill.host_bytes)} ({bill.host_bytes} bytes) and "
        f"pinned_budget {format_bytes(bill.pinned_bytes)} ({bill.pinned_bytes} bytes); smaller subgroups need smaller "
        f"slots and staging buffers"
    )
