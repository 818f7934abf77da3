"""Plans in order of time: valid, ordered, and no lane waits for what another order would not have made it wait for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.ordering import check_ordering
from offload.perf_model import Rates, predict
from offload.plan import Placement, PlanError, lower
from offload.scheduling import schedule
from offload.subgroup import Subgroup

HOST, DEVICE, RESIDENT = Placement.HOST, Placement.DEVICE, Placement.RESIDENT


def equal_subgroups(num: int, numel: int = 10**6) -> list[Subgroup]:
    return [Subgroup(i, numel, 2 * numel, 12 * numel) for i in range(num)]


@settings(max_examples=60, deadline=None)
@given(
    placements=st.lists(st.sampled_from(list(Placement)), min_size=1, max_size=12),
    num_slots=st.integers(1, 3),
    num_staging=st.integers(1, 3),
    link=st.sampled_from([1e9, 20e9, 300e9]),
    cores=st.sampled_from([1e8, 2e9, 1e11]),
)
def test_every_schedule_is_a_valid_ordered_plan(
    placements: list[Placement], num_slots: int, num_staging: int, link: float, cores: float
) -> None:
    subgroups, rates = equal_subgroups(len(placements)), Rates(link, link, cores, 1e11)
    plan = schedule(placements, subgroups, rates, num_slots=num_slots, num_staging=num_staging)
    assert plan.placements == dict(enumerate(placements))
    residents = {i for i, where in enumerate(placements) if where is RESIDENT}
    plan.validate(len(placements), num_slots=num_slots, num_staging=num_staging, resident=residents)
    check_ordering([plan, plan], subgroups)


@pytest.mark.parametrize(("link", "cores"), [(25e9, 2e9), (12e9, 2e9)])
def test_short_transfers_do_not_queue_behind_states(link: float, cores: float) -> None:
    """Half of 48 on each side: faster than the order that needs no rates."""
    placements, subgroups = [HOST, DEVICE] * 24, equal_subgroups(48)
    rates = Rates(link, link, cores, 1e15)
    in_order_of_time = schedule(placements, subgroups, rates, num_slots=3, num_staging=8)
    without_rates = lower(placements, num_slots=3, num_staging=8)
    assert (
        predict(in_order_of_time, subgroups, rates).update_s < 0.95 * predict(without_rates, subgroups, rates).update_s
    )


def test_operations_stand_in_the_order_of_their_starts() -> None:
    rates = Rates(2.0, 2.0, 1 / 5, 1 / 2)  # gradient and parameters 1 s, state 6 s, CPU update 5 s, device update 2 s
    subgroups = [Subgroup(i, 1, 2, 12) for i in range(3)]
    plan = schedule([HOST, DEVICE, RESIDENT], subgroups, rates, num_slots=1, num_staging=1)
    # At 0 gradient, state and resident; at 1 the CPU update; at 6 the new parameters before nothing else, then G and F.
    assert str(plan) == "D0@0 P1@0 R2 C0@0 U0@0 G1@0 F1@0"


def test_buffers_must_be_there() -> None:
    rates = Rates(1e9, 1e9, 1e9, 1e9)
    with pytest.raises(PlanError, match="num_slots must be at least 1"):
        schedule([DEVICE], equal_subgroups(1), rates, num_slots=0, num_staging=1)


def test_an_empty_layout_has_an_empty_plan() -> None:
    assert schedule([], [], Rates(1e9, 1e9, 1e9, 1e9), num_slots=2, num_staging=2).ops == ()
