"""Where states live: what policies ask for, what budgets leave, and what nobody can have."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.homes import Homes, first_plan, settle, stage_gradients
from offload.plan import Placement, Plan, PlanError
from offload.policy import Policy, Static, Stride, choose_placements, choose_residents, parse_policy
from offload.pool import BudgetError, Budgets, MemoryBill
from offload.subgroup import Subgroup

HOST, DEVICE, RESIDENT = Placement.HOST, Placement.DEVICE, Placement.RESIDENT
NO_LIMITS = Budgets()


def subgroups_of(*numels: int) -> list[Subgroup]:
    """16-bit parameters, three rows of state."""
    return [Subgroup(i, numel, 2 * numel, 12 * numel) for i, numel in enumerate(numels)]


FOUR = subgroups_of(100, 100, 100, 100)  # each: 200 bytes of parameters, 1200 bytes of state


# ---- policies


def test_parse_policy() -> None:
    for policy in ("auto", "host", "device", Static(0.5), Stride(2), Plan.parse("R0")):
        assert parse_policy(policy) == policy
    assert parse_policy("P0@0 G0@0 F0@0") == Plan.parse("P0@0 G0@0 F0@0")


def test_text_that_is_neither_policy_nor_plan() -> None:
    with pytest.raises(PlanError, match=r"plan='atuo' is none of \('auto', 'host', 'device'\) and no plan: .*'atuo'"):
        parse_policy("atuo")


@pytest.mark.parametrize("policy", [None, 2, 0.5, ["host"], Static])
def test_policy_of_another_type(policy: object) -> None:
    with pytest.raises(TypeError, match=re.escape(f"not {policy!r}")):
        parse_policy(policy)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"resident_fraction={fraction} is no share; give 0"):
        Static(fraction)


@pytest.mark.parametrize("stride", [0, -2])
def test_stride_out_of_range(stride: int) -> None:
    with pytest.raises(ValueError, match=f"update_stride={stride} is no stride; give 1"):
        Stride(stride)


def test_placements() -> None:
    assert choose_placements("host", 3, ()) == [HOST] * 3
    assert choose_placements("auto", 3, ()) == [HOST] * 3
    assert choose_placements("device", 3, {1}) == [DEVICE, RESIDENT, DEVICE]
    assert choose_placements(Stride(1), 3, ()) == [DEVICE] * 3
    assert choose_placements(Stride(2), 5, ()) == [HOST, DEVICE, HOST, DEVICE, HOST]
    assert choose_placements(Stride(3), 4, {3}) == [HOST, HOST, DEVICE, RESIDENT]


@pytest.mark.parametrize(
    ("fraction", "residents"), [(0.0, set()), (0.24, set()), (0.25, {0}), (0.6, {0, 1}), (1.0, {0, 1, 2, 3})]
)
def test_static_keeps_the_head(fraction: float, residents: set[int]) -> None:
    assert choose_residents(Static(fraction), FOUR, None) == residents


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=10), st.floats(0, 1))
def test_static_never_exceeds_its_share(numels: list[int], fraction: float) -> None:
    residents = choose_residents(Static(fraction), subgroups_of(*numels), None)
    assert sum(numels[i] for i in residents) <= fraction * sum(numels)


# ---- what policies ask for


@pytest.mark.parametrize(
    ("policy", "homes"),
    [
        ("host", Homes(num_staging=2)),
        ("device", Homes(visitors=frozenset(range(4)), num_slots=2)),
        (Static(0.5), Homes(residents=frozenset({0, 1}), num_staging=2)),
        (Static(1.0), Homes(residents=frozenset(range(4)))),
        (Stride(2), Homes(visitors=frozenset({1, 3}), num_slots=2, num_staging=2)),
        ("auto", Homes(visitors=frozenset(range(4)), num_slots=2, num_staging=4)),
        (
            Plan.parse("D0@0 C0@0 U0@0 P1@2 G1@2 F1@2 R2 R3"),
            Homes(frozenset({2, 3}), frozenset({1}), num_slots=3, num_staging=1),
        ),
    ],
    ids=str,
)
def test_policy_gets_what_it_names(policy: Policy, homes: Homes) -> None:
    assert settle(policy, FOUR, NO_LIMITS) == homes
    plan = first_plan(policy, len(FOUR), homes)
    plan.validate(4, num_slots=homes.num_slots, num_staging=homes.num_staging, resident=homes.residents)


def test_number_of_slots_is_the_users() -> None:
    assert settle("device", FOUR, NO_LIMITS, 3).num_slots == 3
    assert settle("auto", FOUR, NO_LIMITS, 1).num_slots == 1


def test_bill() -> None:
    subgroups = subgroups_of(100, 300, 200)
    homes = Homes(residents=frozenset({1}), visitors=frozenset({2}), num_slots=2, num_staging=3)
    assert homes.bill(subgroups) == MemoryBill(
        host_state_bytes=3600,
        pinned_state_bytes=2400,
        staging_bytes=3 * 2 * 400,  # a gradient and new parameters of the largest subgroup off the device
        slot_bytes=2 * 2400,
        resident_bytes=3600,
    )
    assert homes.host_only(subgroups) == {0}


# ---- what budgets leave


def test_auto_keeps_all_on_the_device_if_it_fits() -> None:
    assert settle("auto", FOUR, Budgets(device_bytes=4 * 1200)) == Homes(residents=frozenset(range(4)))


def test_auto_leaves_room_for_two_slots_beside_residents() -> None:
    homes = settle("auto", FOUR, Budgets(device_bytes=3 * 1200))
    assert homes.residents == {0}
    assert homes.visitors == {1, 2, 3}
    assert homes.bill(FOUR).device_bytes == 3 * 1200


def test_auto_takes_fewer_slots_where_device_memory_is_short() -> None:
    one = settle("auto", FOUR, Budgets(device_bytes=1200 + 1199))
    assert (one.num_slots, one.visitors) == (1, set(range(4)))
    none = settle("auto", FOUR, Budgets(device_bytes=1199))
    assert none == Homes(num_slots=0, num_staging=2), "nothing can visit, so nothing is pinned for it"


def test_auto_pins_no_more_than_it_may() -> None:
    staging = 2 * 2 * 200
    assert settle("auto", FOUR, Budgets(pinned_bytes=staging + 2 * 1200)).visitors == {0, 1}
    assert settle("auto", FOUR, Budgets(pinned_bytes=staging + 2 * 1200 - 1)).visitors == {0}
    assert settle("auto", FOUR, Budgets(pinned_bytes=staging)) == Homes(num_slots=0, num_staging=2)


def test_auto_has_more_staging_buffers_where_every_budget_holds_them() -> None:
    few, many = 2 * 2 * 200 + 4 * 1200, 4 * 2 * 200 + 4 * 1200
    for kind in ("host_bytes", "pinned_bytes"):
        assert settle("auto", FOUR, Budgets(**{kind: many})).num_staging == 4
        less = settle("auto", FOUR, Budgets(**{kind: many - 1}))
        assert (less.num_staging, less.visitors) == (2, set(range(4)))
        assert less.bill(FOUR).host_bytes == few
    assert settle("auto", FOUR, Budgets(device_bytes=2 * 1200 - 1)).num_staging == 2, "one slot: no state queues"
    assert settle("auto", FOUR[:3], NO_LIMITS).num_staging == 3, "no more than there are subgroups"


@pytest.mark.parametrize(
    ("policy", "num_staging"), [("auto", 4), ("host", 4), (Static(0.25), 3), (Stride(2), 2), (Stride(3), 3)], ids=str
)
def test_early_gradients_have_a_staging_buffer_each(policy: Policy, num_staging: int) -> None:
    homes = settle(policy, FOUR, NO_LIMITS)
    assert stage_gradients(homes, policy, FOUR, NO_LIMITS) == replace(homes, num_staging=num_staging)


def test_early_gradients_take_what_budgets_leave() -> None:
    for kind, taken in (("host_bytes", 4 * 1200), ("pinned_bytes", 0)):
        for num_staging in (2, 3, 4):
            limits = Budgets(**{kind: taken + num_staging * 2 * 200})
            homes = stage_gradients(settle("host", FOUR, limits), "host", FOUR, limits)
            assert homes == Homes(num_staging=num_staging)
            homes.bill(FOUR).check(limits)
    over = Budgets(host_bytes=100)  # which is for the bill's check to say
    assert stage_gradients(Homes(num_staging=2), "host", FOUR, over).num_staging == 2
    plan = Plan.parse("D0@0 C0@0 U0@0 D1@0 C1@0 U1@0")
    assert stage_gradients(settle(plan, FOUR[:2], NO_LIMITS), plan, FOUR[:2], NO_LIMITS).num_staging == 1
    assert stage_gradients(Homes(), "host", [], NO_LIMITS) == Homes()


budgets = st.one_of(st.none(), st.integers(0, 20_000))


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=8),
    st.lists(st.integers(1, 300), max_size=4),
    budgets,
    budgets,
    st.one_of(st.none(), st.integers(1, 4)),
)
def test_auto_never_exceeds_a_budget_that_staging_fits(
    first: list[int], later: list[int], device_bytes: int | None, pinned_bytes: int | None, num_slots: int | None
) -> None:
    """Also when parameters join later; and there is always a plan for what was settled."""
    subgroups = subgroups_of(*first, *later)
    limits = Budgets(device_bytes=device_bytes, pinned_bytes=pinned_bytes)
    homes = settle("auto", subgroups[: len(first)], limits, num_slots)
    if later:
        before = homes
        homes = settle("auto", subgroups, limits, num_slots, settled=before, num_settled=len(first))
        assert homes.residents & set(range(len(first))) == before.residents, "settled states don't move"
        assert homes.visitors & set(range(len(first))) == before.visitors
    bill = homes.bill(subgroups)
    assert device_bytes is None or bill.device_bytes <= device_bytes
    if pinned_bytes is not None and bill.pinned_bytes > pinned_bytes:
        grown = before if later else Homes()  # only staging that grew with a larger subgroup can go over
        assert homes.visitors == grown.visitors
    plan = first_plan("auto", len(subgroups), homes)
    plan.validate(len(subgroups), num_slots=homes.num_slots, num_staging=homes.num_staging, resident=homes.residents)


def test_later_subgroup_that_no_slot_can_hold_stays_on_the_host() -> None:
    subgroups = subgroups_of(100, 100, 100, 500)
    limits = Budgets(device_bytes=2400)
    before = settle("auto", subgroups[:3], limits)
    assert before.visitors == {0, 1, 2}
    homes = settle("auto", subgroups, limits, settled=before, num_settled=3)
    assert (homes.visitors, homes.num_slots) == ({0, 1, 2}, 2)


def test_later_subgroups_under_a_fixed_plan() -> None:
    plan = Plan.parse("D0@0 C0@0 U0@0")
    before = settle(plan, FOUR[:1], NO_LIMITS)
    with pytest.raises(PlanError, match="use a policy such as plan='auto' where parameters join later"):
        settle(plan, FOUR[:2], NO_LIMITS, settled=before, num_settled=1)


@pytest.mark.parametrize("policy", ["host", "device", Static(0.5), Stride(2), "auto"], ids=str)
def test_later_subgroups_follow_the_policy(policy: Policy) -> None:
    before = settle(policy, FOUR[:2], NO_LIMITS)
    homes = settle(policy, FOUR, NO_LIMITS, settled=before, num_settled=2)
    assert homes.residents >= before.residents
    assert homes.visitors >= before.visitors
    first_plan(policy, 4, homes).validate(
        4, num_slots=homes.num_slots, num_staging=homes.num_staging, resident=homes.residents
    )


# ---- what nobody can have


@pytest.mark.parametrize(
    ("limits", "policy", "message"),
    [
        (
            Budgets(device_bytes=2399),
            "device",
            "device_budget is 2.3 KiB (2399 bytes) but 2.3 KiB (2400 bytes) are needed: slots 2.3 KiB, "
            "resident state 0 B; raise it, lower num_slots, subgroup_numel or the resident fraction, "
            "or use plan='host'",
        ),
        (
            Budgets(host_bytes=5599),
            "host",
            "host_budget is 5.5 KiB (5599 bytes) but 5.5 KiB (5600 bytes) are needed: state 4.7 KiB, staging 800 B; "
            "raise it, lower subgroup_numel, or keep a larger resident fraction on the device",
        ),
        (
            Budgets(pinned_bytes=799),
            "auto",
            "pinned_budget is 799 B (799 bytes) but 800 B (800 bytes) are needed: state 0 B, staging 800 B; "
            "raise it, lower subgroup_numel, or place fewer subgroups on the device",
        ),
    ],
)
def test_budget_error_names_need_have_and_remedy(limits: Budgets, policy: Policy, message: str) -> None:
    bill = settle(policy, FOUR, limits).bill(FOUR)
    with pytest.raises(BudgetError) as raised:
        bill.check(limits)
    assert str(raised.value) == message


@pytest.mark.parametrize("policy", ["host", "device", "auto", Static(0.5), Stride(2)], ids=str)
def test_budget_of_exactly_the_bill_is_enough(policy: Policy) -> None:
    bill = settle(policy, FOUR, NO_LIMITS).bill(FOUR)
    bill.check(Budgets(bill.device_bytes, bill.host_bytes, bill.pinned_bytes))
