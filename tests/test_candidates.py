"""What is tried, what fits, and that the choice is the fastest of it."""

from __future__ import annotations

import pytest

from offload.bounds import Update, best_split
from offload.candidates import MAX_RANKED, decide, sampled
from offload.hardware import HardwareProfile
from offload.homes import Homes
from offload.perf_model import Rates, predict
from offload.plan import Placement, lower
from offload.planner import stride_plan
from offload.pool import BudgetError, Budgets
from offload.subgroup import Subgroup

GIB = 2**30


def equal_subgroups(num: int, numel: int = 10**6) -> list[Subgroup]:
    return [Subgroup(i, numel, 2 * numel, 12 * numel) for i in range(num)]


# ---- against plans that somebody fixed


@pytest.mark.parametrize("name", HardwareProfile.names())
def test_no_fixed_plan_is_faster_on_any_shipped_profile(name: str) -> None:
    subgroups, rates = equal_subgroups(24, 10**8), Rates.from_profile(HardwareProfile.load(name))
    decision = decide(subgroups, rates)
    homes = Homes(visitors=frozenset(range(24)), num_slots=2, num_staging=2)
    fixed = [stride_plan(homes, 24, k) for k in range(1, 25)]
    fixed += [lower([where] * 24, num_slots=3, num_staging=3) for where in (Placement.HOST, Placement.DEVICE)]
    assert decision.best.update_s <= min(predict(plan, subgroups, rates).update_s for plan in fixed) * (1 + 1e-9)


@pytest.mark.parametrize(("link", "cores"), [(100e9, 2e9), (25e9, 2e9), (12e9, 2e9), (25e9, 1e9), (6e9, 2.9e9)])
def test_within_5_percent_of_the_bound_where_links_and_cores_bind(link: float, cores: float) -> None:
    decision = decide(equal_subgroups(48), Rates(link, link, cores, 1e15))
    _, bound = best_split(Update(48e6), Rates(link, link, cores, 1e15))
    assert bound.seconds <= decision.best.update_s <= 1.05 * bound.seconds
    assert decision.binds in ("link up", "link down", "cores")


def test_ranking_is_sorted_and_starts_with_the_best() -> None:
    decision = decide(equal_subgroups(12), Rates(25e9, 25e9, 2e9, 1e11))
    times = [ranked.update_s for ranked in decision.ranking]
    assert times == sorted(times)
    assert decision.ranking[0].name == decision.best.name
    assert [choice.name for choice in decision.runners_up] == [ranked.name for ranked in decision.ranking[1:4]]
    assert all(ranked.is_exact for ranked in decision.ranking)
    assert {"all host", "stride 2", "all visit through 2 slots"} <= {ranked.name for ranked in decision.ranking}


# ---- what binds


@pytest.mark.parametrize(
    ("rates", "binds"),
    [
        (Rates(1e9, 1e12, 1e12, 1e12), "link up"),
        (Rates(1e12, 1e12, 1e12, 1e12, host_dram_bytes_per_s=1e9), "host memory"),
        (Rates(9e9, 9e9, 1e9, 1e3), "cores"),
    ],
)
def test_what_binds(rates: Rates, binds: str) -> None:
    assert decide(equal_subgroups(8), rates).binds == binds


def test_the_device_binds_where_all_states_live_there() -> None:
    decision = decide(equal_subgroups(4), Rates(1e9, 1e9, 1e9, 1e9), Budgets(device_bytes=GIB))
    assert decision.binds == "device"
    assert set(decision.best.plan.placements.values()) == {Placement.RESIDENT}


# ---- budgets


@pytest.mark.parametrize("device_bytes", [0, 24 * 10**6, 60 * 10**6, 10**9])
@pytest.mark.parametrize("pinned_bytes", [8 * 10**6, 50 * 10**6, None])
def test_budgets_are_kept(device_bytes: int, pinned_bytes: int | None) -> None:
    subgroups, budgets = equal_subgroups(12), Budgets(device_bytes=device_bytes, pinned_bytes=pinned_bytes)
    decision = decide(subgroups, Rates(25e9, 25e9, 1e9, 1e12), budgets)
    for choice in (decision.best, *decision.runners_up):
        choice.homes.bill(subgroups).check(budgets)
        residents = choice.homes.residents
        choice.plan.validate(
            12, num_slots=choice.homes.num_slots, num_staging=choice.homes.num_staging, resident=residents
        )  # fmt: skip
        visitors = {i for i, where in choice.plan.placements.items() if where is Placement.DEVICE}
        assert visitors <= choice.homes.visitors


def test_more_memory_is_never_slower() -> None:
    subgroups, rates = equal_subgroups(12), Rates(25e9, 25e9, 1e9, 1e12)
    times = [decide(subgroups, rates, Budgets(device_bytes=n * 10**6)).best.update_s for n in (0, 40, 80, 200)]
    assert times == sorted(times, reverse=True)


def test_refused_candidates_say_why() -> None:
    decision = decide(equal_subgroups(12), Rates(25e9, 25e9, 1e9, 1e12), Budgets(device_bytes=0))
    assert "device_budget is 0 B" in decision.refused["stride 2"]


def test_an_impossible_budget_says_the_least_that_would_do() -> None:
    with pytest.raises(BudgetError, match=r"the least that would do is .* host_budget 145\.0 MiB \(152000000 bytes\)"):
        decide(equal_subgroups(12), Rates(25e9, 25e9, 1e9, 1e12), Budgets(device_bytes=0, host_bytes=10**6))


def test_the_users_number_of_slots_is_kept() -> None:
    decision = decide(equal_subgroups(12), Rates(25e9, 25e9, 1e9, 1e12), num_slots=5)
    assert decision.best.homes.num_slots == 5


# ---- large models


def test_large_models_are_ranked_by_a_sample_and_timed_whole() -> None:
    num = 3 * MAX_RANKED + 1
    decision = decide(equal_subgroups(num), Rates(25e9, 25e9, 2e9, 1e12))
    assert decision.ranking[0].is_exact
    assert not decision.ranking[-1].is_exact
    assert len(decision.best.plan.placements) == num


def test_a_sample_keeps_the_shares() -> None:
    subgroups = equal_subgroups(100)
    homes = Homes(frozenset(range(80, 100)), frozenset(range(80)), 2, 2)
    sample, small = sampled(subgroups, homes, 25)
    assert [s.index for s in sample] == list(range(25))
    assert (len(small.residents), len(small.visitors)) == (5, 20)
