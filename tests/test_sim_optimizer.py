"""The optimizer on an accelerator: streams, slots and pinned memory, in every order that the waits allow.

A missing wait shows twice: as a race that the emulated device reports, and as other bits than the CPU's.
"""

from __future__ import annotations

import functools
import gc
import io
import itertools
import time
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload import Placement, Static, Stride
from tests.training import (
    NUM_STEPS,
    ODD_WIDTHS,
    Trained,
    assert_same_bits,
    loss_of,
    mlp,
    replan_every_step,
    snapshot,
    state_snapshot,
    train,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")

EXECUTORS = ("sync", "lazy", "eager", "random")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HYPER = {"lr": 3e-3, "betas": (0.8, 0.97), "weight_decay": 0.05}
SUBGROUP_NUMEL = 200
PLANS: tuple[Any, ...] = ("auto", "host", "device", Stride(2), Stride(3), Static(0.4))


def spread_dtypes(*others: tuple[Any, ...]) -> list[Any]:
    """All combinations of ``others`` with all dtypes: each with one dtype by default, with the rest in slow tests."""
    cases = []
    for rank, combination in enumerate(itertools.product(*others)):
        for i, dtype in enumerate(DTYPES):
            marks = [] if (rank + rank // 3) % 3 == i else [pytest.mark.slow]
            name = "-".join(map(str, (*combination, dtype)))
            cases.append(pytest.param(*combination, dtype, marks=marks, id=name.replace("torch.", "")))
    return cases


@functools.cache
def reference(dtype: torch.dtype = torch.float32) -> Trained:
    """The same training with parameters on the CPU: tests/test_bits.py holds that against torch's."""
    model = mlp(ODD_WIDTHS, dtype=dtype)
    return train(model, offload.AdamW(model.parameters(), plan="host", **HYPER))


def on_sim(
    plan: Any = "auto", dtype: torch.dtype = torch.float32, **kwargs: Any
) -> tuple[nn.Sequential, offload.AdamW]:
    model = mlp(ODD_WIDTHS, dtype=dtype, device="sim")
    kwargs = {"plan": plan, "subgroup_numel": SUBGROUP_NUMEL, **HYPER, **kwargs}
    return model, offload.AdamW(model.parameters(), **kwargs)


def budget_for_two_residents() -> int:
    """Device bytes for two slots and the state of the first two subgroups."""
    optimizer = offload.AdamW(mlp(ODD_WIDTHS).parameters(), subgroup_numel=SUBGROUP_NUMEL)
    sizes = [subgroup.state_bytes for subgroup in optimizer.runtime.subgroups]
    return 2 * max(sizes) + sum(sizes[:2])


# ---- the same bits in every order


@pytest.mark.parametrize(("plan", "executor", "dtype"), spread_dtypes(PLANS, EXECUTORS))
def test_plans_give_the_cpus_bits(sim: ModuleType, plan: Any, executor: str, dtype: torch.dtype) -> None:
    sim.configure(executor, seed=len(str(plan)))
    model, optimizer = on_sim(plan, dtype)
    assert_same_bits(train(model, optimizer), reference(dtype))
    optimizer.synchronize()
    assert sim.races() == []


@pytest.mark.parametrize(("executor", "seed", "dtype"), spread_dtypes(("lazy", "eager", "random"), (0, 1, 2)))
def test_placements_may_change_every_step(sim: ModuleType, executor: str, seed: int, dtype: torch.dtype) -> None:
    """Also with some states resident on the device, and more orders than any fixed plan has."""
    sim.configure(executor, seed=seed)
    model, optimizer = on_sim("auto", dtype, device_budget=budget_for_two_residents())
    homes = optimizer.runtime.homes
    assert (len(homes.residents), len(homes.visitors)) == (2, 4)
    assert_same_bits(train(model, optimizer, before_step=replan_every_step(optimizer, seed)), reference(dtype))
    optimizer.synchronize()
    assert sim.races() == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_placements_may_change_every_step_in_many_orders(sim: ModuleType, seed: int) -> None:
    dtype = DTYPES[seed % 3]
    sim.configure("random", seed=seed)
    model, optimizer = on_sim("auto", dtype, num_slots=1 + seed % 4)
    assert_same_bits(train(model, optimizer, before_step=replan_every_step(optimizer, seed)), reference(dtype))
    optimizer.synchronize()
    assert sim.races() == []


@pytest.mark.parametrize("executor", ["lazy", "random"])
def test_auto_measures_until_a_plan_is_set(sim: ModuleType, executor: str) -> None:
    sim.configure(executor)
    model, optimizer = on_sim("auto")
    first_plan = optimizer.plan
    assert {Placement.HOST, Placement.DEVICE} <= set(first_plan.placements.values())
    assert optimizer.timeline() == []
    train(model, optimizer, steps=range(6))
    assert optimizer.runtime.in_force.rates is not None
    assert {span.lane for span in optimizer.timeline()} >= {"compute", "h2d", "d2h"}
    optimizer.set_plan(first_plan)
    train(model, optimizer, steps=range(6, NUM_STEPS))
    assert optimizer.plan == first_plan
    assert_same_bits(snapshot(model), reference().params)


def test_gradients_accumulate_while_the_last_step_is_in_flight(sim: ModuleType) -> None:
    """Without zero_grad, backward writes into the very memory that the step before brings down."""
    trained = []
    for device, executor in (("cpu", "sync"), ("sim", "sync"), ("sim", "lazy"), ("sim", "eager"), ("sim", "random")):
        sim.configure(executor)
        model = mlp(ODD_WIDTHS, device=device)
        optimizer = offload.AdamW(model.parameters(), plan=Stride(2), subgroup_numel=SUBGROUP_NUMEL, **HYPER)
        for step in range(8):
            loss_of(model, step).backward()
            optimizer.step()
        trained.append((snapshot(model), state_snapshot(optimizer)))
        assert sim.races() == []
    for other in trained[1:]:
        assert_same_bits(other, trained[0])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_gradients_that_are_not_contiguous(sim: ModuleType, executor: str) -> None:
    """Their flat copies live until the step has read them, and no longer."""
    sim.configure(executor)
    results = []
    for device in ("cpu", "sim"):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(16, 24).to(device)) for _ in range(4)]
        optimizer = offload.AdamW(params, plan=Stride(2), subgroup_numel=384, **HYPER)
        for step in range(6):
            for param in params:
                param.grad = torch.sin(param.detach() * (step + 1)).t().contiguous().t()
                assert not param.grad.is_contiguous()
            optimizer.step()
            del param
        results.append([param.detach().cpu() for param in params])
    assert_same_bits(*results)
    assert sim.races() == []


# ---- clipping and loss scaling


@pytest.mark.parametrize(("plan", "executor", "dtype"), spread_dtypes(("host", "device", Static(0.4)), EXECUTORS))
def test_clipping_gives_the_cpus_bits(sim: ModuleType, plan: Any, executor: str, dtype: torch.dtype) -> None:
    sim.configure(executor)
    results = []
    for device in ("cpu", "sim"):
        model = mlp(ODD_WIDTHS, dtype=dtype, device=device)
        optimizer = offload.AdamW(model.parameters(), plan=plan, subgroup_numel=SUBGROUP_NUMEL, **HYPER)
        norms: list[torch.Tensor] = []
        trained = train(
            model,
            optimizer,
            steps=range(6),
            before_step=lambda step, o=optimizer, norms=norms: norms.append(o.clip_grad_norm_(0.05)),  # type: ignore[misc]
        )
        results.append((trained, [norm.cpu() for norm in norms]))
    assert_same_bits(*results)
    assert sim.races() == []


@pytest.mark.parametrize("executor", ["lazy", "random"])
def test_grad_scaler_with_float16_autocast(sim: ModuleType, executor: str) -> None:
    """Scaled gradients overflow at first: the scaler skips those steps, and every plan sees the same gradients."""
    sim.configure(executor)
    results = []
    for plan in ("host", Stride(2)):
        model = mlp(device="sim")
        optimizer = offload.AdamW(model.parameters(), plan=plan, subgroup_numel=SUBGROUP_NUMEL)
        scaler = torch.amp.GradScaler("sim", init_scale=2.0**24, growth_interval=4)
        scales = []
        for step in range(NUM_STEPS):
            optimizer.zero_grad()
            with torch.autocast("sim", dtype=torch.float16):
                loss = loss_of(model, step)
            scaler.scale(loss).backward()
            if step % 2:
                scaler.unscale_(optimizer)
                optimizer.clip_grad_norm_(0.5)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert min(scales) < 2.0**24
        results.append((snapshot(model), state_snapshot(optimizer)))
    assert_same_bits(*results)
    assert sim.races() == []


@pytest.mark.parametrize("executor", EXECUTORS)
def test_nonfinite_gradients_change_nothing(sim: ModuleType, executor: str) -> None:
    sim.configure(executor)
    model, optimizer = on_sim(Stride(2))
    train(model, optimizer, steps=range(3))
    before = snapshot(model), state_snapshot(optimizer)
    loss_of(model, 3).backward()
    model[0].weight.grad[1, 2] = float("inf")
    with pytest.raises(offload.NonFiniteGradientError, match="1 of 12 gradients"):
        optimizer.step()
    assert_same_bits((snapshot(model), state_snapshot(optimizer)), before)


# ---- edits and state between steps


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameter_edits_between_steps(sim: ModuleType, executor: str, dtype: torch.dtype) -> None:
    """Each edit is taken over by the next step, also where states are still on their way back to the host."""
    sim.configure(executor)
    results = []
    for device in ("cpu", "sim"):
        model = mlp(ODD_WIDTHS, dtype=dtype, device=device)
        optimizer = offload.AdamW(model.parameters(), plan=Stride(2), subgroup_numel=SUBGROUP_NUMEL, **HYPER)
        for step in range(9):
            train(model, optimizer, steps=range(step, step + 1))
            with torch.no_grad():
                model[0].weight.clamp_(-0.1, 0.1)
                if step == 2:
                    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})
                if step == 4:
                    model[2].weight.data = model[2].weight.data * 2
                if step == 6:
                    model[4].weight.data.mul_(0.5)
                    optimizer.refresh_masters()
        results.append((snapshot(model), state_snapshot(optimizer)))
        assert sim.races() == []
    assert_same_bits(*results)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_move_between_placements(sim: ModuleType, executor: str, dtype: torch.dtype) -> None:
    """Saved in the middle under one plan, continued under another, with the bits of an undisturbed run."""
    sim.configure(executor)
    plans: tuple[tuple[Any, Any], ...] = (("host", "device"), ("device", Static(1.0)), (Static(0.4), Stride(2)))
    for plan, next_plan in plans:
        model, optimizer = on_sim(plan, dtype)
        train(model, optimizer, steps=range(7))
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True, map_location="cpu")

        model, optimizer = on_sim(next_plan, dtype)
        train(model, optimizer, steps=range(50, 53))  # another history, to be overwritten
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        trained = train(model, optimizer, steps=range(7, NUM_STEPS))
        assert_same_bits(trained.params, reference(dtype).params)
        assert sim.races() == []


def test_state_dict_waits_for_what_is_in_flight(sim: ModuleType) -> None:
    """Flushes overlap the next forward: reading the state without waiting would see the step before."""
    sim.configure("lazy")
    model, optimizer = on_sim("device")
    train(model, optimizer)
    state = {key: value.clone() for key, value in state_snapshot(optimizer).items()}
    cpu_model = mlp(ODD_WIDTHS)
    cpu_optimizer = offload.AdamW(cpu_model.parameters(), **HYPER)
    train(cpu_model, cpu_optimizer)
    assert_same_bits(state, state_snapshot(cpu_optimizer))


def test_unfreezing_and_adding_groups_while_training(sim: ModuleType) -> None:
    sim.configure("random", seed=5)
    results = []
    for device, plan in (("cpu", "host"), ("sim", "auto"), ("sim", Stride(2)), ("sim", Static(0.5))):
        model = mlp(ODD_WIDTHS, device=device)
        model[2].requires_grad_(False)
        groups = [*model[0].parameters(), *model[2].parameters(), *model[4].parameters()]
        optimizer = offload.AdamW(groups, plan=plan, subgroup_numel=SUBGROUP_NUMEL, **HYPER)
        train(model, optimizer, steps=range(4))
        model[2].requires_grad_(True)
        train(model, optimizer, steps=range(4, 8))
        optimizer.add_param_group({"params": model[6].parameters(), "lr": 1e-2, "amsgrad": True})
        train(model, optimizer, steps=range(8, 12))
        results.append((snapshot(model), state_snapshot(optimizer)))
        assert len(optimizer.state) == 8
    for result in results[1:]:
        assert_same_bits(result, results[0])
    assert sim.races() == []


# ---- memory and waits


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_nothing_is_allocated_on_the_device_in_the_steady_state(sim: ModuleType, plan: Any) -> None:
    sim.configure("lazy")
    model, optimizer = on_sim(plan)
    seen = []
    for step in range(7):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        torch.accelerator.synchronize()
        allocated = torch.accelerator.memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        optimizer.step()
        optimizer.synchronize()
        assert torch.accelerator.memory_allocated() == allocated
        seen.append((allocated, torch.accelerator.max_memory_allocated(), torch.accelerator.memory_reserved()))
    assert len(set(seen[3:])) == 1
    # A few scalars to see whether gradients are finite, in blocks of 512 bytes; less than the smallest state.
    assert seen[-1][1] - seen[-1][0] <= 512 * (2 + len(list(model.parameters())))


def test_the_bill_is_what_is_allocated(sim: ModuleType) -> None:
    model = mlp((64, 64, 64), device="sim")
    allocated = torch.accelerator.memory_allocated()
    optimizer = offload.AdamW(model.parameters(), plan=Static(0.5), subgroup_numel=4096)
    blocks = torch.accelerator.memory_allocated() - allocated
    assert optimizer.bill.resident_bytes > 0
    assert optimizer.bill.device_bytes <= blocks < optimizer.bill.device_bytes + 512
    del optimizer
    gc.collect()
    assert torch.accelerator.memory_allocated() == allocated


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("plan", ["device", Static(1.0), "host", Stride(2)], ids=str)
def test_the_host_waits_only_for_what_is_documented(sim: ModuleType, plan: Any, clip: bool) -> None:
    """Once to learn that gradients are finite, and once for the clip coefficient."""
    sim.configure("lazy")
    model, optimizer = on_sim(plan)
    train(model, optimizer, steps=range(2))
    loss_of(model, 2).backward()
    _, num_waits_before = sim.counts()
    if clip:
        optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    _, num_waits = sim.counts()
    assert num_waits - num_waits_before == 1 + clip


# ---- errors


def test_parameters_on_two_devices(sim: ModuleType) -> None:
    params = [nn.Parameter(torch.ones(4, device="sim")), nn.Parameter(torch.ones(4))]
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 is on cpu but this optimizer's device is sim:0"):
        offload.AdamW(params)
    with pytest.raises(ValueError, match="parameter second is on sim:0 but this optimizer's device is cpu"):
        offload.AdamW([("first", params[1]), ("second", params[0])])
    optimizer = offload.AdamW(params[:1])
    with pytest.raises(ValueError, match="parameter 0 of group 1 is on cpu"):
        optimizer.add_param_group({"params": params[1]})
    assert len(optimizer.param_groups) == 1


def test_model_moved_after_construction(sim: ModuleType) -> None:
    model, optimizer = on_sim(Stride(2))
    train(model, optimizer, steps=range(2))
    model.cpu()
    before = snapshot(model), state_snapshot(optimizer)
    loss_of(model, 2).backward()
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 is on cpu but .* leave it there"):
        optimizer.step()
    assert_same_bits((snapshot(model), state_snapshot(optimizer)), before)
    model.to("sim")
    train(model, optimizer, steps=range(2, NUM_STEPS))
    assert_same_bits(snapshot(model), reference().params)


def test_frozen_parameters_may_be_elsewhere(sim: ModuleType) -> None:
    """What is not trained is not offloaded: frozen quantised weights, embeddings left on the CPU."""
    frozen = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    trained = nn.Parameter(torch.ones(4, device="sim"))
    optimizer = offload.AdamW([frozen, trained])
    trained.grad = torch.ones_like(trained)
    optimizer.step()
    assert float(trained.detach().sum()) < 4


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("plan", "operation"), [("host", "update_cpu"), ("device", "update_gpu")])
def test_an_error_inside_a_lane_surfaces_and_breaks_the_optimizer(
    sim: ModuleType, plan: str, operation: str, executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original error with its traceback, from the worker thread too; then no step that would make it worse."""
    sim.configure(executor)
    model, optimizer = on_sim(plan)
    train(model, optimizer, steps=range(2))
    loss_of(model, 2).backward()

    def fail(*args: object, **kwargs: object) -> None:
        raise ArithmeticError("the kernel gave up")

    with monkeypatch.context() as patch:
        patch.setattr("offload.adam.update", fail)
        patch.setattr("offload.adam.PreparedUpdate.__call__", fail)
        optimizer.step()
        with pytest.raises(ArithmeticError, match="the kernel gave up") as caught:
            optimizer.synchronize()
    assert operation in [entry.name for entry in caught.traceback]
    for use in (optimizer.step, optimizer.synchronize, optimizer.state_dict, lambda: optimizer.load_state_dict({})):
        with pytest.raises(RuntimeError, match=r"this optimizer is broken: .* load the last checkpoint") as broken:
            use()
        assert broken.value.__cause__ is caught.value


@pytest.mark.parametrize("plan", ["host", "device"])
def test_a_broken_optimizer_gives_its_memory_back(sim: ModuleType, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the error that broke it, which lanes and runtime keep, refers to what was in use then."""

    def train_and_fail() -> None:
        model, optimizer = on_sim(plan)
        monkeypatch.setattr("offload.adam.update", None)
        monkeypatch.setattr("offload.adam.PreparedUpdate", None)
        with pytest.raises(TypeError):
            train(model, optimizer)

    train_and_fail()
    deadline_s = time.monotonic() + 10  # the conductor's thread lets go of its work after it has told of the error
    while torch.accelerator.memory_allocated() and time.monotonic() < deadline_s:
        gc.collect()
    assert torch.accelerator.memory_allocated() == 0


def test_device_memory_runs_out_when_a_group_joins(sim: ModuleType) -> None:
    """torch's error, and the optimizer goes on as if the group had never been offered."""
    sim.configure("sync", capacity="16MiB")
    model, optimizer = on_sim(Static(1.0))
    train(model, optimizer, steps=range(4))
    newcomer = nn.Parameter(torch.zeros(2**20, device="sim"))
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.add_param_group({"params": newcomer})
    assert len(optimizer.param_groups) == 1
    assert "6 subgroups" in optimizer.explain()
    train(model, optimizer, steps=range(4, 6))
    optimizer.add_param_group({"params": nn.Parameter(torch.zeros(64, device="sim"))})
    train(model, optimizer, steps=range(6, NUM_STEPS))
    assert_same_bits(snapshot(model), reference().params)
