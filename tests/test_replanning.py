"""The optimizer while it re-plans: the same bits, and a log that can be replayed."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

import offload
from bench.online import SEEDS, WRONG, Machine
from offload.controller import Decision, replay
from offload.hardware import HardwareProfile
from offload.homes import Homes, first_plan
from offload.plan import Placement
from tests.training import assert_same_bits, mlp, train

HOST, DEVICE = Placement.HOST, Placement.DEVICE
pytestmark = pytest.mark.usefixtures("one_torch_thread")

# Nothing on the device pays by the first of these, everything by the second.
LINK_IS_SLOW = offload.Rates(1e3, 1e3, 1e12, 1e12)
CPU_IS_SLOW = offload.Rates(1e12, 1e12, 1e3, 1e12)


@pytest.mark.parametrize("executor", ["sync", "lazy", "random"])
@pytest.mark.parametrize("start", [LINK_IS_SLOW, CPU_IS_SLOW, None], ids=["link slow", "cpu slow", "measure"])
def test_the_same_bits_before_during_and_after(sim: ModuleType, executor: str, start: offload.Rates | None) -> None:
    expected = mlp(seed=3)
    reference = train(expected, offload.AdamW(expected.parameters(), plan="host", lr=1e-2))
    sim.configure(executor)
    model = mlp(seed=3, device="sim")
    optimizer = offload.AdamW(model.parameters(), lr=1e-2, subgroup_numel=200, profile=start)
    plans = {str(optimizer.plan)}
    trained = train(model, optimizer, before_step=lambda step: plans.add(str(optimizer.plan)))
    assert len(plans) > 1, "nothing was re-planned, so nothing was tested"
    assert_same_bits(trained, reference)
    optimizer.synchronize()
    assert sim.races() == []


@pytest.mark.parametrize(("factors", "seed"), [((2, 2, 0.5, 0.5), None), ((0.5, 0.5, 2, 2), 0), ((2, 0.5, 2, 0.5), 1)])
def test_wrong_profiles_reach_the_best_plan_in_20_steps(
    sim: ModuleType, factors: tuple[float, ...], seed: int | None
) -> None:
    """In virtual time, with neighbours (``seed``) or without: within 5 % of the best share that was timed."""
    reached = Machine(HardwareProfile.load("rtx4090-desktop")).run(factors, seed)
    assert reached.reached_over_best <= 1.05, reached


def test_a_wrong_profile_is_worth_correcting(sim: ModuleType) -> None:
    """Else the test above would hold without measuring."""
    machine = Machine(HardwareProfile.load("rtx4090-desktop"))
    firsts = [machine.run(factors).first_over_best for factors in ((2, 2, 0.5, 0.5), (0.5, 0.5, 2, 2))]
    assert min(firsts) > 1.05


@pytest.mark.slow
@pytest.mark.parametrize("profile", HardwareProfile.names())
def test_every_wrong_profile_reaches_the_best_plan_in_20_steps(sim: ModuleType, profile: str) -> None:
    machine = Machine(HardwareProfile.load(profile))
    worst = max(machine.run(factors, seed).reached_over_best for factors in WRONG for seed in SEEDS)
    assert worst <= 1.05


def test_the_log_of_a_training_is_replayed(sim: ModuleType, tmp_path: Path) -> None:
    model = mlp(device="sim")
    optimizer = offload.AdamW(model.parameters(), subgroup_numel=200, profile=CPU_IS_SLOW)
    train(model, optimizer)
    optimizer.save_decisions(tmp_path / "log")
    again = replay(tmp_path / "log")
    assert list(again.decisions) == list(optimizer.runtime.in_force.decisions)
    text = optimizer.explain()
    assert "update " in text
    assert "(predicted " in text


def test_there_are_no_decisions_to_save_without_choices() -> None:
    model = mlp()
    optimizer = offload.AdamW(model.parameters())
    with pytest.raises(ValueError, match="no decisions: only plan='auto'"):
        optimizer.save_decisions("log")


def test_a_plan_of_the_users_own_ends_the_choosing(sim: ModuleType) -> None:
    model = mlp(device="sim")
    optimizer = offload.AdamW(model.parameters(), subgroup_numel=200)
    train(model, optimizer, steps=range(3))
    plan, num = optimizer.plan, len(optimizer.runtime.in_force.decisions)
    optimizer.set_plan(plan)
    train(model, optimizer, steps=range(3, 8))
    assert optimizer.plan == plan
    assert len(optimizer.runtime.in_force.decisions) == num


# ---- overlap="auto"


def test_the_planner_chooses_the_overlap_and_says_why(sim: ModuleType) -> None:
    """Steps that were measured one after the other give the times of forward and backward."""
    model = mlp(device="sim")
    optimizer = offload.AdamW(model.parameters(), subgroup_numel=200, lr=1e-2)
    assert "overlap: next_forward, until the times of forward and backward are known" in optimizer.explain()
    train(model, optimizer)
    decision = optimizer.runtime.in_force.decisions[-1]
    assert set(decision.step_s) == {"none", "next_forward"}
    assert optimizer.runtime.overlap == decision.overlap
    assert re.search(rf"overlap: {decision.overlap}; a step is predicted to take [\d.]+ ms with none, [\d.]+ ms with "
                     rf"next_forward", optimizer.explain())  # fmt: skip


def test_the_same_bits_where_the_overlap_changes(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each decision finds another overlap the shortest."""
    expected = mlp(seed=3)
    reference = train(expected, offload.AdamW(expected.parameters(), plan="host", lr=1e-2))
    monkeypatch.setattr(Decision, "overlap", property(lambda self: ("none", "next_forward")[self.measurement.step % 2]))
    sim.configure("lazy")
    model = mlp(seed=3, device="sim")
    optimizer = offload.AdamW(model.parameters(), lr=1e-2, subgroup_numel=200)
    overlaps = []
    trained = train(model, optimizer, before_step=lambda step: overlaps.append(optimizer.runtime.overlap))
    assert set(overlaps) == {"none", "next_forward"}
    assert_same_bits(trained, reference)
    optimizer.synchronize()
    assert sim.races() == []


def test_an_overlap_that_was_asked_for_stays(sim: ModuleType) -> None:
    model = mlp(device="sim")
    optimizer = offload.AdamW(model.parameters(), subgroup_numel=200, overlap="none")
    train(model, optimizer)
    assert optimizer.runtime.in_force.decisions[-1].step_s
    assert optimizer.runtime.overlap == "none"
    assert "overlap:" not in optimizer.explain()


def test_one_subgroup_alone_is_not_measured_for_ever(sim: ModuleType) -> None:
    """No step measures both sides, so nothing could be decided; each measured step would wait for its update."""
    model = mlp(device="sim")
    optimizer = offload.AdamW(model.parameters())
    assert len(optimizer.runtime.subgroups) == 1
    train(model, optimizer, steps=range(3))
    assert optimizer.runtime.spans == []
    with pytest.raises(ValueError, match="no decisions"):
        optimizer.save_decisions("log")


def test_one_visitor_among_others_is_measured_on_the_device() -> None:
    homes = Homes(visitors=frozenset({2}), num_slots=1, num_staging=2)
    placements = first_plan("auto", 4, homes).placements
    assert [placements[i] for i in range(4)] == [HOST, HOST, DEVICE, HOST]
    assert first_plan("auto", 1, Homes(visitors=frozenset({0}), num_slots=1, num_staging=2)).placements == {0: HOST}
