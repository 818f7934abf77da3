"""Plans made to hide under the next forward: which subgroups get a head start, and what it is worth."""

from __future__ import annotations

import pytest

from offload.layer_costs import Layer
from offload.overlaps import hide
from offload.perf_model import Rates
from offload.phases import Hiding
from offload.plan import Placement, Plan, lower
from offload.subgroup import Subgroup

HOST, DEVICE, RESIDENT = Placement.HOST, Placement.DEVICE, Placement.RESIDENT
NUMEL, NUM = 1_000_000, 12
SUBGROUPS = [Subgroup(i, NUMEL, 2 * NUMEL, 12 * NUMEL) for i in range(NUM)]
RATES = Rates(
    h2d_bytes_per_s=25e9,
    d2h_bytes_per_s=25e9,
    host_update_params_per_s=2.5e9,
    device_update_params_per_s=30e9,
    host_dram_bytes_per_s=70e9,
)
UPDATE_S = NUM * NUMEL * 30 / 70e9  # of the CPU's updates of all, bound by host memory
LAYERS = [Layer(UPDATE_S / NUM, 2 * UPDATE_S / NUM)] * NUM
UNDER_FORWARD = Hiding("next_forward")


def best(plan: Plan, visitors: range, hiding: Hiding = UNDER_FORWARD) -> tuple[Plan, float]:
    ((_, step),) = hide(plan, SUBGROUPS, RATES, LAYERS, [hiding], visitors)
    return step.plan, step.update_s


def spread(residents: tuple[int, ...] = ()) -> Plan:
    placements = [RESIDENT if i in residents else DEVICE if i % 3 == 2 else HOST for i in range(NUM)]
    return lower(placements, num_slots=3, num_staging=4)


def test_first_subgroups_visit_where_forward_is_long() -> None:
    plan, exposed_s = best(spread(), range(NUM))
    placements = plan.placements
    assert [placements[0], placements[1]] == [DEVICE, DEVICE]
    assert plan.num_visits <= spread().num_visits
    plan.validate(NUM, num_slots=3, num_staging=4)
    _, before_s = best(spread(), range(0))
    assert exposed_s < 0.9 * before_s


@pytest.mark.parametrize(
    "hiding", [Hiding("none"), Hiding("backward"), Hiding("next_forward", in_backward=True)], ids=str
)
def test_other_ways_keep_their_visits(hiding: Hiding) -> None:
    plan, _ = best(spread(), range(NUM), hiding)
    assert plan.placements == spread().placements


def test_without_visitors_the_visits_stay() -> None:
    """Even where fewer would be better: nobody else is known to be able to."""
    slow_link = Rates(1e9, 1e9, 1e15, 1e15)
    ((_, step),) = hide(spread(), SUBGROUPS, slow_link, [Layer(1e-9, 1e-9)] * NUM, [UNDER_FORWARD])
    assert step.plan.placements == spread().placements


def test_only_visitors_get_a_head_start() -> None:
    """The first subgroup's state is pageable, the second one's lives on the device."""
    plan, _ = best(spread(residents=(1,)), range(2, NUM))
    placements = plan.placements
    assert (placements[0], placements[1]) == (HOST, RESIDENT)
    assert placements[2] is DEVICE
    plan.validate(NUM, num_slots=3, num_staging=4, resident={1})


@pytest.mark.parametrize("num_slots", [0, 1])
def test_no_head_start_without_a_slot_to_spare(num_slots: int) -> None:
    plan = lower([DEVICE if num_slots and i % 3 == 2 else HOST for i in range(NUM)], num_slots=num_slots, num_staging=4)
    assert best(plan, range(NUM))[0] == plan
