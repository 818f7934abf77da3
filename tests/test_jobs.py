"""Whole jobs: what they need, what is predicted, what would help, and how long planning takes."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace

import pytest

from offload.estimate import SHAPES, ModelCost, parse_shape, transformer_cost
from offload.hardware import HardwareProfile
from offload.jobs import TrainingJob, equal_subgroups, plan_job
from offload.overlaps import MAX_PASSING_SLOTS, hide
from offload.perf_model import predict
from offload.phases import IN_ORDER, Hiding, predict_step
from offload.plan import Placement, Plan
from offload.pool import BudgetError, Budgets

NODE = HardwareProfile.load("h100-sxm-node")
DESKTOP = HardwareProfile.load("rtx4090-desktop")
SMALL = "num_layers=24,hidden=2048,ffn=5632,num_heads=16,num_kv_heads=16,vocab=32000"


def cost_of(name: str) -> ModelCost:
    return transformer_cost(name, SHAPES[name], micro_batch=1, seq=2048)


def test_subgroups_cover_the_ranks_parameters() -> None:
    job = TrainingJob(cost_of("llama-7b"), NODE, num_ranks=4, subgroup_numel=10**8)
    assert sum(s.numel for s in job.subgroups()) == job.rank_numel == -(-job.cost.numel // 4)
    assert max(s.numel for s in job.subgroups()) <= 10**8
    assert TrainingJob(cost_of("llama-7b"), NODE, 4, zero_stage=0).rank_numel == job.cost.numel


def test_equal_subgroups() -> None:
    subgroups = equal_subgroups(10, 4, 2)
    assert [(s.index, s.numel, s.param_bytes, s.state_bytes) for s in subgroups] == [
        (0, 3, 6, 36), (1, 3, 6, 36), (2, 4, 8, 48),
    ]  # fmt: skip


def test_fewer_ranks_have_more_of_the_host() -> None:
    job = TrainingJob(cost_of("llama-7b"), NODE, num_ranks=2)
    assert job.rates().host_dram_bytes_per_s == 4 * replace(job, num_ranks=8).rates().host_dram_bytes_per_s
    assert replace(job, num_ranks=1024).rates() == replace(job, num_ranks=8).rates()


def test_the_plan_fits_the_device_in_every_phase() -> None:
    found = plan_job(TrainingJob(cost_of("llama-13b"), NODE, num_ranks=8))
    assert max(found.memory.peak_bytes.values()) <= NODE.device_memory_bytes
    assert min(found.memory.headroom_bytes(NODE.device_memory_bytes).values()) >= 0
    assert found.memory.bill == found.choice.homes.bill(found.job.subgroups())


def test_a_model_that_does_not_fit_says_what_would_do() -> None:
    with pytest.raises(BudgetError, match=r"llama-13b does not fit rtx4090-desktop: .* the least that would do is"):
        plan_job(TrainingJob(cost_of("llama-13b"), DESKTOP))
    with pytest.raises(BudgetError, match="does not fit"):  # whatever the optimizer may take
        plan_job(TrainingJob(cost_of("llama-13b"), DESKTOP), Budgets(device_bytes=2**30))


def test_the_step_is_the_plans() -> None:
    found = plan_job(TrainingJob(cost_of("llama-7b"), NODE, num_ranks=8), Budgets(device_bytes=3 * 2**30))
    rates, best = found.job.rates(), found.choice
    assert predict(best.plan, found.job.subgroups(), rates).update_s == best.update_s
    assert found.step.update_s <= best.update_s * (1 + 1e-9)
    layers = found.job.cost.layers(NODE, found.memory.grad_bytes)
    assert found.step.forward_s == pytest.approx(sum(layer.forward_s for layer in layers))
    again = predict_step(best.plan, found.job.subgroups(), rates, layers, found.hidden[0].hiding)
    assert again.step_s == found.step.step_s == min(hidden.step_s for hidden in found.hidden)


def test_ways_to_hide_the_update_are_ranked_by_the_step() -> None:
    """Without clipping the update begins in backward; no step is longer than with everything after backward."""
    job = TrainingJob(cost_of("llama-7b"), NODE, num_ranks=8)
    clipped = plan_job(job, Budgets(device_bytes=3 * 2**30))
    unclipped = plan_job(replace(job, clips=False), Budgets(device_bytes=3 * 2**30))
    assert clipped.hidden[0].hiding.overlap == "next_forward"
    assert not any(hidden.hiding.in_backward for hidden in clipped.hidden)
    assert unclipped.hidden[0].hiding.in_backward
    (in_order,) = [hidden.step_s for hidden in clipped.hidden if hidden.hiding == IN_ORDER]
    assert unclipped.step.step_s < clipped.step.step_s < 0.95 * in_order
    assert [hidden.step_s for hidden in unclipped.hidden] == sorted(hidden.step_s for hidden in unclipped.hidden)


def test_early_gradients_have_staging_buffers_in_the_bill() -> None:
    job = TrainingJob(transformer_cost("small", parse_shape(SMALL), micro_batch=1, seq=2048), DESKTOP)
    found = plan_job(job, Budgets(device_bytes=2**30))
    early, subgroups, homes = found.hidden[0].hiding, job.subgroups(), found.choice.homes
    assert early == Hiding("next_forward", early_gradients=True)
    without = next(hidden for hidden in found.hidden if hidden.hiding == Hiding("next_forward"))
    assert found.step.step_s < 0.96 * without.step_s
    assert homes.num_staging == len(subgroups) - len(homes.residents)
    assert found.memory.bill.staging_bytes == 2 * homes.num_staging * max(s.param_bytes for s in subgroups)
    layers = job.cost.layers(DESKTOP, found.memory.grad_bytes)
    assert predict_step(found.choice.plan, subgroups, job.rates(), layers, early).step_s == found.step.step_s


def test_slots_in_what_backward_frees_take_nothing_at_the_peak() -> None:
    """Without recomputation backward frees gigabytes: more slots pass, and the step's peaks stay the same."""
    cost = transformer_cost("llama-7b", SHAPES["llama-7b"], micro_batch=1, seq=2048, recompute=False)
    found = plan_job(TrainingJob(cost, NODE, num_ranks=8), Budgets(device_bytes=3 * 2**30))
    passing = next(hidden for hidden in found.hidden if hidden.hiding.num_passing_slots)
    without = next(hidden for hidden in found.hidden if hidden.hiding == Hiding("backward"))
    assert passing.hiding == Hiding("backward", num_passing_slots=MAX_PASSING_SLOTS)
    assert passing.step_s < 0.95 * without.step_s
    subgroups, layers = found.job.subgroups(), cost.layers(NODE, found.memory.grad_bytes)
    best, rates = found.decision.best.plan, found.job.rates()
    ((_, step),) = hide(best, subgroups, rates, layers, [passing.hiding])
    assert step.plan.num_buffers(Placement.DEVICE) == found.choice.homes.num_slots + MAX_PASSING_SLOTS
    assert max(step.peak_bytes.values()) <= max(predict_step(best, subgroups, rates, layers).peak_bytes.values())


def test_a_budget_that_the_device_does_not_hold_is_told() -> None:
    """A quarter of the budget goes to slots and states that do not fit beside the model."""
    cost = transformer_cost("small", parse_shape(SMALL), micro_batch=1, seq=2048)
    job = TrainingJob(cost, DESKTOP, subgroup_numel=2 * 10**7)
    assert plan_job(job).warning is None
    found = plan_job(job, Budgets(device_bytes=20 * 2**30))
    assert found.memory.device_bytes > DESKTOP.device_memory_bytes
    assert found.warning is not None
    most = re.search(r"the most that fits is device_budget .* \((\d+) bytes\)", found.warning)
    assert most is not None
    fits = plan_job(job, Budgets(device_bytes=int(most[1])))
    assert fits.warning is None
    assert fits.memory.device_bytes <= DESKTOP.device_memory_bytes


def test_wide_gradients_are_planned_with() -> None:
    job, budgets = TrainingJob(cost_of("llama-7b"), NODE, num_ranks=8), Budgets(device_bytes=0)
    wide = plan_job(replace(job, grad_itemsize=4), budgets)
    narrow = plan_job(job, budgets)
    assert wide.memory.grad_bytes == 2 * narrow.memory.grad_bytes
    assert wide.choice.update_s > narrow.choice.update_s
    assert "gradients as wide as parameters" in {lever.name for lever in wide.levers}
    assert "gradients as wide as parameters" not in {lever.name for lever in narrow.levers}


def test_levers_name_what_binds() -> None:
    """On a node whose host memory binds, memory and smaller states help, cores alone do not."""
    found = plan_job(TrainingJob(cost_of("llama-13b"), NODE, num_ranks=8), Budgets(device_bytes=2 * 2**30))
    assert found.choice.bound.binds == "host memory"
    update_s = {lever.name: lever.update_s for lever in found.levers}
    before_s = found.choice.update_s
    assert update_s["twice the host memory bandwidth"] < 0.8 * before_s
    assert update_s["twice the cores"] > 0.95 * before_s
    formats = [update_s[f"state_format {name}"] for name in ("split16", "bf16", "int8")]
    assert before_s > formats[0] > formats[1] > formats[2]
    assert [lever.update_s for lever in found.levers] == sorted(update_s.values())


def test_smaller_states_are_planned_with() -> None:
    whole = plan_job(TrainingJob(cost_of("llama-13b"), NODE, 8), Budgets(device_bytes=2 * 2**30))
    small = plan_job(TrainingJob(cost_of("llama-13b"), NODE, 8, state_format="int8"), Budgets(device_bytes=2 * 2**30))
    assert small.memory.bill.host_state_bytes < whole.memory.bill.host_state_bytes / 2
    assert small.choice.update_s < whole.choice.update_s / 2
    with pytest.raises(ValueError, match="state_format='fp8' is unknown; known are fp32, split16, bf16, int8"):
        plan_job(TrainingJob(cost_of("llama-13b"), NODE, 8, state_format="fp8"))


def test_json_holds_the_plan() -> None:
    found = plan_job(TrainingJob(cost_of("llama-7b"), NODE, num_ranks=8), Budgets(device_bytes=3 * 2**30))
    content = json.loads(json.dumps(found.as_dict()))
    assert Plan.parse(content["plan"]["text"]) == found.choice.plan == found.step.plan
    assert content["memory"]["host"]["node_total"] == 8 * found.memory.bill.host_bytes
    assert content["alternatives"][0]["name"] == found.decision.best.name


def test_70_billion_in_1000_subgroups_and_a_trillion_over_1024_ranks() -> None:
    """Processor seconds, which other work on this machine hardly changes: at most 1 and 10, with room for slow ones."""
    big = replace(NODE.figures["device_memory_bytes"], value=400 * 10**9)
    cost = cost_of("llama-70b")
    job = TrainingJob(cost, NODE.with_figures(device_memory_bytes=big), subgroup_numel=-(-cost.numel // 1000))
    start_s = time.process_time()
    found = plan_job(job)
    assert time.process_time() - start_s < 3
    assert len(found.decision.best.plan.placements) == 1000
    start_s = time.process_time()
    plan_job(TrainingJob(cost_of("gpt-1t"), NODE, num_ranks=1024))
    assert time.process_time() - start_s < 10
