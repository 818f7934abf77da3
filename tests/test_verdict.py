"""Verdicts: runs that were made slow in one way each, and what is said of them first."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import offload
from offload import kernels
from offload.accelerators.sim import SimAccelerator
from offload.cli import main
from offload.facts import HostFacts, ProcessorMeter, host_facts
from offload.homes import Homes
from offload.perf_model import Rates, predict
from offload.plan import Placement, Plan, lower
from offload.pool import Budgets
from offload.record import StepRecord
from offload.subgroup import Subgroup
from offload.timeline import elapsed_s
from offload.verdict import diagnose, report

NUM, NUMEL = 12, 4096
LINK, HOST = 12e9, 1e9
EXPECTED = Rates(LINK, LINK, HOST, 1e11)


@pytest.fixture
def machine(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """The emulated device with the expected link, and a CPU that updates at a set rate, however busy it really is."""
    sim.set_profile(h2d_bytes_per_s=LINK, d2h_bytes_per_s=LINK, latency_s=0, launch_s=0)
    found = Machine(sim, monkeypatch)
    monkeypatch.setattr(SimAccelerator, "charge_host_time", found.charge)
    monkeypatch.setattr(ProcessorMeter, "busy_elsewhere", lambda self: found.busy_elsewhere)
    kernels.set_num_threads(2)
    yield found
    kernels.set_num_threads(None)


class Machine:
    """One run after another on the emulated device, each with something wrong."""

    def __init__(self, sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sim, self.monkeypatch = sim, monkeypatch
        self.host_rate, self.busy_elsewhere, self.model_s = HOST, 0.0, 0.0
        self.num_steps = 1

    def charge(self, _: float, name: str = "", **amounts: int) -> None:
        self.sim.host_charge(NUMEL / self.host_rate if name.startswith("C") else 0.0, name)

    def run(self, path: Path, **options: Any) -> StepRecord:
        params = [torch.nn.Parameter(torch.zeros(NUMEL, dtype=torch.bfloat16, device="sim")) for _ in range(NUM)]
        optimizer = offload.AdamW(params, subgroup_numel=NUMEL, **options)
        for param in params:
            param.grad = torch.zeros_like(param)
        for _ in range(self.num_steps):
            optimizer.synchronize()
            optimizer.time_next_step()
            self.sim.host_charge(self.model_s, "forward and backward")
            optimizer.step()
        optimizer.save_trace(path)
        return StepRecord.load(path)


GOOD = {"plan": offload.Stride(2)}  # near the best share at the expected rates


def first(path: Path, expected: Rates = EXPECTED) -> str:
    return diagnose(StepRecord.load(path), expected).verdicts[0].cause


def test_a_good_run_gets_no_verdict(machine: Machine, tmp_path: Path) -> None:
    found = diagnose(machine.run(tmp_path / "t", **GOOD), EXPECTED)
    assert found.verdicts == ()
    assert "nothing that was looked for is wrong" in report(found)
    assert found.rates.h2d_bytes_per_s == pytest.approx(LINK)
    assert found.rates.host_update_params_per_s == pytest.approx(HOST)


# ---- the eight


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no binding on this system")
def test_wrong_core_binding(machine: Machine, tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        machine.host_rate = HOST / 4
        machine.run(tmp_path / "t", **GOOD)
    finally:
        os.sched_setaffinity(0, before)
    assert first(tmp_path / "t") == "core binding"


def test_pageable_memory(machine: Machine, tmp_path: Path) -> None:
    machine.monkeypatch.setattr(
        SimAccelerator, "pinned_empty", lambda self, num_bytes: torch.empty(num_bytes, dtype=torch.uint8)
    )
    record = machine.run(tmp_path / "t", **GOOD)
    assert record.pageable_bytes >= NUM // 2 * 12 * NUMEL
    assert first(tmp_path / "t") == "pageable memory"


def test_one_slot(machine: Machine, tmp_path: Path) -> None:
    machine.run(tmp_path / "t", num_slots=1, **GOOD)
    assert first(tmp_path / "t") == "one slot"


def test_stride_too_large(machine: Machine, tmp_path: Path) -> None:
    machine.run(tmp_path / "t", plan=offload.Stride(NUM))
    assert first(tmp_path / "t") == "stride too large"


def test_link_half_as_fast(machine: Machine, tmp_path: Path) -> None:
    machine.sim.set_profile(h2d_bytes_per_s=LINK / 2, d2h_bytes_per_s=LINK / 2)
    machine.run(tmp_path / "t", **GOOD)
    assert first(tmp_path / "t") == "slow link"


def test_cpu_busy(machine: Machine, tmp_path: Path) -> None:
    machine.host_rate, machine.busy_elsewhere = HOST / 4, 1.5
    machine.run(tmp_path / "t", **GOOD)
    assert first(tmp_path / "t") == "CPU busy"


@pytest.mark.parametrize("budget", [{"pinned_budget": 200_000}, {"device_budget": 60_000}])
def test_budget_too_small(machine: Machine, tmp_path: Path, budget: dict[str, int]) -> None:
    machine.num_steps = 4
    machine.host_rate = HOST / 2
    machine.run(tmp_path / "t", plan="auto", **budget)
    assert first(tmp_path / "t", replace(EXPECTED, host_update_params_per_s=HOST / 2)) == "budget too small"


def test_update_after_backward(machine: Machine, tmp_path: Path) -> None:
    machine.model_s = 1e-4
    record = machine.run(tmp_path / "t", overlap="none", **GOOD)
    assert record.model_s == pytest.approx(1e-4)
    found = diagnose(record, EXPECTED)
    assert found.verdicts[0].cause == "update after backward"
    assert found.verdicts[0].gain_s == pytest.approx(found.update_s), "all of it fits beside the model"
    assert diagnose(replace(record, overlap="next_forward"), EXPECTED).verdicts == ()


def test_the_models_time_is_what_the_device_took(machine: Machine, tmp_path: Path) -> None:
    """Forward and backward are only enqueued when the step begins."""
    machine.sim.set_profile(memory_bytes_per_s=1e9)
    x = torch.zeros(1 << 18, device="sim")
    optimizer = offload.AdamW([torch.nn.Parameter(torch.zeros(NUMEL, device="sim"))], plan="host")
    optimizer.param_groups[0]["params"][0].grad = torch.zeros(NUMEL, device="sim")
    optimizer.synchronize()
    optimizer.time_next_step()
    x.add_(1)
    optimizer.step()
    optimizer.save_trace(tmp_path / "t")
    assert StepRecord.load(tmp_path / "t").model_s >= 2 * x.nbytes / 1e9


# ---- further causes, from records made on virtual lanes


def made(rates: Rates = EXPECTED, num_visits: int = NUM // 2, **changes: Any) -> StepRecord:
    """The record of a plan that ran at ``rates``."""
    subgroups = [Subgroup(i, NUMEL, 2 * NUMEL, 12 * NUMEL) for i in range(NUM)]
    every = NUM // num_visits if num_visits else NUM + 1
    placements = [Placement.DEVICE if i % every == every - 1 else Placement.HOST for i in range(NUM)]
    homes = Homes(visitors=frozenset(range(NUM)), num_slots=2, num_staging=2)
    plan = lower(placements, num_slots=2, num_staging=2)
    fields = {
        "spans": predict(plan, subgroups, rates).spans, "plan": plan, "sizes": ((NUMEL, 2 * NUMEL, 12 * NUMEL),) * NUM,
        "homes": homes, "policy": "Stride", "asked_slots": None, "budgets": Budgets(), "expected": None,
        "pageable_bytes": 0, "facts": HostFacts(16, 16, 0, 16, 0.0),
    }  # fmt: skip
    return StepRecord(**{**fields, **changes})


def causes(record: StepRecord, expected: Rates | None = EXPECTED) -> list[str]:
    return [verdict.cause for verdict in diagnose(record, expected).verdicts]


def test_threads_on_the_other_node() -> None:
    slow = replace(EXPECTED, host_update_params_per_s=HOST / 4)
    record = made(slow, facts=HostFacts(32, 16, 12, 16, 0.0))
    text = diagnose(record, EXPECTED).verdicts[0].text
    assert "12 of the 16 processors of this process are on another NUMA node" in text


def test_a_slow_cpu_without_a_cause_is_said_so() -> None:
    assert causes(made(replace(EXPECTED, host_update_params_per_s=HOST / 3)))[0] == "slow CPU update"


def test_facts_alone_do_where_nothing_was_expected() -> None:
    """Twice as many threads as processors is wrong without any profile."""
    slow = replace(EXPECTED, host_update_params_per_s=HOST / 4)
    assert causes(made(slow, facts=HostFacts(16, 8, 0, 16, 0.0)), None)[0] == "core binding"
    assert "slow CPU update" not in causes(made(slow), None)


def test_too_many_visits() -> None:
    rates = replace(EXPECTED, host_update_params_per_s=8e9)
    assert causes(made(rates, num_visits=NUM), rates) == ["stride too small"]


def test_one_slot_by_budget_is_the_budgets_fault() -> None:
    record = made()
    placements = [record.plan.placements[i] for i in range(NUM)]
    homes = replace(record.homes, num_slots=1)
    plan = lower(placements, num_slots=1, num_staging=2)
    spans = predict(plan, record.subgroups, EXPECTED).spans
    starved = replace(record, plan=plan, homes=homes, spans=spans, policy="auto", budgets=Budgets(device_bytes=1 << 16))
    (verdict,) = diagnose(starved, EXPECTED).verdicts
    assert verdict.cause == "budget too small"
    assert "device_budget 64.0 KiB leave 1 slots and 12 subgroups that may visit" in verdict.text


def test_a_side_that_was_not_measured_is_not_judged() -> None:
    assert causes(made(num_visits=0), None) == []


# ---- the record and the report


def test_record_comes_back_equal(tmp_path: Path) -> None:
    record = made(expected=EXPECTED, asked_slots=3, budgets=Budgets(1, None, 2), model_s=0.5)
    record.save(tmp_path / "t")
    assert StepRecord.load(tmp_path / "t") == record


def test_trace_is_one_that_perfetto_opens(machine: Machine, tmp_path: Path) -> None:
    record = machine.run(tmp_path / "t", **GOOD)
    content = json.loads((tmp_path / "t").read_text())
    complete = [event for event in content["traceEvents"] if event["ph"] == "X"]
    assert {event["name"] for event in complete} == {str(op) for op in record.plan.ops}
    assert all(isinstance(value, str) for value in content["otherData"].values()), "as the format has it"


@pytest.mark.parametrize("text", ["[]", "{}", '{"otherData": {"offload": "{}"}}', "no json"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(ValueError, match=r"is no trace that optimizer.save_trace wrote"):
        StepRecord.load(tmp_path / "t")


def test_asking_too_early_is_told(machine: Machine, tmp_path: Path) -> None:
    optimizer = offload.AdamW([torch.nn.Parameter(torch.zeros(NUMEL, device="sim"))])
    with pytest.raises(ValueError, match=r"call time_next_step\(\) before the forward"):
        optimizer.save_trace(tmp_path / "t")
    optimizer.time_next_step()
    with pytest.raises(ValueError, match="has not run yet"):
        optimizer.save_trace(tmp_path / "t")
    on_cpu = torch.nn.Parameter(torch.zeros(NUMEL))
    optimizer = offload.AdamW([on_cpu])
    on_cpu.grad = torch.zeros_like(on_cpu)
    optimizer.time_next_step()
    optimizer.step()
    with pytest.raises(ValueError, match="no step was measured"):
        optimizer.save_trace(tmp_path / "t")


def test_command(machine: Machine, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(tmp_path / "t")
    machine.sim.set_profile(h2d_bytes_per_s=LINK / 2, d2h_bytes_per_s=LINK / 2)
    machine.run(tmp_path / "t", profile=EXPECTED, plan="auto")
    assert main(["explain", path]) == 0
    text = capsys.readouterr().out
    assert text.startswith("the update took ")
    for part in (
        "lane",
        "busy ms",
        " binds: this plan needs at least",
        "predicted from the expected rates",
        "slow link",
    ):
        assert part in text, part
    assert main(["explain", path, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["verdicts"][0]["cause"] == "slow link"
    assert content["update_s"] == pytest.approx(elapsed_s(StepRecord.load(path).spans))
    assert main(["explain", path, "--hardware", "gh200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predicted_s"] != content["predicted_s"]
    (tmp_path / "log").write_text("{}")
    assert main(["explain", str(tmp_path / "log"), "--hardware", "gh200"]) == 2
    assert "--hardware is for traces" in capsys.readouterr().err


# ---- facts


def test_busy_elsewhere_is_what_others_took(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(10.0, 5.0, 1.0), (12.0, 8.5, 1.5)])
    monkeypatch.setattr("offload.facts._readings", lambda: next(readings))
    assert ProcessorMeter().busy_elsewhere() == pytest.approx((3.5 - 0.5) / 2)


def test_readings_are_times() -> None:
    from offload.facts import _readings

    (wall_s, busy_s, own_s), later = _readings(), _readings()
    assert busy_s > own_s > 0
    assert later[0] > wall_s


def test_facts_of_this_process() -> None:
    allowed = os.sched_getaffinity(0)
    facts = host_facts(None, 0.5)
    assert (facts.num_allowed, facts.num_remote, facts.busy_elsewhere) == (len(allowed), 0, 0.5)
    assert host_facts(4095, 0.0).num_remote == len(allowed), "no processor of ours is on that node"


def test_plan_of_the_record_is_the_one_that_ran(machine: Machine, tmp_path: Path) -> None:
    """With "auto" the plan may have moved on by the time the trace is saved."""
    machine.num_steps = 3
    record = machine.run(tmp_path / "t", plan="auto")
    assert {span.name for span in record.spans} == {str(op) for op in record.plan.ops}
    assert isinstance(record.plan, Plan)


def test_optimizer_explains_its_measured_step(machine: Machine) -> None:
    param = torch.nn.Parameter(torch.zeros(NUMEL, device="sim"))
    optimizer = offload.AdamW([param], plan="host")
    param.grad = torch.zeros_like(param)
    optimizer.time_next_step()
    assert "the update took" not in optimizer.explain()
    optimizer.step()
    assert "the update took" in optimizer.explain()
