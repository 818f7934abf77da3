"""The runtime: memory before steps, plans in force, and steps that fail once and for all."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor

from offload import adam, plan_in_force
from offload.adam import AdamSubgroup, SliceUpdate
from offload.controller import HYSTERESIS
from offload.homes import Homes
from offload.kernels import AdamScalars, adam_step
from offload.layout import Packed, pack
from offload.memory import Claim
from offload.options import Options
from offload.plan import Placement, Plan, PlanError, lower
from offload.policy import Policy, Static
from offload.pool import BudgetError, Budgets, Pool
from offload.runtime import Runtime, lanes_for

HOST, DEVICE, RESIDENT = Placement.HOST, Placement.DEVICE, Placement.RESIDENT
NO_LIMITS = Budgets()
NUMELS = (1024, 512, 2048, 1024)
SCALARS = AdamScalars.at_step(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, step=1, decoupled=True)


def build(
    policy: Policy, device: torch.device | str = "cpu", *, budgets: Budgets = NO_LIMITS, numels: Sequence[int] = NUMELS
) -> Runtime:
    """A runtime over one parameter of ones for each subgroup."""
    built = Runtime(torch.device(device), Options(policy, budgets, None, None))
    built.add(packed_params(built.device, numels))
    for actions in built.actions:
        actions.state[0].fill_(1.0)
    return built


def packed_params(device: torch.device, numels: Sequence[int]) -> list[Packed]:
    return [pack(0, [torch.ones(numel, device=device)], numel)[0] for numel in numels]


def updates_of(built: Runtime, *, idle: Sequence[int] = ()) -> dict[int, list[SliceUpdate]]:
    """A gradient of 2 for every parameter that is not idle."""
    return {
        i: [
            SliceUpdate(item, torch.full_like(item.param, 2.0), item.param.detach().view(-1), SCALARS)
            for item in actions.slices
        ]
        for i, actions in enumerate(built.actions)
        if i not in idle
    }


def params(built: Runtime) -> list[Tensor]:
    return [item.param.cpu() for actions in built.actions for item in actions.slices]


def expected(numel: int) -> Tensor:
    master, exp_avg, exp_avg_sq = torch.ones(numel), torch.zeros(numel), torch.zeros(numel)
    adam_step(master, exp_avg, exp_avg_sq, torch.full((numel,), 2.0), scalars=SCALARS)
    return master


MIXED = Plan.parse("D0@0 P1@0 C0@0 G1@0 F1@0 U0@0 R2 R3")
POLICIES: tuple[Policy, ...] = ("host", "device", "auto", Static(0.5), MIXED)


# ---- steps


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_step_on_the_cpu(policy: Policy) -> None:
    built = build(policy)
    built.step(updates_of(built))
    built.synchronize()
    for param in params(built):
        assert torch.equal(param, expected(param.numel()))


@pytest.mark.parametrize("executor", ["sync", "lazy", "eager"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_step_on_the_device(sim: ModuleType, policy: Policy, executor: str) -> None:
    sim.configure(executor=executor)
    built = build(policy, "sim:0")
    built.step(updates_of(built))
    built.synchronize()
    for param in params(built):
        assert torch.equal(param, expected(param.numel()))
    assert sim.races() == []


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_subgroups_without_gradients_are_left_alone(policy: Policy) -> None:
    built, idle = build(policy), (1, 2)
    built.step(updates_of(built))
    before = [
        (param.clone(), actions.state.clone()) for param, actions in zip(params(built), built.actions, strict=True)
    ]
    built.step(updates_of(built, idle=idle))
    for i, (param, state) in enumerate(before):
        assert torch.equal(param, params(built)[i]) == (i in idle)
        assert torch.equal(state, built.actions[i].state) == (i in idle)


def test_staging_buffers_serve_every_dtype() -> None:
    """The largest gradient, in bytes, need not be a whole number of another dtype's elements."""
    built = Runtime(torch.device("cpu"), Options("host", NO_LIMITS, None, None))
    packed = [pack(0, [torch.ones(n, dtype=dtype)], n)[0] for n, dtype in ((5, torch.bfloat16), (2, torch.float32))]
    built.add(packed)
    built.step(updates_of(built))
    assert not any(param.eq(1).any() for param in params(built))


def test_gradients_are_let_go(sim: ModuleType) -> None:
    device = torch.device("sim", 0)
    built = build("host", device)
    before = torch.accelerator.memory_allocated(device)
    built.step(updates_of(built))
    built.synchronize()
    assert torch.accelerator.memory_allocated(device) == before


def test_timed_step_says_what_ran_when(sim: ModuleType) -> None:
    built = build(MIXED, "sim:0")
    built.step(updates_of(built))
    assert built.spans == []
    built.time_next_step = True
    built.step(updates_of(built))
    assert sorted(span.name for span in built.spans) == sorted(str(built.plan).split())
    assert not built.time_next_step


def test_lanes_of_the_cpu_are_inline() -> None:
    lanes = lanes_for(torch.device("cpu"))
    assert lanes.compute is lanes.host is lanes.h2d is lanes.d2h


# ---- memory


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_bill_is_what_the_device_holds(sim: ModuleType, policy: Policy) -> None:
    device = torch.device("sim", 0)
    before = torch.accelerator.memory_allocated(device)
    built = build(policy, device)
    of_params = sum(4 * numel for numel in NUMELS)
    assert torch.accelerator.memory_allocated(device) - before - of_params == built.bill.device_bytes
    held = {buffer.data_ptr(): buffer.untyped_storage().nbytes() for buffer in pinned_buffers(built)}
    assert sum(held.values()) == built.bill.pinned_bytes


def pinned_buffers(built: Runtime) -> list[Tensor]:
    states = [actions.state for actions in built.actions if actions.state.device.type == "cpu"]
    halves = [half for staging in built.pool.stagings for half in (staging.grad, staging.param)]
    return [buffer for buffer in (*states, *halves) if buffer is not None and buffer.is_pinned()]


@pytest.mark.parametrize(
    ("policy", "budgets"),
    [
        ("device", Budgets(device_bytes=2 * 12 * 2048 - 1)),
        ("host", Budgets(host_bytes=12 * sum(NUMELS))),
        ("auto", Budgets(pinned_bytes=100)),
    ],
)
def test_nothing_is_allocated_before_the_budgets_are_checked(
    sim: ModuleType, policy: Policy, budgets: Budgets, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("host_state", "device_state", "set_slots", "set_stagings"):
        monkeypatch.setattr(Pool, name, lambda *_args, **_kwargs: pytest.fail("allocated"))
    device = "sim:0" if policy == "auto" else "cpu"  # where nothing is pinned
    built = Runtime(torch.device(device), Options(policy, budgets, None, None))
    with pytest.raises(BudgetError, match=r"are needed: .*; raise it"):
        built.add(packed_params(built.device, NUMELS))
    assert built.subgroups == []
    assert built.actions == []


def test_plan_for_another_model_is_refused_before_anything_is_allocated() -> None:
    built = Runtime(torch.device("cpu"), Options(Plan.parse("D0@0 C0@0 U0@0"), Budgets(), None, None))
    with pytest.raises(PlanError, match=r"subgroups \[1, 2, 3\] are never updated"):
        built.add(packed_params(built.device, NUMELS))
    assert built.subgroups == []
    assert built.pool.stagings == []


def test_failed_addition_leaves_the_runtime_as_it_was() -> None:
    budget = Budgets(host_bytes=12 * sum(NUMELS) + 4 * 4 * 2048)
    built = build("host", budgets=budget)
    plan, bill = built.plan, built.bill
    with pytest.raises(BudgetError):
        built.add(packed_params(built.device, [16]))
    assert (len(built.subgroups), built.plan, built.bill) == (4, plan, bill)
    built.step(updates_of(built))
    assert torch.equal(params(built)[0], expected(1024))


def test_allocation_that_fails_half_way_leaves_the_runtime_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    built = build("host")
    staged = [staging.param.nbytes for staging in built.pool.stagings]
    states = iter([torch.zeros(3, 8)])
    monkeypatch.setattr(built.pool, "host_state", lambda *_args, **_kwargs: next(states))
    with pytest.raises(StopIteration):
        built.add(packed_params(built.device, [8, 1 << 16]))
    assert [staging.param.nbytes for staging in built.pool.stagings] == staged
    assert len(built.actions) == len(built.subgroups) == 4
    built.step(updates_of(built))
    assert torch.equal(params(built)[0], expected(1024))


def test_subgroups_that_join_later_are_stepped(sim: ModuleType) -> None:
    built = build("auto", "sim:0")
    built.step(updates_of(built))
    (added,) = built.add(packed_params(built.device, [4096]))
    added.state[0].fill_(1.0)
    assert built.actions[-1] is added
    assert len(built.plan.placements) == 5
    built.step(updates_of(built, idle=range(4)))
    built.synchronize()
    assert torch.equal(params(built)[-1], expected(4096))
    assert sim.races() == []


def test_nothing_is_in_flight_when_buffers_are_replaced(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory may be anybody's afterwards; here it becomes NaN."""
    sim.configure(executor="lazy")
    built = build(MIXED, "sim:0")
    built.memory._options = built.in_force._options = Options("auto", NO_LIMITS, None, None)
    replace_stagings = built.pool.set_stagings

    def overwrite_and_replace(num_stagings: int, param_bytes: int) -> None:
        for staging in built.pool.stagings:
            assert staging.param is not None
            staging.param.view(torch.float32).fill_(torch.nan)
        replace_stagings(num_stagings, param_bytes)

    monkeypatch.setattr(built.pool, "set_stagings", overwrite_and_replace)
    built.step(updates_of(built))
    built.add(packed_params(built.device, [1024]))
    for param in params(built)[:-1]:
        assert torch.equal(param, expected(param.numel()))


# ---- plans


def test_set_plan_runs_from_the_next_step_on(sim: ModuleType) -> None:
    built = build("auto", "sim:0")
    plan = lower([DEVICE, DEVICE, HOST, DEVICE], num_slots=2, num_staging=2, order=[3, 1, 2, 0])
    built.set_plan(plan)
    assert built.plan == plan
    for _ in range(4):
        built.time_next_step = True
        built.step(updates_of(built))
        assert built.plan == plan, "a plan that was set is not replaced by a measured one"
        assert {span.name for span in built.spans} == set(str(plan).split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("D0@0 C0@0 U0@0", r"subgroups \[1, 2, 3\] are never updated"),
        ("P0@2 G0@2 F0@2 R1 R2 R3", "there is no slot 2; there are 2"),
        ("D0@4 C0@4 U0@4 R1 R2 R3", "there is no staging buffer 4"),
        ("R0 R1 R2 R3", "the state of subgroup 0 lives in host memory"),
        ("D4@0 C4@0 U4@0", "there is no subgroup 4; the layout has 4"),
    ],
)
def test_plan_that_does_not_fit(text: str, message: str) -> None:
    built = build("auto")
    before = built.plan
    with pytest.raises(PlanError, match=message):
        built.set_plan(Plan.parse(text))
    assert built.plan is before


def test_plan_that_visits_with_pageable_state() -> None:
    built = build(Static(0.0))
    plan = lower([HOST, HOST, HOST, HOST], num_slots=0, num_staging=2)
    built.set_plan(plan)
    built.memory._claim = Claim(Homes(visitors=frozenset({0}), num_slots=1, num_staging=2))
    visits = lower([DEVICE, DEVICE, HOST, DEVICE], num_slots=1, num_staging=2)
    with pytest.raises(BudgetError) as raised:
        built.set_plan(visits)
    message = str(raised.value)
    assert "updates subgroups [1, 3] on the device, but their state is not pinned" in message
    assert "18.0 KiB more pinned memory is needed" in message
    assert "raise pinned_budget" in message
    assert built.plan is plan


def test_auto_measures_and_plans_anew(sim: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    """The first step warms up, the second is measured, the third measures the CPU alone; then the fastest is run.

    Unless the machine was so disturbed that a side is measured alone once more, or copies are: each at most twice.
    """
    built = build("auto", "sim:0")
    first = built.plan
    assert set(first.placements.values()) == {HOST, DEVICE}, "both sides have to be measured"
    built.step(updates_of(built))
    assert (built.in_force.rates, built.plan) == (None, first)
    with caplog.at_level(logging.INFO, logger="offload"):
        built.step(updates_of(built))
    assert built.in_force.rates is not None
    (decision,) = built.in_force.decisions
    assert (decision.ran, decision.plan) == (first, built.plan)
    assert set(built.plan.placements.values()) == {HOST}
    assert "step 1: probed, 0 of 4 subgroups visit the device" in caplog.text
    for _ in range(4):
        built.step(updates_of(built))
        last = built.in_force.decisions[-1]
        if last.action != "probed":
            break
    assert last.target_s <= last.current_s / (1 - HYSTERESIS)
    assert last.action != "probed"
    built.step(updates_of(built))
    built.synchronize()
    assert sim.races() == []


@pytest.mark.parametrize("policy", ["host", "device", Static(0.5)], ids=str)
def test_named_policies_are_not_replanned(sim: ModuleType, policy: Policy) -> None:
    built = build(policy, "sim:0")
    before = built.plan
    for _ in range(3):
        built.step(updates_of(built))
    assert built.plan is before
    assert built.in_force.rates is None


# ---- failures


def failing_on(actions_method: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make the kernel raise inside one operation of :class:`AdamSubgroup`; the result puts it right again."""
    original = getattr(AdamSubgroup, actions_method)

    def explode(*_args: object, **_kwargs: object) -> None:
        raise ArithmeticError("injected")

    def with_failing_kernel(self: AdamSubgroup, *args: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(adam, "update", explode)
            patch.setattr(adam.PreparedUpdate, "__call__", explode)
            original(self, *args)

    monkeypatch.setattr(AdamSubgroup, actions_method, with_failing_kernel)
    return lambda: monkeypatch.setattr(AdamSubgroup, actions_method, original)


@pytest.mark.parametrize(
    ("policy", "operation"),
    [("host", "update_cpu"), ("device", "update_gpu"), (Static(1.0), "update_resident")],
    ids=["host lane", "compute lane", "resident"],
)
@pytest.mark.parametrize("device", ["cpu", "sim:0"])
def test_failed_step_breaks_the_runtime(
    sim: ModuleType, device: str, policy: Policy, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(policy, device)
    built.step(updates_of(built))
    repair = failing_on(operation, monkeypatch)
    with pytest.raises(ArithmeticError, match="injected") as raised:
        built.step(updates_of(built))
    frames = [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert operation in frames or "with_failing_kernel" in frames
    assert "explode" in frames, "the traceback leads to where it failed"
    repair()
    before = [param.clone() for param in params(built)]
    for use in (lambda: built.step(updates_of(built)), built.synchronize, built.check_usable):
        with pytest.raises(RuntimeError, match=r"this optimizer is broken: .*construct a new optimizer") as broken:
            use()
        assert broken.value.__cause__ is raised.value
    assert all(torch.equal(a, b) for a, b in zip(before, params(built), strict=True))


def test_no_update_follows_a_failed_one(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build("host", "sim:0")
    failing_on("update_cpu", monkeypatch)
    with pytest.raises(ArithmeticError):
        built.step(updates_of(built))
    assert all(param.eq(1).all() for param in params(built)), "nothing was uploaded"
    assert not any(actions.state[1:].any() for actions in built.actions), "no later update ran"


def test_refused_plan_breaks_nothing() -> None:
    built = build("auto")
    with pytest.raises(PlanError):
        built.set_plan(Plan(()))
    built.step(updates_of(built))
    built.synchronize()


def test_replanning_checks_what_it_chose(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build("auto", "sim:0")
    seen: list[Plan] = []
    monkeypatch.setattr(plan_in_force, "check_ordering", lambda plans, subgroups, **_: seen.append(plans[-1]))
    built.step(updates_of(built))
    built.step(updates_of(built))
    assert seen == ([built.plan] if built.in_force.decisions[0].action != "kept" else [])
