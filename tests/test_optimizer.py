"""offload.Adam and offload.AdamW in use: what a script written for torch's optimizers does with them."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload import Placement, Stride
from tests.training import NUM_STEPS, ODD_WIDTHS, assert_same_bits, loss_of, mlp, snapshot, state_snapshot, train

pytestmark = pytest.mark.usefixtures("one_torch_thread")

HYPER = {"lr": 3e-3, "betas": (0.8, 0.97), "weight_decay": 0.05}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def both(**kwargs: Any) -> tuple[tuple[nn.Sequential, offload.AdamW], tuple[nn.Sequential, torch.optim.AdamW]]:
    """Equal models, ours with several subgroups on both sides and torch's fused optimizer over the other."""
    ours, theirs = mlp(), mlp()
    optimizer = offload.AdamW(ours.parameters(), plan=Stride(2), subgroup_numel=200, **HYPER, **kwargs)
    return (ours, optimizer), (theirs, torch.optim.AdamW(theirs.parameters(), fused=True, **HYPER, **kwargs))


# ---- a torch.optim.Optimizer


@pytest.mark.parametrize(
    ("our_class", "torch_class"), [(offload.Adam, torch.optim.Adam), (offload.AdamW, torch.optim.AdamW)]
)
def test_takes_torchs_arguments(our_class: Any, torch_class: Any) -> None:
    assert issubclass(our_class, torch.optim.Optimizer)
    params = [nn.Parameter(torch.ones(4))]
    ours, theirs = our_class(params), torch_class(params)
    for name in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"):
        assert ours.defaults[name] == theirs.defaults[name]
    assert theirs.param_groups[0].keys() == ours.param_groups[0].keys()
    parameters = inspect.signature(torch_class).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    theirs = torch_class(params, 0.1, (0.5, 0.6), 1e-5, 0.3, True, foreach=False, maximize=True, capturable=False)
    ours = our_class(params, 0.1, (0.5, 0.6), 1e-5, 0.3, True, foreach=False, maximize=True, capturable=False)
    for name in positional[1:]:
        assert ours.param_groups[0][name] == theirs.param_groups[0][name]


@pytest.mark.parametrize("fused", [None, True])
def test_accepts_the_switches_that_describe_it(fused: bool | None) -> None:
    offload.AdamW([nn.Parameter(torch.ones(4))], fused=fused, foreach=None, capturable=False, differentiable=False)


def test_repr_shows_the_groups() -> None:
    assert "lr: 0.003" in repr(both()[0][1])


def test_named_parameters() -> None:
    model = mlp()
    optimizer = offload.AdamW(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert optimizer.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"
    model[2].weight.grad = torch.full_like(model[2].weight, math.nan)
    with pytest.raises(offload.NonFiniteGradientError, match=r"first: 2\.weight;"):
        optimizer.step()


def test_step_hooks_run() -> None:
    (model, optimizer), _ = both()
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))
    train(model, optimizer, steps=range(1))
    assert calls == ["pre", "post"]


def test_state_is_torchs() -> None:
    (ours, optimizer), (theirs, torch_optimizer) = both(amsgrad=True)
    train(ours, optimizer, steps=range(2))
    train(theirs, torch_optimizer, steps=range(2))
    for param, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert optimizer.state[param].keys() == torch_optimizer.state[other].keys()
        assert_same_bits(dict(optimizer.state[param]), dict(torch_optimizer.state[other]))


def test_nothing_happens_before_the_first_step() -> None:
    (model, optimizer), _ = both()
    assert_same_bits(snapshot(model), snapshot(mlp()))
    assert optimizer.state_dict()["state"] == {}


def test_step_returns_the_closures_loss() -> None:
    (model, optimizer), _ = both()

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert_same_bits(loss, loss_of(mlp(), 0))
    assert optimizer.step() is None


def test_empty_parameters_and_no_trainable_parameters() -> None:
    empty, scalar = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.tensor(2.0))
    optimizer = offload.AdamW([empty, scalar])
    empty.grad, scalar.grad = torch.empty(0, 4), torch.tensor(1.0)
    optimizer.step()
    assert float(scalar.detach()) < 2
    frozen = offload.AdamW([nn.Parameter(torch.ones(4), requires_grad=False)])
    with pytest.warns(UserWarning, match="found no gradients"):
        frozen.step()


def test_a_frozen_parameter_with_a_gradient_is_updated_as_in_torch() -> None:
    results = []
    for make in (offload.AdamW, torch.optim.AdamW):
        params = [nn.Parameter(torch.ones(16)), nn.Parameter(torch.ones(16), requires_grad=False)]
        optimizer = make(params, fused=True)
        for param in params:
            param.grad = torch.full_like(param, 0.5)
        optimizer.step()
        results.append([param.detach() for param in params])
    assert_same_bits(*results)


# ---- hyper-parameters and groups change


def test_groups_may_be_edited() -> None:
    for model, optimizer in (pairs := both()):
        train(model, optimizer, steps=range(4))
        optimizer.param_groups[0].update(lr=1e-2, weight_decay=0.3, betas=(0.5, 0.6), eps=1e-3, maximize=True)
        train(model, optimizer, steps=range(4, 8))
    assert_same_bits(snapshot(pairs[0][0]), snapshot(pairs[1][0]))


def test_groups_may_join() -> None:
    results = []
    for make in (offload.AdamW, torch.optim.AdamW):
        model = mlp()
        optimizer: Any = make(model[:2].parameters(), fused=True, **HYPER)
        train(model, optimizer, steps=range(4))
        model.zero_grad()
        optimizer.add_param_group({"params": model[2:4].parameters(), "lr": 0.02})
        optimizer.add_param_group({"params": list(model[4:].parameters()), "amsgrad": True})
        train(model, optimizer, steps=range(4, NUM_STEPS))
        results.append((snapshot(model), state_snapshot(optimizer)))
    assert_same_bits(*results)


@pytest.mark.parametrize("plan", ["host", Stride(2), offload.Static(0.5)], ids=str)
def test_parameters_may_be_unfrozen(plan: Any) -> None:
    results = []
    for make in (offload.AdamW, torch.optim.AdamW):
        model = mlp()
        model[2].requires_grad_(False)
        model[4].weight.requires_grad_(False)
        kwargs = {"plan": plan, "subgroup_numel": 200} if make is offload.AdamW else {}
        optimizer: Any = make(model.parameters(), fused=True, **kwargs, **HYPER)
        train(model, optimizer, steps=range(4))
        model[2].requires_grad_(True)
        train(model, optimizer, steps=range(4, 8))
        model[4].weight.requires_grad_(True)
        model[0].requires_grad_(False)
        optimizer.zero_grad()
        train(model, optimizer, steps=range(8, NUM_STEPS))
        results.append((snapshot(model), state_snapshot(optimizer)))
    assert_same_bits(*results)


# ---- gradients


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.05, 100.0])
def test_clip_grad_norm_is_torchs(max_norm: float, norm_type: float) -> None:
    """The same norm and the same training, bit for bit; gradients keep their values."""
    (ours, optimizer), (theirs, torch_optimizer) = both()
    norms: list[tuple[Any, Any]] = []
    for step in range(NUM_STEPS):
        for model, opt in ((ours, optimizer), (theirs, torch_optimizer)):
            opt.zero_grad()
            loss_of(model, step).backward()
        grad = ours[0].weight.grad.clone()
        norm = optimizer.clip_grad_norm_(max_norm, norm_type)
        norms.append((norm, nn.utils.clip_grad_norm_(theirs.parameters(), max_norm, norm_type)))
        assert_same_bits(ours[0].weight.grad, grad)
        optimizer.step()
        torch_optimizer.step()
    assert_same_bits([ours for ours, _ in norms], [theirs for _, theirs in norms])
    assert_same_bits(snapshot(ours), snapshot(theirs))


def test_torchs_own_clipping_works() -> None:
    pairs = both()
    for model, optimizer in pairs:
        train(model, optimizer, before_step=lambda step, m=model: nn.utils.clip_grad_norm_(m.parameters(), 0.05))
    assert_same_bits(snapshot(pairs[0][0]), snapshot(pairs[1][0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_clipping_is_the_same_wherever_subgroups_are_updated(dtype: torch.dtype) -> None:
    results = []
    for plan in ("host", "device", Stride(2), offload.Static(0.5)):
        model = mlp(ODD_WIDTHS, dtype=dtype)
        optimizer = offload.AdamW(model.parameters(), plan=plan, subgroup_numel=200, **HYPER)
        norms: list[torch.Tensor] = []
        clip = lambda step, o=optimizer, norms=norms: norms.append(o.clip_grad_norm_(0.05))  # noqa: E731
        results.append((train(model, optimizer, before_step=clip), norms))
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_clipping_twice_is_clipping_to_the_lower() -> None:
    """The second call sees what the first left, as where gradients are multiplied at once."""
    (ours, optimizer), (theirs, torch_optimizer) = both()
    for model in (ours, theirs):
        loss_of(model, 0).backward()
    for max_norm in (0.5, 0.1):
        norm = optimizer.clip_grad_norm_(max_norm)
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        torch.testing.assert_close(norm, expected)
    optimizer.step()
    torch_optimizer.step()
    for param, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-7)


def test_zero_grad_forgets_a_clip_coefficient() -> None:
    (ours, optimizer), (theirs, torch_optimizer) = both()
    loss_of(ours, 0).backward()
    optimizer.clip_grad_norm_(1e-3)
    assert_same_bits(train(ours, optimizer), train(theirs, torch_optimizer))  # begins with zero_grad()


def test_a_clip_coefficient_is_used_once() -> None:
    """Not by the step after it, even if gradients are kept."""
    (ours, optimizer), (theirs, torch_optimizer) = both()
    for model in (ours, theirs):
        loss_of(model, 0).backward()
    optimizer.clip_grad_norm_(1e-3)
    optimizer.step()
    optimizer.step()
    unclipped = [param.grad.clone() for param in theirs.parameters()]
    nn.utils.clip_grad_norm_(theirs.parameters(), 1e-3)
    torch_optimizer.step()
    for param, grad in zip(theirs.parameters(), unclipped, strict=True):
        param.grad = grad
    torch_optimizer.step()
    assert_same_bits(snapshot(ours), snapshot(theirs))


def test_clipping_can_refuse_nonfinite_norms() -> None:
    (model, optimizer), _ = both()
    loss_of(model, 0).backward()
    model[0].weight.grad[0, 0] = math.inf
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("clip", [False, True])
def test_grad_scaler_on_the_cpu_equals_torch(clip: bool) -> None:
    """Float16 autocast with a loss scale that overflows at first, so that some steps are skipped."""
    pairs = both()
    scales: list[list[float]] = []
    for model, optimizer in pairs:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=4)
        scales.append([])
        for step in range(NUM_STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(model, step)
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            scales[-1].append(scaler.get_scale())
    assert scales[0] == scales[1]
    assert min(scales[0]) < 2.0**24
    assert int(pairs[0][1].state[pairs[0][0][0].weight]["step"]) < NUM_STEPS
    assert_same_bits(snapshot(pairs[0][0]), snapshot(pairs[1][0]))


# ---- parameters change between steps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", ["host", Stride(2)], ids=str)
def test_parameter_edits_are_taken_over(plan: Any, dtype: torch.dtype) -> None:
    """A float32 parameter is held against torch's; a lower one against a model that was cast from the edited one."""
    model = mlp(dtype=dtype)
    optimizer = offload.AdamW(model.parameters(), plan=plan, subgroup_numel=200, lr=0.0, weight_decay=0.0)
    train(model, optimizer, steps=range(2))
    values = {name: torch.randn(p.shape).to(dtype) for name, p in model.named_parameters()}
    edits = [
        lambda: model.load_state_dict(values),
        lambda: [p.data.copy_(values[n]).mul_(1) for n, p in model.named_parameters()] and optimizer.refresh_masters(),
        lambda: [setattr(p, "data", values[n].clone()) for n, p in model.named_parameters()],
    ]
    with torch.no_grad():
        edits.append(lambda: [p.copy_(values[n]) for n, p in model.named_parameters()])
        for edit in edits:
            values = {name: torch.randn_like(value) for name, value in values.items()}
            edit()
            with torch.enable_grad():
                train(model, optimizer, steps=range(1))
            assert_same_bits(snapshot(model), values)


def clamp(model: nn.Sequential) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.clamp_(-0.1, 0.1)


def replace_data_twice(model: nn.Sequential) -> None:
    """The second tensor may get the memory of the first parameter, which was freed in between."""
    for param in model.parameters():
        param.data = param.data * 0.5
        param.data = param.data * 1.5


def average_with_a_checkpoint(model: nn.Sequential) -> None:
    model.load_state_dict({name: (value + 0.1) / 2 for name, value in model.state_dict().items()})


@pytest.mark.parametrize("edit", [clamp, replace_data_twice, average_with_a_checkpoint])
def test_edits_after_every_step_equal_torch(edit: Any) -> None:
    pairs = both()
    for model, optimizer in pairs:
        for step in range(NUM_STEPS):
            train(model, optimizer, steps=range(step, step + 1))
            edit(model)
    assert_same_bits(snapshot(pairs[0][0]), snapshot(pairs[1][0]))


def test_edits_through_data_in_place_need_refresh_masters() -> None:
    pairs = both()
    for model, optimizer in pairs:
        for step in range(6):
            train(model, optimizer, steps=range(step, step + 1))
            model[0].weight.data.mul_(0.5)
            if isinstance(optimizer, offload.AdamW):
                optimizer.refresh_masters()
    assert_same_bits(snapshot(pairs[0][0]), snapshot(pairs[1][0]))


# ---- plans


def test_plan_may_be_read_and_set_as_text() -> None:
    optimizer = offload.AdamW(mlp().parameters(), plan=Stride(2), subgroup_numel=1600)
    assert str(optimizer.plan) == "D0@0 D2@1 P1@0 C0@0 G1@0 F1@0 C2@1 U0@0 U2@1"
    optimizer.set_plan("D0@0 C0@0 U0@0 D1@1 C1@1 U1@1 D2@0 C2@0 U2@0")
    assert set(optimizer.plan.placements.values()) == {Placement.HOST}
    optimizer.set_plan(offload.Plan.parse("P1@1 G1@1 D0@0 C0@0 F1@1 U0@0 D2@0 C2@0 U2@0"))
    assert optimizer.plan.placements[1] is Placement.DEVICE
    optimizer = offload.AdamW(mlp().parameters(), plan="R0 R2 P1@0 G1@0 F1@0", subgroup_numel=1600)
    assert [optimizer.plan.placements[i] for i in range(3)] == [
        Placement.RESIDENT, Placement.DEVICE, Placement.RESIDENT
    ]  # fmt: skip


def test_simulate_predicts_any_plan_on_any_machine() -> None:
    (_, optimizer), _ = both()
    rates = offload.Rates(
        h2d_bytes_per_s=1e9, d2h_bytes_per_s=1e9, host_update_params_per_s=1e8, device_update_params_per_s=1e10
    )
    prediction = optimizer.simulate(rates)
    assert prediction.plan == optimizer.plan
    assert prediction.update_s > 0
    numel = sum(p.numel() for p in mlp().parameters())
    assert prediction.update_s < numel * (32 / 1e9 + 1 / 1e8)
    assert optimizer.timeline() == []


def test_no_warning_in_ordinary_use() -> None:
    (model, optimizer), _ = both()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        train(model, optimizer, steps=range(2))
        scheduler.step()
