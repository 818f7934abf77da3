"""Predicted times by hand, the lower bounds of the model, and a search that reaches them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from offload.homes import Homes
from offload.perf_model import Rates, predict
from offload.plan import Placement, Plan, lower
from offload.planner import best_plan
from offload.subgroup import Subgroup

HOST, DEVICE, RESIDENT = Placement.HOST, Placement.DEVICE, Placement.RESIDENT


def equal_subgroups(num: int, numel: int = 1000) -> list[Subgroup]:
    """16-bit parameters, three rows of state: 2 and 12 bytes a parameter."""
    return [Subgroup(i, numel, 2 * numel, 12 * numel) for i in range(num)]


def visiting(num: int, num_slots: int = 2, num_staging: int = 2) -> Homes:
    return Homes(visitors=frozenset(range(num)), num_slots=num_slots, num_staging=num_staging)


def update_s(text: str, rates: Rates, num_subgroups: int) -> float:
    return predict(Plan.parse(text), equal_subgroups(num_subgroups, numel=1), rates).update_s


# ---- by hand. A subgroup of one parameter: 2 bytes of gradient, 12 of state.

# Gradient down 1 s, parameters up 1 s, state 6 s each way, CPU update 5 s, device update 2 s.
BY_HAND = Rates(2.0, 2.0, 1 / 5, 1 / 2)


@pytest.mark.parametrize(
    ("text", "expected_s"),
    [
        ("D0@0 C0@0 U0@0", 1 + 5 + 1),
        # CPU updates back to back; the first gradient and the last upload stand alone.
        ("D0@0 D1@1 C0@0 C1@1 U0@0 D2@0 C2@0 U1@1 U2@0", 1 + 3 * 5 + 1),
        # One staging buffer: nothing overlaps.
        ("D0@0 C0@0 U0@0 D1@0 C1@0 U1@0", 2 * (1 + 5 + 1)),
        # Uploads at once: the thread that enqueues waits for each update before it queues the next.
        ("D0@0 D1@1 C0@0 U0@0 C1@1 U1@1", 1 + 2 * 5 + 1),
        ("P0@0 G0@0 F0@0", 6 + 2 + 6),
        # One slot: nothing overlaps.
        ("P0@0 G0@0 F0@0 P1@0 G1@0 F1@0", 2 * (6 + 2 + 6)),
        # Two slots: up and down at once; slot 0 is refilled when it is drained, at 14.
        ("P0@0 P1@1 G0@0 F0@0 P2@0 G1@1 F1@1 G2@0 F2@0", 14 + 6 + 2 + 6),
        # Three slots: the link upwards never rests.
        ("P0@0 P1@1 P2@2 G0@0 F0@0 G1@1 F1@1 G2@2 F2@2", 3 * 6 + 2 + 6),
        # Both sides at once: the device's 14 s hide most of the CPU's, whose gradient and upload take their turns.
        ("D0@0 P1@0 C0@0 G1@0 F1@0 U0@0", 6 + 2 + 6),
        ("R0 R1", 2 * 2),
        ("", 0),
    ],
)
def test_time_by_hand(text: str, expected_s: float) -> None:
    plan = Plan.parse(text)
    num_subgroups = len(plan.placements)
    assert update_s(text, BY_HAND, num_subgroups) == pytest.approx(expected_s, rel=1e-12)


def test_spans_tell_what_ran_when() -> None:
    prediction = predict(Plan.parse("D0@0 P1@0 C0@0 G1@0 F1@0 U0@0"), equal_subgroups(2, numel=1), BY_HAND)
    spans = {span.name: (span.lane, span.start_s, span.end_s) for span in prediction.spans}
    assert spans == {
        "D0@0": ("d2h", 0, 1),
        "P1@0": ("h2d", 0, 6),
        "C0@0": ("host", 1, 6),
        "G1@0": ("compute", 6, 8),
        "F1@0": ("d2h", 8, 14),
        "U0@0": ("h2d", 6, 7),
    }


def test_copies_cost_their_latency() -> None:
    late = replace(BY_HAND, copy_latency_s=0.25)
    assert update_s("D0@0 C0@0 U0@0", late, 1) == 1.25 + 5 + 1.25
    assert update_s("R0", late, 1) == 2


def test_prediction_leaves_the_subgroups_as_they_are() -> None:
    subgroups = equal_subgroups(2)
    predict(lower([HOST, DEVICE], num_slots=1, num_staging=1), subgroups, BY_HAND)
    assert all(s.flushed is None and s.grad_on_host is None and s.updated_on_host is None for s in subgroups)


# ---- lower bounds: N parameters, B link bytes/s each way, U parameters/s by the CPU's cores

MACHINES = [
    (100e9, 2e9),  # cores bind, a fast link: much on the device
    (25e9, 2e9),
    (12e9, 2e9),
    (25e9, 1e9),
    (6e9, 2.9e9),  # B / 2 hardly above U: little to gain
]
NUM, NUMEL = 48, 10**6
N = NUM * NUMEL
FILL = 3 / NUM  # the first transfers and the last have nothing to overlap with


def machine(link: float, cores: float) -> Rates:
    return Rates(link, link, cores, device_update_params_per_s=1e15)


@pytest.mark.parametrize(("link", "cores"), [*MACHINES, (2e9, 5e9)])
def test_all_host_reaches_its_bound(link: float, cores: float) -> None:
    plan = lower([HOST] * NUM, num_slots=0, num_staging=2)
    bound_s = N * max(2 / link, 1 / cores)
    # Two staging buffers can't hide all of three stages of equal length: gradients down, update, parameters up.
    transfers_s = 2 * NUMEL * 2 / link
    predicted_s = predict(plan, equal_subgroups(NUM, NUMEL), machine(link, cores)).update_s
    assert bound_s <= predicted_s
    if 4 / link <= 1 / cores:
        assert predicted_s == pytest.approx(bound_s + transfers_s, rel=1e-9)


@pytest.mark.parametrize(("link", "cores"), MACHINES)
def test_all_device_reaches_its_bound(link: float, cores: float) -> None:
    """Two slots fill the link both ways: one more transfer than there are subgroups."""
    plan = lower([DEVICE] * NUM, num_slots=2, num_staging=0)
    predicted_s = predict(plan, equal_subgroups(NUM, NUMEL), machine(link, cores)).update_s
    assert predicted_s == pytest.approx(N * 12 / link * (1 + 1 / NUM), rel=1e-3)


def split_bound_s(link: float, cores: float, share: float) -> float:
    return N * max((12 * share + 2 * (1 - share)) / link, (1 - share) / cores)


@pytest.mark.parametrize(("link", "cores"), MACHINES)
def test_no_plan_beats_the_bound_of_its_own_share(link: float, cores: float) -> None:
    subgroups, rates = equal_subgroups(NUM, NUMEL), machine(link, cores)
    for num_device in range(0, NUM + 1, 4):
        placements = [DEVICE] * num_device + [HOST] * (NUM - num_device)
        for order in (range(NUM), sorted(range(NUM), key=lambda i: (i % num_device if num_device else 0, i))):
            plan = lower(placements, num_slots=3, num_staging=3, order=order)
            assert predict(plan, subgroups, rates).update_s >= split_bound_s(link, cores, num_device / NUM)


@pytest.mark.parametrize(("link", "cores"), MACHINES)
def test_best_split_is_the_closed_form(link: float, cores: float) -> None:
    """x* = (B - 2U) / (B + 10U) and T = 12 N / (B + 10U), to the grain of subgroups and shares tried."""
    best_share = (link - 2 * cores) / (link + 10 * cores)
    bound_s = 12 * N / (link + 10 * cores)
    assert split_bound_s(link, cores, best_share) == pytest.approx(bound_s)
    homes = visiting(NUM, num_slots=3, num_staging=8)  # enough that no lane waits for a buffer
    best = best_plan(equal_subgroups(NUM, NUMEL), machine(link, cores), homes)
    share = sum(where is DEVICE for where in best.plan.placements.values()) / NUM
    assert bound_s <= best.update_s <= bound_s * (1 + FILL)
    assert share == pytest.approx(best_share, abs=FILL)


@pytest.mark.parametrize(("link", "cores"), MACHINES)
def test_best_plan_is_no_slower_than_either_side_alone(link: float, cores: float) -> None:
    subgroups, rates = equal_subgroups(NUM, NUMEL), machine(link, cores)
    best = best_plan(subgroups, rates, visiting(NUM))
    for where in (HOST, DEVICE):
        alone = lower([where] * NUM, num_slots=2, num_staging=2)
        assert best.update_s <= predict(alone, subgroups, rates).update_s


# ---- the search


def test_no_other_placement_is_faster() -> None:
    """Against each of the 2^8 placements, lowered without rates."""
    subgroups, rates = equal_subgroups(8), Rates(30e9, 30e9, 2e9, 1e12)
    best = best_plan(subgroups, rates, visiting(8))
    times = [
        predict(lower(placements, num_slots=2, num_staging=2), subgroups, rates).update_s
        for placements in itertools.product((HOST, DEVICE), repeat=8)
    ]
    assert best.update_s <= min(times)


def test_ties_move_fewer_bytes() -> None:
    """Where nothing costs anything, nothing visits the device."""
    best = best_plan(equal_subgroups(6), Rates(math.inf, math.inf, math.inf, math.inf), visiting(6))
    assert set(best.plan.placements.values()) == {HOST}


@pytest.mark.parametrize("num", [1, 2, 31, 32, 33, 100])
def test_search_goes_from_none_to_all(num: int) -> None:
    slow_cpu, slow_link = Rates(1e12, 1e12, 1.0, 1e12), Rates(1.0, 1.0, 1e12, 1e12)
    subgroups = equal_subgroups(num)
    assert set(best_plan(subgroups, slow_cpu, visiting(num)).plan.placements.values()) == {DEVICE}
    assert set(best_plan(subgroups, slow_link, visiting(num)).plan.placements.values()) == {HOST}


def test_search_moves_only_who_may_visit() -> None:
    subgroups, slow_cpu = equal_subgroups(6), Rates(1e12, 1e12, 1.0, 1e12)
    homes = Homes(residents=frozenset({5}), visitors=frozenset({0, 2, 3}), num_slots=2, num_staging=2)
    plan = best_plan(subgroups, slow_cpu, homes).plan
    assert plan.placements == {0: DEVICE, 1: HOST, 2: DEVICE, 3: DEVICE, 4: HOST, 5: RESIDENT}
    plan.validate(6, num_slots=2, num_staging=2, resident={5})


def test_search_without_visitors() -> None:
    homes = Homes(residents=frozenset({0}), num_staging=2)
    assert best_plan(equal_subgroups(2), BY_HAND, homes).plan.placements == {0: RESIDENT, 1: HOST}


def test_device_updates_are_spread_evenly() -> None:
    rates = Rates(40e9, 40e9, 2e9, 1e15)  # x* = 0.6
    plan = best_plan(equal_subgroups(20, NUMEL), rates, visiting(20)).plan
    on_device = [i for i, where in plan.placements.items() if where is DEVICE]
    gaps = [b - a for a, b in itertools.pairwise(sorted(on_device))]
    assert max(gaps) - min(gaps) <= 1
