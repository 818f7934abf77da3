"""Checkpoints: torch's schema both ways, complete or not at all, and the bits of a run that was never interrupted."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload import Static, Stride
from tests.training import NUM_STEPS, Trained, assert_same_bits, loss_of, mlp, snapshot, state_snapshot, train

pytestmark = pytest.mark.usefixtures("one_torch_thread")

HYPER = {"lr": 3e-3, "betas": (0.8, 0.97), "weight_decay": 0.05}
INTERLEAVED = Stride(2)
FIRST, REST = range(8), range(8, NUM_STEPS)
LOW_PRECISION = (torch.bfloat16, torch.float16)


def make_ours(model: nn.Module, plan: Any = INTERLEAVED, **kwargs: Any) -> offload.AdamW:
    return offload.AdamW(model.parameters(), plan=plan, subgroup_numel=200, **{**HYPER, **kwargs})


def make_torchs(model: nn.Module, **kwargs: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), fused=True, **{**HYPER, **kwargs})


def uninterrupted(dtype: torch.dtype = torch.float32, **kwargs: Any) -> Trained:
    model = mlp(dtype=dtype)
    return train(model, make_ours(model, "host", **kwargs))


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any, Any]:
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return snapshot(model), state_snapshot(optimizer), copy.deepcopy(groups)


def assert_unchanged(model: nn.Module, optimizer: torch.optim.Optimizer, before: tuple[Any, Any, Any]) -> None:
    now = everything(model, optimizer)
    assert_same_bits(now[:2], before[:2])
    assert now[2] == before[2]


# ---- between torch's optimizer and ours


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    ("first", "second"), [(make_ours, make_torchs), (make_torchs, make_ours), (make_ours, make_ours)]
)
def test_training_goes_on_in_another_optimizer(first: Any, second: Any, amsgrad: bool) -> None:
    model = mlp()
    optimizer = first(model, amsgrad=amsgrad)
    train(model, optimizer, steps=FIRST)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    model = mlp(seed=1)
    optimizer = second(model, amsgrad=amsgrad, lr=1.0)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.param_groups[0]["lr"] == HYPER["lr"]
    optimizer.param_groups[0]["fused"] = True  # torch takes this from the checkpoint, and ours leaves it to torch
    assert_same_bits(train(model, optimizer, steps=REST).params, uninterrupted(amsgrad=amsgrad).params)


def test_there_and_back_keeps_every_bit() -> None:
    model = mlp()
    optimizer = make_ours(model)
    train(model, optimizer, steps=FIRST)
    saved = optimizer.state_dict()
    torchs = make_torchs(model)
    torchs.load_state_dict(copy.deepcopy(saved))
    back = make_ours(model, "host")
    back.load_state_dict(torchs.state_dict())
    assert_same_bits(state_snapshot(back), state_snapshot(optimizer))
    assert saved["state"][0].keys() == torchs.state_dict()["state"][0].keys()
    assert saved["param_groups"][0].keys() == torchs.state_dict()["param_groups"][0].keys()


def test_torchs_state_over_bfloat16_is_widened() -> None:
    """torch keeps moments in the parameter's dtype and has no masters: the parameter itself is the master then."""
    theirs = mlp(dtype=torch.bfloat16)
    torchs = make_torchs(theirs)
    train(theirs, torchs, steps=FIRST)
    ours = mlp(dtype=torch.bfloat16)
    optimizer = make_ours(ours)
    train(ours, optimizer, steps=FIRST)
    ours.load_state_dict(theirs.state_dict())
    optimizer.load_state_dict(torchs.state_dict())
    for param, entry in optimizer.state.items():
        index = next(i for i, p in enumerate(ours.parameters()) if p is param)
        assert_same_bits(entry["master"], param.detach().float())
        assert_same_bits(entry["exp_avg"], torchs.state_dict()["state"][index]["exp_avg"].float())


# ---- between placements, in any order, at any time


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("load_model_first", [True, False])
@pytest.mark.parametrize(("plan", "next_plan"), [("host", "device"), (Static(0.5), Stride(3)), ("device", Static(1.0))])
def test_training_goes_on_under_another_plan(
    plan: Any, next_plan: Any, load_model_first: bool, dtype: torch.dtype
) -> None:
    """Also with masters wider than the parameters, whichever of model and optimizer is loaded first."""
    model = mlp(dtype=dtype)
    optimizer = make_ours(model, plan)
    train(model, optimizer, steps=FIRST)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    model = mlp(dtype=dtype, seed=1)
    optimizer = make_ours(model, next_plan)
    train(model, optimizer, steps=range(3))
    loads = [lambda: model.load_state_dict(saved["model"]), lambda: optimizer.load_state_dict(saved["optimizer"])]
    for load in loads if load_model_first else reversed(loads):
        load()
    assert_same_bits(train(model, optimizer, steps=REST).params, uninterrupted(dtype).params)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("load_model_first", [True, False])
def test_loading_what_was_saved_before_the_first_step_starts_again(load_model_first: bool, dtype: torch.dtype) -> None:
    """Nothing of the steps since is left, not even the bits of a master below its parameter's precision."""
    model = mlp(dtype=dtype)
    optimizer = make_ours(model)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert saved["optimizer"]["state"] == {}
    train(model, optimizer, steps=range(30, 33))
    loads = [lambda: model.load_state_dict(saved["model"]), lambda: optimizer.load_state_dict(saved["optimizer"])]
    for load in loads if load_model_first else reversed(loads):
        load()
    assert len(optimizer.state) == 0
    assert_same_bits(train(model, optimizer), uninterrupted(dtype))


def test_a_parameter_that_never_had_a_gradient() -> None:
    model = mlp()
    optimizer = make_ours(model)

    def drop(step: int) -> None:
        model[2].weight.grad = None

    train(model, optimizer, steps=FIRST, before_step=drop)
    saved = through_a_file(optimizer.state_dict())
    assert 2 not in saved["state"]
    other = mlp(seed=1)
    other_optimizer = make_ours(other, "host")
    train(other, other_optimizer, steps=FIRST)
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(saved)
    assert other[2].weight not in other_optimizer.state
    assert_same_bits(train(other, other_optimizer, steps=REST), train(model, optimizer, steps=REST))


def test_loading_its_own_state_changes_nothing() -> None:
    """A state_dict shares memory with its optimizer."""
    model = mlp(dtype=torch.bfloat16)
    optimizer = make_ours(model)
    train(model, optimizer, steps=FIRST)
    before = everything(model, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_unchanged(model, optimizer, before)


@pytest.mark.parametrize("is_loaded", [False, True])
def test_clearing_the_state_starts_again(is_loaded: bool) -> None:
    """As in torch: step counts and moments from zero, parameters as they are."""
    models = mlp(), mlp()
    optimizers: list[Any] = [make_ours(models[0]), make_torchs(models[1])]
    for i, model in enumerate(models):
        train(model, optimizers[i], steps=FIRST)
        if is_loaded:
            saved = copy.deepcopy(optimizers[i].state_dict())
            optimizers[i] = (make_ours, make_torchs)[i](model)
            optimizers[i].load_state_dict(saved)
        optimizers[i].state.clear()
    assert_same_bits(train(models[0], optimizers[0], steps=REST), train(models[1], optimizers[1], steps=REST))


def test_moments_may_be_edited_in_place() -> None:
    models = mlp(), mlp()
    optimizers = make_ours(models[0], "device"), make_torchs(models[1])
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, steps=FIRST)
        for entry in optimizer.state.values():
            entry["exp_avg"].zero_()
            entry["step"].fill_(3)
    assert_same_bits(train(models[0], optimizers[0], steps=REST), train(models[1], optimizers[1], steps=REST))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["copy", "pickle"]
)
def test_copies_go_on_by_themselves(how: Any, dtype: torch.dtype) -> None:
    model = mlp(dtype=dtype)
    optimizer = make_ours(model, on_nonfinite="skip")
    train(model, optimizer, steps=FIRST)
    copied, copied_optimizer = how((model, optimizer))
    before = everything(model, optimizer)
    assert copied_optimizer.on_nonfinite == "skip"
    assert copied_optimizer.bill == optimizer.bill
    assert copied_optimizer.param_groups[0]["params"][0] is copied[0].weight
    assert_same_bits(train(copied, copied_optimizer, steps=REST).params, uninterrupted(dtype).params)
    assert_unchanged(model, optimizer, before)


# ---- hooks


def test_hooks_see_and_change_what_is_loaded() -> None:
    model = mlp()
    optimizer = make_ours(model)
    train(model, optimizer, steps=FIRST)
    saved = copy.deepcopy(optimizer.state_dict())
    calls: list[str] = []

    def note(opt: torch.optim.Optimizer) -> None:
        calls.append("post")

    def set_lr(opt: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("pre")
        return {**state_dict, "param_groups": [{**group, "lr": 0.5} for group in state_dict["param_groups"]]}

    def drop_entry(opt: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["state"] = {0: state_dict["state"][0]}

    optimizer.register_load_state_dict_pre_hook(drop_entry)
    optimizer.register_load_state_dict_pre_hook(set_lr)
    optimizer.register_load_state_dict_post_hook(note)
    optimizer.load_state_dict(saved)
    assert calls == ["pre", "post"]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert len(optimizer.state) == 1
    assert len(saved["state"]) == 8  # the caller's own is not changed

    optimizer.register_state_dict_post_hook(lambda opt, state_dict: {**state_dict, "extra": 1})
    assert optimizer.state_dict()["extra"] == 1


# ---- refused, with nothing loaded


STATES_THAT_DO_NOT_FIT = {
    "wider": "shape .* belongs to another model",
    "deeper": "has 10 parameters, this optimizer's 8",
    "two groups": "has 2 parameter groups, this optimizer 1",
    "SGD": "lacks .*'exp_avg', 'exp_avg_sq'.* no Adam state",
    "incomplete": "lacks .*'exp_avg_sq'.* for parameter 7",
    "bad shape": "exp_avg of parameter 7 .* shape",
    "extra entry": "entry for parameter 8, which no group holds",
    "amsgrad": "saved with amsgrad=True",
    "a model": "lacks .*'param_groups', 'state'.* no optimizer's state_dict",
}


def state_that_does_not_fit(name: str) -> dict[str, Any]:
    """A state that is not one of ``mlp()``'s; where only an entry is wrong, it is the last."""
    base = mlp()
    optimizer = make_ours(base)
    train(base, optimizer, steps=range(1))
    good = copy.deepcopy(optimizer.state_dict())

    wider = mlp((16, 64, 48, 32, 16))
    wider_optimizer = make_ours(wider)
    train(wider, wider_optimizer, steps=range(1))
    deeper = mlp((16, 32, 48, 32, 32, 16))
    sgd = torch.optim.SGD(mlp().parameters(), lr=0.1, momentum=0.9)
    for param in sgd.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    sgd.step()
    last = good["state"][7]
    incomplete = {entry: value for entry, value in last.items() if entry != "exp_avg_sq"}
    last_entries = {"incomplete": (7, incomplete), "bad shape": (7, {**last, "exp_avg": torch.zeros(3)})}
    index, entry = {**last_entries, "extra entry": (8, last)}.get(name, (7, last))
    two_groups = offload.AdamW([{"params": p} for p in mlp()[0].parameters()])
    states = {
        "wider": wider_optimizer.state_dict(),
        "deeper": make_ours(deeper).state_dict(),
        "two groups": two_groups.state_dict(),
        "SGD": sgd.state_dict(),
        "amsgrad": make_ours(mlp(), amsgrad=True).state_dict(),
        "a model": mlp().state_dict(),
    }
    return states.get(name, {**good, "state": {**good["state"], index: entry}})


@pytest.mark.parametrize("name", STATES_THAT_DO_NOT_FIT)
def test_state_of_another_model_is_refused_whole(name: str) -> None:
    model = mlp()
    optimizer = make_ours(model)
    train(model, optimizer, steps=FIRST)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=STATES_THAT_DO_NOT_FIT[name]):
        optimizer.load_state_dict(state_that_does_not_fit(name))
    assert_unchanged(model, optimizer, before)
    assert_same_bits(train(model, optimizer, steps=REST).params, uninterrupted().params)


def test_state_of_a_frozen_parameter_is_refused() -> None:
    saved_model = mlp()
    saved = make_ours(saved_model)
    train(saved_model, saved, steps=range(1))
    model = mlp()
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"entry for parameter 0, which was frozen .* set requires_grad first"):
        make_ours(model).load_state_dict(saved.state_dict())


def test_loading_waits_for_no_gradient() -> None:
    """Gradients that are there when state is loaded are the next step's."""
    models = mlp(), mlp()
    optimizers = make_ours(models[0]), make_torchs(models[1])
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, steps=FIRST)
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.zero_grad()
        loss_of(model, 40).backward()
        optimizer.load_state_dict(saved)
        optimizer.step()
    assert_same_bits(*map(snapshot, models))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_models_weights_win_over_a_checkpoints_masters(dtype: torch.dtype) -> None:
    """Whichever is loaded first: edited, averaged or newer weights must not fall back to what the masters held."""
    results = []
    for model_first in (True, False):
        source = nn.Parameter(torch.linspace(-1, 1, 64).to(dtype))
        optimizer = offload.AdamW([source], lr=0.0, weight_decay=0.0)
        source.grad = torch.ones_like(source)
        optimizer.step()
        checkpoint = copy.deepcopy(optimizer.state_dict())

        weight = nn.Parameter(torch.zeros(64, dtype=dtype))
        loaded = offload.AdamW([weight], lr=0.0, weight_decay=0.0)
        edits = [lambda w=weight: w.detach().fill_(3.0), lambda o=loaded, c=checkpoint: o.load_state_dict(c)]
        for edit in edits if model_first else reversed(edits):
            edit()
        weight.grad = torch.ones_like(weight)
        loaded.step()
        results.append(weight.detach())
    assert_same_bits(results[0], torch.full((64,), 3.0, dtype=dtype))
    assert_same_bits(*results)


def test_loading_shares_no_hyper_parameter_with_the_checkpoint() -> None:
    weight = nn.Parameter(torch.zeros(64))
    saved = offload.AdamW([weight], lr=torch.tensor(0.1))
    other = offload.AdamW([nn.Parameter(torch.zeros(64))], lr=0.5)
    other.load_state_dict(saved.state_dict())
    saved.param_groups[0]["lr"].fill_(7.0)
    assert float(other.param_groups[0]["lr"]) == pytest.approx(0.1)
