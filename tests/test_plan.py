"""Plans: text both ways, proof before they run, and what lowering promises."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.plan import CHAINS, Op, OpKind, Placement, Plan, PlanError, lower

HOST, DEVICE, RESIDENT = Placement.HOST, Placement.DEVICE, Placement.RESIDENT

numbers = st.integers(0, 10**6)
ops = st.one_of(
    st.builds(Op, st.sampled_from([k for k in OpKind if k is not OpKind.UPDATE_RESIDENT]), numbers, numbers),
    st.builds(Op, st.just(OpKind.UPDATE_RESIDENT), numbers, st.none()),
)
placement_lists = st.lists(st.sampled_from(Placement), max_size=12)


# ---- text


@given(st.lists(ops, max_size=20))
def test_text_round_trip(operations: list[Op]) -> None:
    plan = Plan(tuple(operations))
    assert Plan.parse(str(plan)) == plan


def test_text_form() -> None:
    plan = Plan.parse("P1@0 G1@0  F1@0\nR4")
    assert plan.ops == (
        Op(OpKind.PREFETCH, 1, 0),
        Op(OpKind.UPDATE_GPU, 1, 0),
        Op(OpKind.FLUSH, 1, 0),
        Op(OpKind.UPDATE_RESIDENT, 4),
    )
    assert str(plan) == "P1@0 G1@0 F1@0 R4"
    assert Plan.parse("") == Plan(())


@pytest.mark.parametrize("word", ["P1", "R1@0", "X1@0", "P@0", "P-1@0", "P1@", "p1@0", "P1@0,", "1@0"])
def test_word_that_is_no_operation(word: str) -> None:
    with pytest.raises(PlanError, match="word 1 of the plan") as raised:
        Plan.parse(f"R0 {word} R2")
    assert repr(word) in str(raised.value)
    assert "P3@1" in str(raised.value)  # says what to write


# ---- what a plan tells of itself


def test_placements_and_buffers() -> None:
    plan = Plan.parse("D0@2 C0@2 U0@2 P1@1 G1@1 F1@1 R4")
    assert plan.placements == {0: HOST, 1: DEVICE, 4: RESIDENT}
    assert [plan.num_buffers(where) for where in (HOST, DEVICE, RESIDENT)] == [3, 2, 0]
    assert Plan(()).num_buffers(DEVICE) == 0


def test_without_leaves_the_rest_in_order() -> None:
    plan = Plan.parse("D0@0 P1@0 C0@0 G1@0 U0@0 F1@0 R2")
    assert str(plan.without({1})) == "D0@0 C0@0 U0@0 R2"
    assert str(plan.without({0, 2})) == "P1@0 G1@0 F1@0"
    assert plan.without(set()) is plan
    assert plan.without({0, 1, 2}) == Plan(())


# ---- proof

# (plan, what is wrong); the offending operation is marked as the message has to mark it.
INVALID = [
    (">>D3@0<<", "there is no subgroup 3; the layout has 3"),
    ("D0@0 >>U0@0<<", "the next operation of subgroup 0 must be C (UPDATE_CPU)"),
    (">>C0@0<<", "the next operation of subgroup 0 must be D (GRAD_DOWN)"),
    (">>G0@0<<", "the next operation of subgroup 0 must be P (PREFETCH)"),
    ("D0@0 >>P0@0<<", "the next operation of subgroup 0 must be C (UPDATE_CPU)"),
    ("D0@0 C0@0 >>P0@0<<", "the next operation of subgroup 0 must be U (UPLOAD)"),
    ("D0@0 >>D0@0<<", "the next operation of subgroup 0 must be C (UPDATE_CPU)"),
    ("D0@0 C0@0 U0@0 >>D0@0<<", "subgroup 0 was already updated by D0@0"),
    ("D0@0 C0@0 U0@0 >>P0@0<<", "subgroup 0 was already updated by D0@0"),
    ("R2 >>R2<<", "subgroup 2 was already updated by R2"),
    (">>R0<<", "the state of subgroup 0 lives in host memory"),
    (">>P2@0<<", "the state of subgroup 2 lives on the device"),
    (">>P0@2<<", "there is no slot 2; there are 2"),
    (">>D0@1<<", "there is no staging buffer 1; there are 1"),
    ("P0@0 >>P1@0<<", "slot 0 still holds subgroup 0"),
    ("D0@0 >>D1@0<<", "staging buffer 0 still holds subgroup 0"),
    ("P0@0 >>G0@1<<", "slot 1 does not hold subgroup 0"),
    ("P0@0 P1@1 G0@0 >>F0@1<<", "slot 1 does not hold subgroup 0"),
]


@pytest.mark.parametrize(("marked", "reason"), INVALID)
def test_invalid_plan_marks_the_operation(marked: str, reason: str) -> None:
    plan = Plan.parse(marked.replace(">>", "").replace("<<", ""))
    position = [word.startswith(">>") for word in marked.split()].index(True)
    with pytest.raises(PlanError) as raised:
        plan.validate(3, num_slots=2, num_staging=1, resident={2})
    assert str(raised.value) == f"operation {position} ({plan.ops[position]}): {reason}; plan: {marked}"


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (Op(OpKind.PREFETCH, 0), "P (PREFETCH) needs a slot"),
        (Op(OpKind.GRAD_DOWN, 0), "D (GRAD_DOWN) needs a staging buffer"),
        (Op(OpKind.UPDATE_RESIDENT, 2, 0), "R (UPDATE_RESIDENT) needs no buffer"),
        (Op(OpKind.PREFETCH, 0, -1), "there is no slot -1; they count from 0"),
        (Op(OpKind.PREFETCH, -1, 0), "there is no subgroup -1; the layout has 3"),
    ],
)
def test_invalid_operation_that_has_no_text(op: Op, reason: str) -> None:
    with pytest.raises(PlanError) as raised:
        Plan((op,)).validate(3, resident={2})
    assert reason in str(raised.value)
    assert f">>{op}<<" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("P0@1 G0@1", "subgroup 0 never leaves slot 1: F0@1 (FLUSH) is missing; plan: P0@1 G0@1"),
        ("P0@1", "subgroup 0 never leaves slot 1: F0@1 (FLUSH) is missing; plan: P0@1"),
        ("D0@0 C0@0", "subgroup 0 never leaves staging buffer 0: U0@0 (UPLOAD) is missing; plan: D0@0 C0@0"),
        ("D1@0 C1@0 U1@0", "subgroups [0, 2] are never updated; plan: D1@0 C1@0 U1@0"),
        ("", "subgroups [0, 1, 2] are never updated; plan: "),
    ],
)
def test_incomplete_plan(text: str, reason: str) -> None:
    with pytest.raises(PlanError) as raised:
        Plan.parse(text).validate(3)
    assert str(raised.value) == reason


def test_buffers_are_unbounded_unless_limits_are_given() -> None:
    plan = Plan.parse("P0@7 G0@7 F0@7 D1@9 C1@9 U1@9")
    plan.validate(2)
    with pytest.raises(PlanError, match="there is no slot 7; there are 7"):
        plan.validate(2, num_slots=7)
    with pytest.raises(PlanError, match="there is no staging buffer 9; there are 2"):
        plan.validate(2, num_staging=2)


@given(placement_lists, st.integers(1, 4), st.integers(1, 4), st.data())
def test_dropping_any_operation_is_noticed(
    placements: list[Placement], num_slots: int, num_staging: int, data: st.DataObject
) -> None:
    plan = lower(placements, num_slots=num_slots, num_staging=num_staging)
    if not plan.ops:
        return
    position = data.draw(st.integers(0, len(plan.ops) - 1))
    resident = {i for i, where in enumerate(placements) if where is RESIDENT}
    with pytest.raises(PlanError):
        Plan(plan.ops[:position] + plan.ops[position + 1 :]).validate(len(placements), resident=resident)


# ---- lowering


@given(placement_lists, st.integers(1, 4), st.integers(1, 4), st.data())
def test_lowered_plan_is_valid(
    placements: list[Placement], num_slots: int, num_staging: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(placements))))
    plan = lower(placements, num_slots=num_slots, num_staging=num_staging, order=order)
    resident = {i for i, where in enumerate(placements) if where is RESIDENT}
    plan.validate(len(placements), num_slots=num_slots, num_staging=num_staging, resident=resident)
    assert plan.placements == dict(enumerate(placements))
    updates = (OpKind.UPDATE_CPU, OpKind.UPDATE_GPU, OpKind.UPDATE_RESIDENT)
    assert [op.subgroup for op in plan.ops if op.kind in updates] == list(order)


@given(st.integers(1, 8), st.integers(1, 4))
def test_buffers_fill_as_soon_as_they_are_free(num_subgroups: int, num_slots: int) -> None:
    """Before each update on the device every slot holds a state, as long as states are left to prefetch."""
    plan = lower([DEVICE] * num_subgroups, num_slots=num_slots, num_staging=0)
    in_slots = prefetched = 0
    for op in plan.ops:
        if op.kind is OpKind.UPDATE_GPU:
            assert in_slots == num_slots or prefetched == num_subgroups
        in_slots += (op.kind is OpKind.PREFETCH) - (op.kind is OpKind.FLUSH)
        prefetched += op.kind is OpKind.PREFETCH


@given(st.integers(2, 8), st.integers(2, 4))
def test_uploads_are_one_update_late(num_subgroups: int, num_staging: int) -> None:
    """The thread that enqueues waits for update i only once update i + 1 is queued, with its gradient on the way."""
    plan = lower([HOST] * num_subgroups, num_slots=0, num_staging=num_staging)
    position = {(op.kind, op.subgroup): i for i, op in enumerate(plan.ops)}
    for i in range(num_subgroups - 1):
        assert position[OpKind.UPDATE_CPU, i + 1] < position[OpKind.UPLOAD, i]
        if i + 2 < num_subgroups:
            assert position[OpKind.UPLOAD, i] < position[OpKind.UPDATE_CPU, i + 2]


def test_lowered_plans_as_text() -> None:
    def text(placements: list[Placement], num_slots: int = 2, num_staging: int = 2) -> str:
        return str(lower(placements, num_slots=num_slots, num_staging=num_staging))

    assert text([HOST] * 3) == "D0@0 D1@1 C0@0 C1@1 U0@0 D2@0 C2@0 U1@1 U2@0"
    assert text([HOST] * 2, num_staging=1) == "D0@0 C0@0 U0@0 D1@0 C1@0 U1@0"
    assert text([DEVICE] * 3) == "P0@0 P1@1 G0@0 F0@0 P2@0 G1@1 F1@1 G2@0 F2@0"
    assert text([RESIDENT] * 2) == "R0 R1"
    assert text([HOST, DEVICE, RESIDENT, HOST]) == "D0@0 D3@1 P1@0 C0@0 G1@0 F1@0 R2 C3@1 U0@0 U3@1"
    assert text([]) == ""


@pytest.mark.parametrize("order", [[0], [0, 0], [0, 1, 2], [1, 2]])
def test_order_that_is_no_permutation(order: list[int]) -> None:
    with pytest.raises(PlanError, match="order must be a permutation of the 2 subgroups"):
        lower([HOST, HOST], num_slots=0, num_staging=1, order=order)


def test_lowering_needs_buffers() -> None:
    with pytest.raises(PlanError, match="num_slots must be at least 1: 2 subgroups are placed on DEVICE"):
        lower([DEVICE, HOST, DEVICE], num_slots=0, num_staging=1)
    with pytest.raises(PlanError, match="num_staging must be at least 1: 1 subgroups are placed on HOST"):
        lower([DEVICE, HOST, DEVICE], num_slots=1, num_staging=0)


def test_every_kind_belongs_to_one_chain() -> None:
    kinds = [kind for chain in CHAINS.values() for kind in chain]
    assert sorted(kinds, key=list(OpKind).index) == list(OpKind)
