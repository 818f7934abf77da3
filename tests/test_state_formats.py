"""State formats in training: split16 is fp32 bit for bit, the others do not depend on where and how they run."""

from __future__ import annotations

import copy
import io
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload import Static, Stride
from offload.kernels import use_implementation
from offload.kernels.state import num_blocks
from tests.training import (
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

HYPER = {"lr": 3e-3, "betas": (0.8, 0.97), "weight_decay": 0.05}
COMPACT = ("split16", "bf16", "int8")
SUBGROUP_NUMEL = 200
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda params, **options: offload.AdamW(params, **HYPER, **options),
    "adam": lambda params, **options: offload.Adam(params, **HYPER, **options),
    "amsgrad": lambda params, **options: offload.AdamW(params, amsgrad=True, **HYPER, **options),
    "lion": lambda params, **options: offload.Lion(params, lr=1e-3, weight_decay=0.05, **options),
    "adagrad": lambda params, **options: offload.Adagrad(params, lr=3e-2, lr_decay=0.1, **options),
    "momentum": lambda params, **options: offload.SGD(params, lr=3e-2, momentum=0.9, nesterov=True, **options),
    "sgd": lambda params, **options: offload.SGD(params, lr=3e-2, **options),
}
LOSSLESS = ("adamw", "adam", "amsgrad", "adagrad")  # a second moment has a sign to spare
pytestmark = pytest.mark.usefixtures("one_torch_thread")


def is_possible(name: str, state_format: str) -> bool:
    return name != "amsgrad" or state_format in ("fp32", "split16")


def trained(name: str, state_format: str, *, device: str = "cpu", seed: int = 0, **options: Any) -> Trained:
    model = mlp(ODD_WIDTHS, dtype=torch.bfloat16, device=device)
    options = {"plan": "host", "subgroup_numel": SUBGROUP_NUMEL, **options}
    optimizer = OPTIMIZERS[name](model.parameters(), state_format=state_format, rounding_seed=seed, **options)
    return train(model, optimizer, steps=range(6))


def masters(model: nn.Module, optimizer: offload.AdamW) -> list[torch.Tensor]:
    """The float32 masters, by loading the state into an optimizer that keeps them whole."""
    whole = offload.AdamW(model.parameters(), **HYPER)
    whole.load_state_dict(optimizer.state_dict())
    return [entry["master"] for entry in whole.state_dict()["state"].values()]


# ---- bits


@pytest.mark.parametrize("num_steps", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_steps_of_split16_are_those_of_fp32(num_steps: int) -> None:
    """Every loss on the way, and at the end every parameter and master. One master in 65536 is a tie."""
    runs, num_ties = [], 0
    for state_format in ("fp32", "split16"):
        model = mlp((16, 128, 16), dtype=torch.bfloat16)
        optimizer = offload.AdamW(model.parameters(), plan="host", state_format=state_format, **HYPER)

        def count_ties(step: int, optimizer: offload.AdamW = optimizer) -> None:
            nonlocal num_ties
            for entry in optimizer.state.values():
                num_ties += int((entry["signed_exp_avg_sq"] < 0).sum()) if "signed_exp_avg_sq" in entry else 0

        trained = train(model, optimizer, steps=range(num_steps), before_step=count_ties)
        runs.append((trained, masters(model, optimizer)))
    assert_same_bits(runs[1], runs[0])
    assert num_ties > 0, "no master was a tie, so this shows less than it says"


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("plan", [Stride(2), Static(0.4)], ids=str)
def test_split16_is_fp32_wherever_it_runs(sim: ModuleType, name: str, plan: Any) -> None:
    assert_same_bits(trained(name, "split16", plan=plan, device="sim"), trained(name, "fp32", device="sim"))
    assert sim.races() == []


@pytest.mark.parametrize("state_format", COMPACT)
@pytest.mark.parametrize("name", ["adamw", "lion", "adagrad", "momentum"])
def test_placement_and_subgroups_do_not_matter(sim: ModuleType, name: str, state_format: str) -> None:
    sim.configure(executor="random")
    with use_implementation("torch"):
        expected = trained(name, state_format, device="sim", subgroup_numel=1)
    for options in ({"plan": Stride(2)}, {"plan": Static(0.4), "subgroup_numel": 2000}):
        assert_same_bits(trained(name, state_format, device="sim", **options), expected)
    assert sim.races() == []


@pytest.mark.parametrize("state_format", COMPACT)
@pytest.mark.parametrize("executor", ["threads", "lazy", "eager"])
def test_plans_may_change_every_step(sim: ModuleType, state_format: str, executor: str) -> None:
    sim.configure(executor=executor)
    model = mlp(ODD_WIDTHS, dtype=torch.bfloat16, device="sim")
    optimizer = offload.AdamW(
        model.parameters(), plan=Stride(1), subgroup_numel=SUBGROUP_NUMEL, state_format=state_format, **HYPER
    )
    replanned = train(model, optimizer, steps=range(6), before_step=replan_every_step(optimizer, 1))
    assert_same_bits(replanned, trained("adamw", state_format, device="sim"))
    assert sim.races() == []


@pytest.mark.parametrize("state_format", ["bf16", "int8"])
def test_the_seed_chooses_the_random_bits(state_format: str) -> None:
    first, again, other = (trained("adamw", state_format, seed=seed).params for seed in (0, 0, 1))
    assert_same_bits(again, first)
    assert any(not torch.equal(other[name], first[name]) for name in first)


@pytest.mark.parametrize("state_format", COMPACT)
def test_parameters_without_gradients_keep_their_state(state_format: str) -> None:
    """Between others that are updated by one call, and with the random bits of their own numbers."""
    models = [mlp(ODD_WIDTHS, dtype=torch.bfloat16) for _ in range(2)]
    for model, numel in zip(models, (1, 4000), strict=True):
        optimizer = offload.AdamW(
            model.parameters(), plan="host", subgroup_numel=min(numel, 1500), state_format=state_format
        )

        def drop_some(step: int, model: nn.Sequential = model) -> None:
            if step % 3 == 0:
                model[2].weight.grad = None

        train(model, optimizer, steps=range(8), before_step=drop_some)
    assert_same_bits(*map(snapshot, models))


# ---- memory


@pytest.mark.parametrize(("state_format", "bytes_each"), [("fp32", 12), ("split16", 10), ("bf16", 6), ("int8", 4)])
def test_bytes_are_as_billed(sim: ModuleType, state_format: str, bytes_each: int) -> None:
    numel = 64 * 1024
    param = nn.Parameter(torch.ones(numel, dtype=torch.bfloat16, device="sim"))
    optimizer = offload.AdamW([param], plan="device", state_format=state_format)
    scales_bytes = 2 * 4 * num_blocks(numel) if state_format == "int8" else 0
    assert optimizer.bill.host_state_bytes == numel * bytes_each + scales_bytes
    assert optimizer.bill.slot_bytes == 2 * optimizer.bill.host_state_bytes
    (actions,) = optimizer.runtime.actions
    assert actions.state.nbytes == optimizer.bill.host_state_bytes


def test_link_bytes_of_a_host_update_count_the_parameters_coming_down(sim: ModuleType) -> None:
    for state_format, factor in (("fp32", 1), ("split16", 2)):
        param = nn.Parameter(torch.ones(1024, dtype=torch.bfloat16, device="sim"))
        optimizer = offload.AdamW([param], plan="host", state_format=state_format)
        (subgroup,) = optimizer.runtime.subgroups
        assert subgroup.down_bytes == factor * 2048
        assert subgroup.host_update_bytes == 2 * subgroup.state_bytes + factor * 2048 + 2048


# ---- edits of parameters


@pytest.mark.parametrize("state_format", COMPACT)
def test_swapping_weights_and_back_changes_nothing(state_format: str) -> None:
    """As when evaluating averaged weights."""
    runs = []
    for swaps in (False, True):
        model = mlp(ODD_WIDTHS, dtype=torch.bfloat16)
        optimizer = offload.AdamW(model.parameters(), plan="host", state_format=state_format, **HYPER)

        def swap(step: int, model: nn.Module = model, swaps: bool = swaps) -> None:
            with torch.no_grad():
                for param in model.parameters() if swaps else ():
                    own = param.clone()
                    param.fill_(3.0)
                    param.copy_(own)

        runs.append(train(model, optimizer, steps=range(6), before_step=swap))
    assert_same_bits(*runs)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, 3e38, 1e-40])
@pytest.mark.parametrize("state_format", COMPACT)
def test_an_edited_parameter_wins(state_format: str, value: float) -> None:
    """Its master rounds to it, whatever the remainder was: half an ulp of bfloat16 is all that may be left over.

    In a step with learning rate 0, of which -0.0 comes back as 0.0 in every format.
    """
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(4096).bfloat16())
    optimizer = offload.AdamW([param], plan="host", state_format=state_format, lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        param.grad = torch.randn(4096).bfloat16()
        optimizer.step()
    with torch.no_grad():
        param.fill_(value)
    edited = param.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    param.grad = torch.randn(4096).bfloat16()
    optimizer.step()
    assert torch.equal(param.detach(), edited)


# ---- checkpoints


def first_half(model: nn.Sequential, state_format: str, name: str = "adamw") -> Any:
    optimizer = OPTIMIZERS[name](model.parameters(), plan="host", state_format=state_format)
    train(model, optimizer, steps=range(5))
    return optimizer


@pytest.mark.parametrize("model_first", [True, False], ids=["model_first", "optimizer_first"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("state_format", COMPACT)
def test_training_goes_on_from_a_checkpoint(name: str, state_format: str, model_first: bool) -> None:
    if not is_possible(name, state_format):
        pytest.skip("refused, see below")
    model = mlp(ODD_WIDTHS, dtype=torch.bfloat16)
    optimizer = first_half(model, state_format, name)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train(model, optimizer, steps=range(5, 10))

    file.seek(0)
    saved = torch.load(file)
    resumed = mlp(ODD_WIDTHS, dtype=torch.bfloat16, seed=7)
    new = OPTIMIZERS[name](
        resumed.parameters(), plan=Stride(2), subgroup_numel=SUBGROUP_NUMEL, state_format=state_format
    )
    loads = [lambda: resumed.load_state_dict(saved["model"]), lambda: new.load_state_dict(saved["optimizer"])]
    for load in loads if model_first else reversed(loads):
        load()
    assert_same_bits(train(resumed, new, steps=range(5, 10)), expected)


@pytest.mark.parametrize("target", ["fp32", *COMPACT])
@pytest.mark.parametrize("source", ["fp32", *COMPACT])
def test_checkpoints_change_format(source: str, target: str) -> None:
    """Masters exactly; moments to the precision of the coarser format."""
    model = mlp(ODD_WIDTHS, dtype=torch.bfloat16)
    optimizer = first_half(model, source)
    new = offload.AdamW(model.parameters(), plan="host", state_format=target, **HYPER)
    new.load_state_dict(optimizer.state_dict())
    before, after = masters(model, optimizer), masters(model, new)
    if "int8" in (source, target):  # a tie, one in 65536, has moved by one unit
        before, after = ([m.view(torch.int32) // 2 for m in each] for each in (before, after))
        assert sum(int((a != b).sum()) for a, b in zip(before, after, strict=True)) <= 1
    else:
        assert_same_bits(after, before)
    tolerance = {"fp32": 0.0, "split16": 0.0, "bf16": 2**-8, "int8": 0.03}
    whole = [offload.AdamW(model.parameters(), **HYPER) for _ in range(2)]
    for each, saved in zip(whole, (optimizer, new), strict=True):
        each.load_state_dict(saved.state_dict())
    for param in model.parameters():
        a, b = (each.state[param]["exp_avg"] for each in whole)
        allowed = max(tolerance[source], tolerance[target])
        assert float((a - b).abs().max()) <= allowed * float(a.abs().max())


@pytest.mark.parametrize("state_format", COMPACT)
def test_copies_and_pickles_go_on_alike(state_format: str) -> None:
    model = mlp(ODD_WIDTHS, dtype=torch.bfloat16)
    optimizer = first_half(model, state_format)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    assert twin_optimizer.state_format == state_format
    assert_same_bits(train(twin, twin_optimizer, steps=range(10, 15)), train(model, optimizer, steps=range(10, 15)))
    assert_same_bits(state_snapshot(twin_optimizer), state_snapshot(optimizer))


def test_torch_does_not_mistake_codes_for_moments() -> None:
    model = mlp(ODD_WIDTHS, dtype=torch.bfloat16)
    for state_format in COMPACT:
        other = torch.optim.AdamW(model.parameters())
        other.load_state_dict(first_half(model, state_format).state_dict())
        loss_of(model, 0).backward()
        with pytest.raises(KeyError, match="exp_avg"):
            other.step()


@pytest.mark.parametrize("state_format", COMPACT)
def test_state_of_torch_is_loaded(state_format: str) -> None:
    model = mlp(ODD_WIDTHS, dtype=torch.bfloat16)
    theirs = torch.optim.AdamW(model.parameters(), **HYPER)
    train(model, theirs, steps=range(5))
    ours = offload.AdamW(model.parameters(), state_format=state_format, **HYPER)
    ours.load_state_dict(theirs.state_dict())
    for param, master in zip(model.parameters(), masters(model, ours), strict=True):
        assert_same_bits(master, param.detach().float())


def test_a_cleared_state_starts_again() -> None:
    model = mlp(ODD_WIDTHS, dtype=torch.bfloat16)
    optimizer = first_half(model, "int8")
    optimizer.state.clear()
    fresh_model = copy.deepcopy(model)
    fresh = offload.AdamW(fresh_model.parameters(), state_format="int8", **HYPER)
    assert_same_bits(train(model, optimizer), train(fresh_model, fresh))


# ---- errors


def test_unknown_format() -> None:
    with pytest.raises(ValueError, match="state_format='fp8' is unknown; known are fp32, split16, bf16, int8"):
        offload.AdamW([nn.Parameter(torch.ones(4))], state_format="fp8")


def test_seed_of_another_type() -> None:
    with pytest.raises(TypeError, match="rounding_seed must be an int"):
        offload.AdamW([nn.Parameter(torch.ones(4))], rounding_seed=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("state_format", COMPACT)
def test_compact_formats_need_bfloat16_parameters(state_format: str, dtype: torch.dtype) -> None:
    named = [("head.weight", nn.Parameter(torch.ones(4, dtype=dtype)))]
    message = f"state_format='{state_format}' keeps half of each .* parameter head.weight has dtype {dtype}; convert"
    with pytest.raises(ValueError, match=message):
        offload.AdamW(named, state_format=state_format)


@pytest.mark.parametrize("state_format", ["bf16", "int8"])
def test_rounded_formats_have_no_amsgrad(state_format: str) -> None:
    with pytest.raises(ValueError, match=r"amsgrad=True is not available with state_format=.* use state_format='fp32'"):
        OPTIMIZERS["amsgrad"]([nn.Parameter(torch.ones(4).bfloat16())], state_format=state_format)


@pytest.mark.parametrize("state_format", COMPACT)
def test_state_of_another_shape_is_refused(state_format: str) -> None:
    model, other = mlp(ODD_WIDTHS, dtype=torch.bfloat16), mlp((5, 30, 17, 29, 23, 19, 3), dtype=torch.bfloat16)
    optimizer = offload.AdamW(other.parameters(), state_format=state_format)
    with pytest.raises(ValueError, match=r"remainder of parameter 0 .* another model"):
        optimizer.load_state_dict(first_half(model, state_format).state_dict())


def test_state_of_another_rule_is_refused() -> None:
    model = mlp(ODD_WIDTHS, dtype=torch.bfloat16)
    optimizer = offload.Adagrad(model.parameters(), state_format="int8")
    with pytest.raises(ValueError, match=r"lacks \['sum'\] for parameter 0: it is no Adagrad state"):
        optimizer.load_state_dict(first_half(model, "int8").state_dict())
