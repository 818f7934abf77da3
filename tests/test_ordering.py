"""The ordering proof: vector clocks over buffers, and the sentences that name what nothing orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from offload import ordering
from offload.executor import run_update
from offload.lanes import Lanes, Work
from offload.lanes.ordering import AccessHistory, ordering_lanes
from offload.ordering import check_ordering, find_hazards
from offload.plan import Plan, PlanError
from offload.subgroup import Slot, Staging, Subgroup


def read(buffer: str) -> Work:
    return Work("reader", reads=(buffer,))


def write(buffer: str) -> Work:
    return Work("writer", writes=(buffer,))


@pytest.fixture
def history() -> AccessHistory:
    return AccessHistory()


@pytest.fixture
def lanes(history: AccessHistory) -> Lanes:
    return ordering_lanes(history)


# ---- accesses


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        (write("x"), read("x"), "reader on d2h reads x which writer on h2d wrote, and no wait orders them"),
        (read("x"), write("x"), "writer on d2h writes x which reader on h2d read, and no wait orders them"),
        (write("x"), write("x"), "writer on d2h writes x which writer on h2d wrote, and no wait orders them"),
    ],
)
def test_conflict_that_nothing_orders(
    lanes: Lanes, history: AccessHistory, first: Work, second: Work, sentence: str
) -> None:
    lanes.h2d.submit(first)
    lanes.d2h.submit(second)
    assert history.hazards == [sentence]


@pytest.mark.parametrize(
    ("first", "second"), [(read("x"), read("x")), (write("x"), write("y")), (write("x"), read("y"))]
)
def test_accesses_that_do_not_conflict(lanes: Lanes, history: AccessHistory, first: Work, second: Work) -> None:
    lanes.h2d.submit(first)
    lanes.d2h.submit(second)
    assert history.hazards == []


def test_what_orders(lanes: Lanes, history: AccessHistory) -> None:
    written = lanes.h2d.submit(write("x"))
    lanes.h2d.submit(write("x"))  # same lane
    lanes.d2h.submit(write("x"), after=(None, lanes.h2d.mark()))  # mark
    lanes.host.wait(lanes.d2h.mark())
    lanes.host.submit(read("x"))  # wait, then later work of that lane
    lanes.compute.submit(write("x"), after=(lanes.host.mark(),))  # through two lanes
    assert history.hazards == []
    lanes.h2d.submit(read("x"), after=(written,))  # its own lane's event says nothing of the compute lane
    assert len(history.hazards) == 1


def test_event_covers_only_what_was_before_it(lanes: Lanes, history: AccessHistory) -> None:
    mark = lanes.h2d.mark()
    lanes.h2d.submit(write("x"))
    lanes.d2h.submit(read("x"), after=(mark,))
    assert len(history.hazards) == 1


def test_every_reader_is_remembered(lanes: Lanes, history: AccessHistory) -> None:
    lanes.h2d.submit(read("x"))
    lanes.d2h.submit(read("x"))
    lanes.compute.submit(write("x"), after=(lanes.d2h.mark(),))
    assert history.hazards == ["writer on compute writes x which reader on h2d read, and no wait orders them"]


# ---- plans


def subgroups(num: int) -> list[Subgroup]:
    return [Subgroup(i, 10, 20, 120) for i in range(num)]


PLAN = Plan.parse("D0@0 P1@0 C0@0 G1@0 F1@0 U0@0 R2")


def test_sound_plan_has_no_hazards() -> None:
    assert find_hazards([PLAN] * 3, subgroups(3)) == []
    check_ordering([PLAN] * 3, subgroups(3))
    assert find_hazards([], []) == []


def test_changes_nothing_of_the_subgroups() -> None:
    group = subgroups(3)
    find_hazards([PLAN], group)
    assert all(s.flushed is None and s.grad_on_host is None and s.updated_on_host is None for s in group)


def test_order_alone_does_not_make_a_plan_valid() -> None:
    """A slot refilled before its state was used: every access is ordered, and wrong. Seeing that is validate's part."""
    plan = Plan.parse("P0@0 P1@0 G0@0 G1@0 F0@0 F1@0")
    assert find_hazards([plan], subgroups(2)) == []
    with pytest.raises(PlanError, match="slot 0 still holds subgroup 0"):
        plan.validate(2)


def test_error_prints_hazard_and_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def update_at_once(
        plan: Plan, subgroups: Sequence[Subgroup], slots: Sequence[Slot], stagings: Sequence[Staging], lanes: Lanes
    ) -> None:
        run_update(plan, subgroups, slots, stagings, lanes)
        lanes.host.submit(Work("meddler", writes=(subgroups[0].param_name,)))

    monkeypatch.setattr(ordering, "run_update", update_at_once)
    with pytest.raises(PlanError) as raised:
        check_ordering([PLAN], subgroups(3))
    message = str(raised.value)
    assert "conflicting accesses are unordered" in message
    assert "meddler on host writes ('param', 0)" in message
    assert str(PLAN) in message


@pytest.mark.parametrize("missing", ["before", "after"])
def test_backward_and_forward_are_part_of_the_proof(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is sound only between a backward that produces its gradients and a forward that reads its parameters."""

    class Deaf:
        """A compute lane whose waits and marks order nothing."""

        def __init__(self, lanes: Lanes) -> None:
            self.submit = lanes.compute.submit
            self.mark = ordering_lanes(AccessHistory()).compute.mark if missing == "before" else lanes.compute.mark
            self.wait = (lambda event: None) if missing == "after" else lanes.compute.wait

    def deafened(
        plan: Plan, subgroups: Sequence[Subgroup], slots: Sequence[Slot], stagings: Sequence[Staging], lanes: Lanes
    ) -> None:
        run_update(plan, subgroups, slots, stagings, replace(lanes, compute=Deaf(lanes)))

    monkeypatch.setattr(ordering, "run_update", deafened)
    (hazard, *_) = find_hazards([Plan.parse("D0@0 C0@0 U0@0")], subgroups(1))
    expected = {
        "before": "D0@0 on d2h reads ('grad', 0) which backward on compute wrote",
        "after": "forward on compute reads ('param', 0) which U0@0 on h2d wrote",
    }
    assert hazard.startswith(expected[missing])
