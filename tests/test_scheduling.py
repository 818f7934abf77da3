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


SECONDS = {"D": 1, "F": 6, "U": 1, "P": 6, "C": 5, "G": 2, "R": 2}  # of a parameter, at the rates below
LANES = {"D": "d2h", "F": "d2h", "U": "h2d", "P": "h2d", "C": "host", "G": "compute", "R": "compute"}
FIRST_OF_EQUALS = "UDCGFPR"


@settings(max_examples=200, deadline=None)
@given(
    placed=st.lists(st.tuples(st.sampled_from(list(Placement)), st.sampled_from([1, 2, 5])), min_size=1, max_size=16),
    num_slots=st.integers(1, 4),
    num_staging=st.integers(1, 16),
    data=st.data(),
)
def test_each_operation_is_the_one_that_can_start_first(
    placed: list[tuple[Placement, int]], num_slots: int, num_staging: int, data: st.DataObject
) -> None:
    """Against a list of all visits that is gone through for each operation."""
    placements = [where for where, _ in placed]
    subgroups = [Subgroup(i, numel, 2 * numel, 12 * numel) for i, (_, numel) in enumerate(placed)]
    order = data.draw(st.permutations(range(len(placed))))
    waiting = {where: [i for i in order if placements[i] is where] for where in Placement}
    visits: list[tuple[int, int | None, str, float]] = []  # subgroup, buffer, operations to come, when they may start

    def enter(where: Placement, buffer: int | None, ready_s: float) -> None:
        if waiting[where]:
            chain = {HOST: "DCU", DEVICE: "PGF", RESIDENT: "R"}[where]
            visits.append((waiting[where].pop(0), buffer, chain, ready_s))

    for where, buffers in ((HOST, range(num_staging)), (DEVICE, range(num_slots)), (RESIDENT, (None,))):
        for buffer in buffers:
            enter(where, buffer, 0.0)
    free_s = dict.fromkeys(LANES.values(), 0.0)
    expected = []
    while visits:
        starts = [(max(free_s[LANES[ops[0]]], s), FIRST_OF_EQUALS.index(ops[0])) for _, _, ops, s in visits]
        at = starts.index(min(starts))
        index, buffer, ops, _ = visits[at]
        expected.append(f"{ops[0]}{index}" + ("" if buffer is None else f"@{buffer}"))
        end_s = starts[at][0] + SECONDS[ops[0]] * subgroups[index].numel
        free_s[LANES[ops[0]]] = end_s
        if ops[1:]:
            visits[at] = (index, buffer, ops[1:], end_s)
        else:
            del visits[at]
            enter(placements[index], buffer, end_s)
    rates = Rates(2.0, 2.0, 1 / 5, 1 / 2)
    plan = schedule(placements, subgroups, rates, num_slots=num_slots, num_staging=num_staging, order=order)
    assert str(plan) == " ".join(expected)


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
