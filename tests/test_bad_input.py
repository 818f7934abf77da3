"""Users' mistakes: an error that names the value, the limit and the remedy, and nothing changed by then."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload import BudgetError, PlanError, Static, Stride
from tests.training import assert_same_bits, loss_of, mlp, snapshot, state_snapshot, train

pytestmark = pytest.mark.usefixtures("one_torch_thread")

NUMEL = sum(param.numel() for param in mlp().parameters())


def make(model: nn.Module, **kwargs: Any) -> offload.AdamW:
    return offload.AdamW(model.parameters(), **{"plan": Stride(2), "subgroup_numel": 200, **kwargs})


def trained(dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[nn.Sequential, offload.AdamW]:
    """After three steps, with gradients for the next."""
    model = mlp(dtype=dtype)
    optimizer = make(model, **kwargs)
    train(model, optimizer, steps=range(3))
    optimizer.zero_grad()
    loss_of(model, 3).backward()
    return model, optimizer


def everything(model: nn.Module, optimizer: offload.AdamW) -> tuple[dict[str, Tensor], dict[Any, Tensor]]:
    return snapshot(model), state_snapshot(optimizer)


# ---- arguments


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be finite and at least 0, not -1.0"),
        ({"lr": math.nan}, ValueError, "lr must be finite and at least 0, not nan"),
        ({"lr": math.inf}, ValueError, "lr must be finite"),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must be at least 0 and less than 1, not 1.0"),
        ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\] must be at least 0 and less than 1, not -0.1"),
        ({"eps": -1e-8}, ValueError, "eps must be finite and at least 0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be finite and at least 0"),
        ({"foreach": True}, ValueError, "foreach=True is not available: .*; leave foreach at None"),
        ({"fused": False}, ValueError, "fused=False is not available: .*; leave fused at None"),
        ({"capturable": True}, ValueError, "capturable=True is not available: .*; leave capturable at False"),
        ({"differentiable": True}, ValueError, "differentiable=True is not available"),
        ({"num_slots": 0}, ValueError, "num_slots=0 is too few; give 1 or more"),
        ({"num_slots": 2, "plan": "host"}, ValueError, "num_slots=2 has no use with plan='host'"),
        ({"num_slots": 1.5}, TypeError, "num_slots must be an int or None, not 1.5"),
        ({"num_slots": True}, TypeError, "num_slots must be an int"),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite='ignore' is neither 'error' nor 'skip'"),
        ({"plan": 2}, TypeError, "plan must be one of .*, not 2"),
        ({"plan": "gpu"}, PlanError, "word 0 of the plan, 'gpu', is no operation; write D, C, U"),
        ({"subgroup_numel": 0}, ValueError, f"subgroup_numel=0 is out of range: .* {NUMEL} .* give 1 to {NUMEL}"),
        ({"subgroup_numel": NUMEL + 1}, ValueError, f"subgroup_numel={NUMEL + 1} is out of range: .* 1 to {NUMEL}"),
        ({"subgroup_numel": 1e3}, TypeError, "subgroup_numel must be an int or None, not 1000.0"),
        ({"subgroup_numel": True}, TypeError, "subgroup_numel must be an int"),
        (
            {"device_budget": "4 gigs"},
            ValueError,
            "device_budget='4 gigs' is no size; write bytes as an int, or a text",
        ),
        ({"host_budget": -1}, ValueError, "host_budget=-1 is negative; give 0 or more bytes, or None"),
        ({"pinned_budget": 1.5}, TypeError, "pinned_budget must be an int, a text"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_arguments(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(mlp(), **kwargs)


@pytest.mark.parametrize(
    ("make_policy", "message"),
    [
        (lambda: Stride(0), "update_stride=0 is no stride; give 1"),
        (lambda: Static(1.5), "resident_fraction=1.5 is no share; give 0"),
        (lambda: Static(-0.1), "resident_fraction=-0.1 is no share"),
    ],
)
def test_policies(make_policy: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy()


def test_no_parameters_is_torchs_error() -> None:
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        offload.AdamW([])


def test_a_parameter_in_two_groups_is_torchs_error() -> None:
    param = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="more than one parameter group"):
        offload.AdamW([{"params": [param]}, {"params": [param]}])


@pytest.mark.parametrize("edit", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": math.nan}, {"amsgrad": True}], ids=str)
def test_groups_edited_to_values_out_of_range(edit: dict[str, Any]) -> None:
    """Found before anything is counted or updated, also where an earlier group is in order."""
    model = mlp()
    groups = [{"params": model[:4].parameters()}, {"params": model[4:].parameters()}]
    optimizer = offload.AdamW(groups, plan=Stride(2), subgroup_numel=200)
    train(model, optimizer, steps=range(3))
    before = everything(model, optimizer)
    loss_of(model, 3).backward()
    kept = {name: optimizer.param_groups[1][name] for name in edit}
    optimizer.param_groups[1].update(edit)
    with pytest.raises(ValueError, match=next(iter(edit))):
        optimizer.step()
    assert_same_bits(everything(model, optimizer), before)
    optimizer.param_groups[1].update(kept)
    optimizer.step()


# ---- parameters


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (torch.ones(4, dtype=torch.float64), "has dtype torch.float64; supported are torch.float32, torch.bfloat16, "),
        (torch.ones(4, dtype=torch.complex64), "has dtype torch.complex64; .*: convert it, or give it to another"),
        (torch.ones(4, 6).t(), r"of shape \(6, 4\) is not contiguous \(strides \(1, 6\)\); make it so first"),
        (torch.ones(4, device="meta"), "is on meta but this optimizer's device is cpu; move the model to one device"),
    ],
    ids=["float64", "complex", "non-contiguous", "other-device"],
)
@pytest.mark.parametrize("when", ["constructed", "joins", "unfrozen"])
def test_parameters_that_cannot_be_taken(when: str, param: Tensor, message: str) -> None:
    model = mlp()
    bad = nn.Parameter(param)
    bill = None
    with pytest.raises(ValueError, match=r"parameter \d of group \d " + message):  # noqa: PT012
        if when == "constructed":
            offload.AdamW([*model.parameters(), bad])
        optimizer = make(model)
        train(model, optimizer, steps=range(2))
        before, bill = everything(model, optimizer), optimizer.bill
        if when == "joins":
            optimizer.add_param_group({"params": bad})
        bad.requires_grad_(False)
        optimizer.add_param_group({"params": bad})  # frozen, it is none of the optimizer's business
        bad.requires_grad_(True)
        bad.grad = torch.ones_like(bad)
        optimizer.step()
    if when != "constructed":
        assert_same_bits(everything(model, optimizer), before)
        assert len(optimizer.param_groups) == 1 + (when == "unfrozen")
        assert optimizer.bill == bill


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: torch.ones(3),
            r"had 512 elements of torch.float32 and now has 3 of torch.float32; construct the opt",
        ),
        (lambda p: p.data.bfloat16(), "had 512 elements of torch.float32 and now has 512 of torch.bfloat16"),
        (lambda p: p.data.double(), "dtype torch.float64; supported are"),
        (lambda p: p.data.t().clone(), "is not contiguous"),
    ],
    ids=["shape", "dtype", "float64", "transposed"],
)
def test_parameters_changed_beyond_use(change: Any, message: str) -> None:
    model, optimizer = trained()
    before = state_snapshot(optimizer)
    param = model[0].weight
    param.grad = None
    param.data = change(param)
    with pytest.raises(ValueError, match="parameter 0 of group 0 .*" + message):
        optimizer.step()
    assert_same_bits(state_snapshot(optimizer), before)


def test_a_group_that_does_not_fit_is_not_added() -> None:
    _model, optimizer = trained()
    with pytest.raises(ValueError, match="lr must be finite"):
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(4)), "lr": -1.0})
    assert len(optimizer.param_groups) == 1
    optimizer.step()


# ---- gradients


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clip", [False, True])
def test_nonfinite_gradients_are_an_error_and_change_nothing(clip: bool, dtype: torch.dtype, value: float) -> None:
    model, optimizer = trained(dtype)
    before = everything(model, optimizer)
    good = model[4].bias.grad.clone()
    model[4].bias.grad[7] = value
    if clip:
        optimizer.clip_grad_norm_(1.0)
    with pytest.raises(
        offload.NonFiniteGradientError,
        match=r"1 of 8 gradients hold NaN or infinity, first: 5 of group 0; nothing was changed. Lower .* on_nonfinite",
    ):
        optimizer.step()
    assert_same_bits(everything(model, optimizer), before)
    model[4].bias.grad.copy_(good)
    optimizer.step()  # goes on, without the coefficient of the step that was refused
    reference_model, reference = trained(dtype)
    reference.step()
    assert_same_bits(everything(model, optimizer), everything(reference_model, reference))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_gradients_may_skip_the_step(value: float) -> None:
    model, optimizer = trained(on_nonfinite="skip")
    before = everything(model, optimizer)
    model[0].weight.grad[3, 4] = value
    optimizer.step()
    assert optimizer.num_skipped_steps == 1
    assert_same_bits(everything(model, optimizer), before)
    model[0].weight.grad[3, 4] = 0.0
    optimizer.step()
    assert optimizer.num_skipped_steps == 1
    assert int(optimizer.state[model[0].weight]["step"]) == 4


def test_the_largest_finite_gradients_are_taken() -> None:
    """Their sum of squares is infinite, they are not."""
    param = nn.Parameter(torch.ones(16, dtype=torch.bfloat16))
    optimizer = offload.AdamW([param])
    param.grad = torch.full_like(param, torch.finfo(torch.bfloat16).max)
    optimizer.step()
    assert optimizer.num_skipped_steps == 0
    assert len(optimizer.state) == 1


def test_sparse_gradients() -> None:
    model = nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 4))
    optimizer = offload.AdamW(model.parameters(), subgroup_numel=16)
    before = snapshot(model)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 is sparse .* use torch.optim.SparseAdam for it"):
        optimizer.step()
    assert_same_bits(snapshot(model), before)
    assert len(optimizer.state) == 0


def test_gradients_of_another_dtype() -> None:
    model, optimizer = trained(torch.bfloat16)
    before = everything(model, optimizer)
    model[0].bias.grad = None
    model[0].bias.grad_dtype = torch.float32
    model[0].bias.grad = torch.ones(32)
    with pytest.raises(
        RuntimeError, match=r"parameter 1 of group 0 has dtype torch.float32, its parameter torch.bfloat16"
    ):
        optimizer.step()
    assert_same_bits(everything(model, optimizer), before)


def test_step_without_backward_warns_and_changes_nothing() -> None:
    model, optimizer = trained()
    optimizer.zero_grad()
    before = everything(model, optimizer)
    with pytest.warns(UserWarning, match=r"step\(\) found no gradients, .* was backward\(\) called\?") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    assert_same_bits(everything(model, optimizer), before)


# ---- plans and budgets


def test_plans_that_do_not_fit() -> None:
    model, optimizer = trained()
    plan, before = optimizer.plan, everything(model, optimizer)
    num_subgroups = len(plan.placements)
    host = " ".join(f"D{i}@0 C{i}@0 U{i}@0" for i in range(num_subgroups))
    cases = {
        host.replace(f"U{num_subgroups - 1}@0", ""): "never leaves staging buffer 0",
        host.replace("D0@0 C0@0 U0@0", ""): r"subgroups \[0\] are never updated",
        host + f" D{num_subgroups}@0": f"there is no subgroup {num_subgroups}",
        host.replace("0@0", "0@2"): r">>D0@2<<.*|there is no staging buffer 2; there are 2",
        host.replace("D0@0 C0@0", "C0@0 D0@0"): "the next operation of subgroup 0 must be D",
        host.replace("D0@0 C0@0 U0@0", "R0"): "the state of subgroup 0 lives in host memory",
    }
    for text, message in cases.items():
        with pytest.raises(PlanError, match=message):
            optimizer.set_plan(text)
    with pytest.raises(PlanError, match=r"subgroups \[0\] are never updated"):
        make(mlp(), plan=host.replace("D0@0 C0@0 U0@0", ""))
    with pytest.raises(PlanError, match="word 1 of the plan"):
        optimizer.set_plan("D0@0 bogus")
    pageable = host.replace("D0@0 C0@0 U0@0", "P0@0 G0@0 F0@0")  # Stride(2) pins the odd subgroups only
    with pytest.raises(
        BudgetError, match=r"updates subgroups \[0\] on the device, but their state is not pinned: .* more"
    ):
        optimizer.set_plan(pageable)
    assert optimizer.plan == plan
    assert_same_bits(everything(model, optimizer), before)


def test_parameters_cannot_join_a_fixed_plan() -> None:
    model = mlp((16, 16))
    optimizer = offload.AdamW(model.parameters(), plan="D0@0 C0@0 U0@0")
    with pytest.raises(
        PlanError, match="fixed plan, which covers the parameters it was constructed with; use a policy"
    ):
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(4))})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("plan", "budget", "part"),
    [
        ("device", "device_budget", "device_bytes"),
        (Static(1.0), "device_budget", "device_bytes"),
        ("host", "host_budget", "host_bytes"),
        (Stride(2), "host_budget", "host_bytes"),
        (Stride(2), "pinned_budget", "pinned_bytes"),
        ("host", "pinned_budget", "pinned_bytes"),
    ],
    ids=str,
)
def test_budgets_too_small(sim: ModuleType, plan: Any, budget: str, part: str) -> None:
    """The message says what there is, what is needed to the byte, and what to do; one byte more and it fits."""
    device = "sim" if budget == "pinned_budget" else "cpu"  # where nothing is pinned
    needed = getattr(make(mlp(device=device), plan=plan).bill, part)
    assert needed > 0
    message = rf"{budget} is .* \({needed - 1} bytes\) but .* \({needed} bytes\) are needed: .*; raise it, "
    with pytest.raises(BudgetError, match=message):
        make(mlp(device=device), plan=plan, **{budget: needed - 1})
    assert getattr(make(mlp(device=device), plan=plan, **{budget: needed}).bill, part) == needed


def test_a_group_over_budget_is_not_added() -> None:
    model = mlp()
    needed = make(model, plan="host").bill.host_bytes
    optimizer = make(model, plan="host", host_budget=needed + 12 * 10)
    optimizer.add_param_group({"params": nn.Parameter(torch.ones(10))})
    train(model, optimizer, steps=range(2))
    before, plan = everything(model, optimizer), optimizer.plan
    with pytest.raises(BudgetError, match="host_budget"):
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(1))})
    assert len(optimizer.param_groups) == 2
    assert optimizer.plan == plan
    assert_same_bits(everything(model, optimizer), before)
    train(model, optimizer, steps=range(2, 4))


# ---- errors inside a step


def test_an_error_inside_a_step_breaks_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    _model, optimizer = trained()

    def fail(*args: object, **kwargs: object) -> None:
        raise ArithmeticError("the kernel gave up")

    monkeypatch.setattr("offload.adam.PreparedUpdate.__call__", fail)
    with pytest.raises(ArithmeticError, match="the kernel gave up"):
        optimizer.step()
    monkeypatch.undo()
    for use in (optimizer.step, optimizer.synchronize, optimizer.state_dict, lambda: optimizer.load_state_dict({})):
        with pytest.raises(
            RuntimeError, match=r"this optimizer is broken: .* construct a new optimizer and load the last"
        ):
            use()


def test_an_error_in_the_closure_changes_nothing() -> None:
    model, optimizer = trained()
    before = everything(model, optimizer)

    def closure() -> float:
        raise KeyError("no batch")

    with pytest.raises(KeyError, match="no batch"):
        optimizer.step(closure)
    assert_same_bits(everything(model, optimizer), before)
    optimizer.step()
