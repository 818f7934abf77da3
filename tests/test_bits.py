"""Placement, kernel and thread count never change training: every loss and weight is equal bit for bit.

The reference is the torch kernel (the definition of the update in plain torch operations), parameter by parameter and
in order. Over float32 parameters it is in turn compared with torch's own fused CPU kernels. Those finish the last
``numel % 16`` elements of a tensor in a loop that the compiler contracts differently, so that comparison needs
parameters whose numel is a multiple of 16; all others use odd sizes too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload import Static, Stride
from offload.kernels import available_implementations, set_num_threads, use_implementation
from tests.training import (
    NUM_STEPS,
    ODD_WIDTHS,
    WIDTHS,
    TiedModel,
    Trained,
    assert_same_bits,
    loss_of,
    mlp,
    replan_every_step,
    snapshot,
    state_snapshot,
    train,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HYPER = {"lr": 3e-3, "betas": (0.8, 0.97), "weight_decay": 0.05}
SUBGROUP_NUMEL = 200  # several subgroups of either model, some of one parameter and some of more
pytestmark = pytest.mark.usefixtures("one_torch_thread")

KERNELS = ("avx512", "avx2", "scalar", "numba", "torch")


@functools.cache
def reference(dtype: torch.dtype, widths: tuple[int, ...] = ODD_WIDTHS) -> Trained:
    """All on the CPU, in order, one subgroup for each parameter, by the torch kernel."""
    model = mlp(widths, dtype=dtype)
    with use_implementation("torch"):
        return train(model, offload.AdamW(model.parameters(), plan="host", subgroup_numel=1, **HYPER))


@pytest.fixture
def split_small_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads share even these small subgroups: in chunks of 64 elements."""
    monkeypatch.setattr("offload.kernels.threads.MIN_PARALLEL_NUMEL", 64)
    monkeypatch.setattr("offload.kernels.native.CHUNK_NUMEL", 64)
    yield
    set_num_threads(None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "plan", ["auto", "host", "device", Stride(1), Stride(2), Stride(3), Static(0.0), Static(0.4), Static(1.0)], ids=str
)
def test_placements_give_the_same_bits(plan: Any, dtype: torch.dtype) -> None:
    model = mlp(ODD_WIDTHS, dtype=dtype)
    optimizer = offload.AdamW(model.parameters(), plan=plan, subgroup_numel=SUBGROUP_NUMEL, **HYPER)
    assert len(optimizer.runtime.subgroups) >= 4
    assert_same_bits(train(model, optimizer), reference(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_placements_may_change_every_step(seed: int, dtype: torch.dtype) -> None:
    model = mlp(ODD_WIDTHS, dtype=dtype)
    optimizer = offload.AdamW(model.parameters(), plan=Stride(1), subgroup_numel=SUBGROUP_NUMEL, **HYPER)
    assert_same_bits(train(model, optimizer, before_step=replan_every_step(optimizer, seed)), reference(dtype))


@pytest.mark.parametrize("num_slots", [1, 2, 5])
def test_number_of_slots_does_not_matter(num_slots: int) -> None:
    model = mlp(ODD_WIDTHS)
    optimizer = offload.AdamW(
        model.parameters(), plan=Stride(1), subgroup_numel=SUBGROUP_NUMEL, num_slots=num_slots, **HYPER
    )
    trained = train(model, optimizer, before_step=replan_every_step(optimizer, num_slots))
    assert_same_bits(trained, reference(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.usefixtures("split_small_work")
def test_kernels_and_threads_give_the_same_bits(kernel: str, num_threads: int, dtype: torch.dtype) -> None:
    if kernel not in available_implementations():
        pytest.skip(f"this machine has no {kernel} kernel")
    set_num_threads(num_threads)
    model = mlp(ODD_WIDTHS, dtype=dtype)
    optimizer = offload.AdamW(model.parameters(), plan=Stride(2), subgroup_numel=SUBGROUP_NUMEL, **HYPER)
    with use_implementation(kernel):
        assert_same_bits(train(model, optimizer), reference(dtype))


@pytest.mark.parametrize("num_threads", [1, 2])
def test_threads_at_full_size(num_threads: int) -> None:
    """Large enough to be shared between threads without help, by the kernel that is the default here."""
    values = torch.randn(2**20 + 4096, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(values.clone()), nn.Parameter(values.clone())
    optimizer = offload.AdamW([ours], **HYPER)
    torch_optimizer = torch.optim.AdamW([theirs], fused=True, **HYPER)
    set_num_threads(num_threads)
    try:
        for step in range(3):
            ours.grad = theirs.grad = torch.sin(values * (step + 1))
            optimizer.step()
            torch_optimizer.step()
    finally:
        set_num_threads(None)
    assert_same_bits(ours.data, theirs.data)
    assert_same_bits(state_snapshot(optimizer), state_snapshot(torch_optimizer))


# ---- against torch's own fused kernels

CLASSES = ((offload.AdamW, torch.optim.AdamW), (offload.Adam, torch.optim.Adam))
TORCH_CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "weight_decay": {"weight_decay": 0.1},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.1},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "amsgrad_maximize": {"amsgrad": True, "maximize": True},
    "small_betas": {"betas": (0.3, 0.5), "eps": 1e-3},
    "no_momentum": {"betas": (0.0, 0.0)},
    "tensor_lr": {"lr": torch.tensor(2e-3)},
    "no_lr": {"lr": 0.0},
}


@pytest.mark.parametrize("case", TORCH_CASES)
@pytest.mark.parametrize(("our_class", "torch_class"), CLASSES, ids=["AdamW", "Adam"])
def test_equals_torch(our_class: Any, torch_class: Any, case: str) -> None:
    kwargs = TORCH_CASES[case]
    ours, theirs = mlp(), mlp()
    optimizer = our_class(ours.parameters(), plan=Stride(2), subgroup_numel=SUBGROUP_NUMEL, **kwargs)
    torch_optimizer = torch_class(theirs.parameters(), fused=True, **kwargs)
    assert_same_bits(train(ours, optimizer), train(theirs, torch_optimizer))
    assert_same_bits(state_snapshot(optimizer), state_snapshot(torch_optimizer))


def test_reference_equals_torch() -> None:
    model = mlp()
    trained = train(model, torch.optim.AdamW(model.parameters(), fused=True, **HYPER))
    assert_same_bits(trained, reference(torch.float32, WIDTHS))


def both_optimizers(ours: Any, theirs: Any, **kwargs: Any) -> tuple[offload.AdamW, torch.optim.AdamW]:
    """Ours over several subgroups on both sides, and torch's."""
    kwargs = {**HYPER, **kwargs}
    optimizer = offload.AdamW(ours, plan=Stride(2), subgroup_numel=SUBGROUP_NUMEL, **kwargs)
    return optimizer, torch.optim.AdamW(theirs, fused=True, **kwargs)


def groups_of(model: nn.Sequential) -> list[dict[str, Any]]:
    """Weights and biases apart, with different hyper-parameters of every kind."""
    params = list(model.parameters())
    return [
        {"params": params[0:4:2], "lr": 1e-2, "weight_decay": 0.2},
        {"params": params[1::2], "weight_decay": 0.0, "betas": (0.5, 0.9)},
        {"params": params[4::2], "eps": 1e-4, "amsgrad": True, "maximize": True},
    ]


def test_groups_with_different_hyper_parameters_equal_torch() -> None:
    ours, theirs = mlp(), mlp()
    optimizer, torch_optimizer = both_optimizers(groups_of(ours), groups_of(theirs))
    assert_same_bits(train(ours, optimizer), train(theirs, torch_optimizer))
    assert_same_bits(state_snapshot(optimizer), state_snapshot(torch_optimizer))


SCHEDULERS = {
    "one_cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=NUM_STEPS),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=7),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3)], ids=["float", "tensor"])
def test_learning_rate_schedules_equal_torch(name: str, lr: Any) -> None:
    trained = []
    models = mlp(), mlp()
    optimizers = both_optimizers(models[0].parameters(), models[1].parameters(), lr=lr)
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.param_groups[0]["lr"] = lr.clone() if isinstance(lr, torch.Tensor) else lr
        scheduler = SCHEDULERS[name](optimizer)
        trained.append([])
        for step in range(NUM_STEPS):
            trained[-1].append(train(model, optimizer, steps=range(step, step + 1)))
            if step + 1 < NUM_STEPS:
                scheduler.step()
    assert_same_bits(*trained)


def test_frozen_and_unused_parameters_keep_their_own_step_counts() -> None:
    """As in torch, a parameter without a gradient is not touched and its bias correction does not advance."""
    trained = []
    models = mlp(), mlp()
    for model in models:
        model[2].requires_grad_(False)
    optimizers = both_optimizers(models[0].parameters(), models[1].parameters())
    for model, optimizer in zip(models, optimizers, strict=True):

        def drop_some(step: int, model: nn.Sequential = model) -> None:
            if step % 3 == 0:
                model[0].weight.grad = None
            if step % 5 < 2:
                model[4].bias.grad = None

        trained.append(train(model, optimizer, before_step=drop_some))
    assert_same_bits(*trained)
    ours, theirs = map(state_snapshot, optimizers)
    assert_same_bits(ours, theirs)
    assert {float(value) for (_, name), value in ours.items() if name == "step"} == {13.0, 12.0, 20.0}


def test_gradient_accumulation_equals_torch() -> None:
    models = mlp(), mlp()
    optimizers = both_optimizers(models[0].parameters(), models[1].parameters())
    for model, optimizer in zip(models, optimizers, strict=True):
        for step in range(NUM_STEPS):
            loss_of(model, step).backward()
            if step % 4 == 3:
                optimizer.step()
                optimizer.zero_grad(set_to_none=step % 8 == 3)
    assert_same_bits(*map(snapshot, models))


def test_closures_equal_torch() -> None:
    models = mlp(), mlp()
    losses = []
    optimizers = both_optimizers(models[0].parameters(), models[1].parameters())
    for model, optimizer in zip(models, optimizers, strict=True):

        def closure(model: nn.Sequential = model, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            return loss

        losses.append([optimizer.step(closure).detach() for _ in range(NUM_STEPS)])
    assert_same_bits(*losses)
    assert_same_bits(*map(snapshot, models))


def test_tied_parameters_equal_torch() -> None:
    tokens = torch.arange(32)
    trained = []
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(TiedModel())
    optimizers = both_optimizers(models[0].parameters(), models[1].parameters())
    for model, optimizer in zip(models, optimizers, strict=True):
        for step in range(NUM_STEPS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(tokens), tokens.roll(step)).backward()
            optimizer.step()
        assert model.head.weight is model.embedding.weight
        trained.append(snapshot(model))
    assert_same_bits(*trained)
    assert len(optimizers[0].state) == 3  # the shared parameter has one state
