"""An update under the next forward: the bits of the update in order, whatever happens between two steps."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import random
import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import offload
from offload import Static, Stride
from offload.plan import Placement
from tests.training import assert_same_bits, loss_of, mlp, random_plan, snapshot, state_snapshot, train

pytestmark = pytest.mark.usefixtures("one_torch_thread")

OVERLAPS: tuple[Any, ...] = ("backward", "next_forward")
EARLY: dict[str, Any] = {"overlap": "next_forward", "early_gradients": True}
WAYS: tuple[dict[str, Any], ...] = ({"overlap": "backward"}, {"overlap": "next_forward"}, EARLY)
PLANS = ("host", "device", Stride(2), Static(0.5))
HYPER: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "subgroup_numel": 600}
VOCABULARY, WIDTH, LENGTH = 40, 16, 8
LOSS_SCALE = 2.0**19  # overflows in the first steps of float16, not in all of five


class Layer(nn.Module):
    """One block of a small language model; its attention reads a parameter of a module that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.mlp(x + self.attention(y, y, y, need_weights=False)[0])


class LanguageModel(nn.Module):
    """Embedding and output projection are one parameter; the last layer is called twice."""

    def __init__(self, *, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in (*self.layers, self.layers[-1]):
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return self.head(x)


def language_model(*, recompute: bool = False, dtype: torch.dtype = torch.float32) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(recompute=recompute).to(dtype).to("sim")


def loss_of_tokens(model: LanguageModel, seed: int) -> Tensor:
    tokens = torch.randint(VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(seed)).to("sim")
    return F.cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; not where and when its updates run."""

    dtype: torch.dtype = torch.float32
    clip: bool = False
    num_micro_batches: int = 1
    recompute: bool = False

    @property
    def may_update_in_backward(self) -> bool:
        return not self.clip and self.dtype != torch.float16

    def train(
        self, num_steps: int, *, in_backward: bool = False, **arguments: Any
    ) -> tuple[list[Tensor], dict[str, Tensor], Any]:
        """Losses, parameters and optimizer state. float16 is autocast's, and its loss scale overflows at first.

        ``in_backward``: the update begins in the last micro-batch's backward.
        """
        autocast = self.dtype == torch.float16
        model = language_model(recompute=self.recompute, dtype=torch.float32 if autocast else self.dtype)
        optimizer = offload.AdamW(model.parameters(), **HYPER, **arguments)
        scaler = torch.amp.GradScaler("sim", init_scale=LOSS_SCALE, growth_interval=3, enabled=autocast)
        losses = []
        for step in range(num_steps):
            optimizer.zero_grad()
            for micro_batch in range(self.num_micro_batches):
                with torch.autocast("sim", torch.float16, enabled=autocast):
                    loss = loss_of_tokens(model, 100 * step + micro_batch) / self.num_micro_batches
                is_last = micro_batch == self.num_micro_batches - 1
                with optimizer.update_in_backward() if in_backward and is_last else nullcontext():
                    scaler.scale(loss).backward()
                losses.append(loss.detach())
            scaler.unscale_(optimizer)
            if self.clip:
                optimizer.clip_grad_norm_(0.5)
            scaler.step(optimizer)
            scaler.update()
        trained = [loss.cpu() for loss in losses], snapshot(model), state_snapshot(optimizer)
        num_done = {int(step) for (_, name), step in trained[2].items() if name == "step"}
        assert not autocast or num_done < {*range(1, num_steps)}, "steps must be skipped, not all of them"
        return trained


RECIPES = [
    Recipe(*values)
    for values in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), (False, True), (1, 4), (False, True)
    )
]


EXECUTORS = ("lazy", "eager", "random")


def check_recipe(
    recipe: Recipe, num_steps: int, ways: Iterable[tuple[dict[str, Any], Any, str, bool]], sim: ModuleType
) -> None:
    """Train in each of ``ways``: options, plan, executor of the emulated device, and whether in backward."""
    sim.configure("sync")
    expected = recipe.train(num_steps, plan="host", overlap="none")
    for options, plan, executor, in_backward in ways:
        sim.configure(executor, seed=num_steps)
        trained = recipe.train(num_steps, plan=plan, in_backward=in_backward, **options)
        assert_same_bits(trained, expected, f"{options}, {plan}, {executor}, in_backward={in_backward}")
        assert sim.races() == []


@pytest.mark.parametrize(("recipe", "left_out"), [(RECIPES[0], 0), (RECIPES[11], 1), (RECIPES[22], 2)], ids=str)
def test_overlapped_is_as_in_order(recipe: Recipe, left_out: int, sim: ModuleType) -> None:
    """Each way on two of the three executors, other two with each recipe."""
    ways = [
        (options, Stride(2), executor, False)
        for (i, options), (j, executor) in itertools.product(enumerate(WAYS), enumerate(EXECUTORS))
        if (i + j) % 3 != left_out
    ]
    check_recipe(recipe, 5, ways, sim)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_overlapped_is_as_in_order_at_length(recipe: Recipe, sim: ModuleType) -> None:
    """All modes and placements; executors take turns."""
    modes = [
        (options, plan, in_backward)
        for options, plan, in_backward in itertools.product(WAYS, PLANS, (False, True))
        if recipe.may_update_in_backward or not in_backward
        if options is not EARLY or (plan != "device" and not in_backward)
    ]
    ways = [
        (options, plan, executor, in_backward)
        for (options, plan, in_backward), executor in zip(modes, itertools.cycle(EXECUTORS), strict=False)
    ]
    check_recipe(recipe, 50, ways, sim)


@cache
def four_steps_in_order() -> object:
    return Recipe().train(4, plan="host", overlap="none")


@pytest.mark.parametrize("options", WAYS, ids=["backward", "next_forward", "early gradients"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("executor", ["sync", "lazy", "eager", "random", "threads"])
def test_no_race_in_any_order(executor: str, plan: Any, options: dict[str, Any], sim: ModuleType) -> None:
    if options is EARLY and plan == "device":
        return  # no gradient goes down, so that is refused
    expected = four_steps_in_order()
    sim.configure(executor, seed=3)
    assert_same_bits(Recipe().train(4, plan=plan, **options), expected)
    assert sim.races() == []


def test_plans_change_between_overlapped_steps(sim: ModuleType) -> None:
    sim.configure("lazy")
    results = []
    for seed, options in enumerate(({"overlap": "none"}, *WAYS)):
        model = mlp(device="sim")
        optimizer = offload.AdamW(model.parameters(), plan="auto", **options, **HYPER)
        rng = random.Random(seed)
        replan: Callable[[int], object] = lambda step: optimizer.set_plan(random_plan(optimizer, rng))  # noqa: B023, E731
        results.append((train(model, optimizer, before_step=replan), state_snapshot(optimizer)))
    for result in results[1:]:
        assert_same_bits(result, results[0])
    assert sim.races() == []


# ---- what happens between two steps


class Pair(nn.Module):
    """Two of three linear layers, as the caller says."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, which: tuple[int, ...]) -> Tensor:
        for i in which:
            x = self.parts[i](x).tanh()
        return x


Between = Callable[[nn.Module, offload.AdamW], object]


def evaluate(model: nn.Module, _: offload.AdamW) -> Tensor:
    with torch.no_grad():
        return model(torch.ones(2, 8, device="sim"), (2, 1, 0)).cpu()


def fail_in_forward(model: nn.Module, _: offload.AdamW) -> None:
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 7, device="sim"), (1,))


def average(model: nn.Module, _: offload.AdamW) -> list[Tensor]:
    averaged = [torch.zeros_like(param.detach()) for param in model.parameters()]
    with torch.no_grad():
        torch._foreach_lerp_(averaged, list(model.parameters()), 0.5)
    return [tensor.cpu() for tensor in averaged]


def save(model: nn.Module, _: offload.AdamW) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return {name: value.cpu() for name, value in torch.load(file, weights_only=True).items()}


def edit(model: nn.Module, _: offload.AdamW) -> None:
    with torch.no_grad():
        model.parts[0].weight.mul_(0.5)  # type: ignore[index, union-attr, operator]
        model.parts[2].bias.data.fill_(0.25)  # type: ignore[index, union-attr]


def read_on_a_side_stream(model: nn.Module, _: offload.AdamW) -> list[Tensor]:
    side = torch.Stream("sim")
    side.wait_stream(torch.accelerator.current_stream())
    with side:
        copies = [param.detach().clone() for param in model.parameters()]
    side.synchronize()
    return [tensor.cpu() for tensor in copies]


BETWEEN: dict[str, Between] = {
    "nothing": lambda model, optimizer: None,
    "evaluation": evaluate,
    "exception": fail_in_forward,
    "moving average": average,
    "torch.save": save,
    "edit of parameters": edit,
    "optimizer's state_dict": lambda model, optimizer: state_snapshot(optimizer),
    "load_state_dict": lambda model, optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "param_groups": lambda model, optimizer: optimizer.param_groups[0].update(lr=3e-3),
    "zeroed in place": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "zeroed by the model": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "gradient norm": lambda model, optimizer: torch.nn.utils.get_total_norm(
        [param.grad for param in model.parameters() if param.grad is not None]
    ).cpu(),
    "synchronize": lambda model, optimizer: optimizer.synchronize(),
    "deepcopy of the optimizer": lambda model, optimizer: copy.deepcopy(optimizer) and None,
    "side stream": read_on_a_side_stream,
    "new group": lambda model, optimizer: (
        len(optimizer.param_groups) == 1
        and optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, device="sim"))]})
    ),
}


def train_with(between: Between, overlap: str) -> tuple[list[Any], Any]:
    torch.manual_seed(1)
    model = Pair().to("sim")
    optimizer = offload.AdamW(model.parameters(), plan=Stride(2), overlap=overlap, lr=1e-2, subgroup_numel=64)  # type: ignore[arg-type]
    seen: list[Any] = []
    for step, which in enumerate([(0, 1, 2), (0, 1), (1, 2), (2, 2), (0, 1, 2)]):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to("sim")
        model(x, which).square().mean().backward()
        optimizer.step()
        seen.append(between(model, optimizer))
        optimizer.zero_grad()
    return [value for value in seen if value is not None], (snapshot(model), state_snapshot(optimizer))


train_in_order_with = cache(partial(train_with, overlap="none"))


@pytest.mark.parametrize("executor", ["lazy", "eager", "random"])
@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_what_comes_between_two_steps(between: Between, executor: str, sim: ModuleType) -> None:
    expected = train_in_order_with(between)
    for overlap in OVERLAPS:
        sim.configure(executor, seed=1)
        seen, trained = train_with(between, overlap)
        assert repr(seen) == repr(expected[0])
        assert_same_bits(trained, expected[1])
        assert sim.races() == []


def test_two_models_wait_for_their_own(sim: ModuleType) -> None:
    sim.configure("lazy")
    models = [mlp(device="sim", seed=seed) for seed in (1, 2)]
    optimizers = [offload.AdamW(m.parameters(), plan="host", overlap="next_forward", **HYPER) for m in models]
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            (loss_of(model, step) + 0.1 * loss_of(models[0], step)).backward()
            optimizer.step()
    assert sim.races() == []


def step_into_flight(model: nn.Sequential, optimizer: offload.AdamW, step: int) -> None:
    """Nothing reads a parameter after it."""
    optimizer.zero_grad()
    loss_of(model, step).backward()
    optimizer.step()


@pytest.fixture
def trained(sim: ModuleType) -> tuple[nn.Sequential, offload.AdamW]:
    """In flight: an overlapped step has just begun."""
    sim.configure("lazy")
    model = mlp(device="sim")
    optimizer = offload.AdamW(model.parameters(), plan=Stride(2), overlap="next_forward", **HYPER)
    for step in range(2):
        step_into_flight(model, optimizer, step)
    return model, optimizer


def test_the_training_stream_waits_too_where_another_reads_first(trained: tuple[nn.Sequential, offload.AdamW]) -> None:
    from offload.testing import sim

    model, optimizer = trained
    side = torch.Stream("sim")
    side.wait_stream(torch.accelerator.current_stream())
    with side:
        copies = [param.detach().clone() for param in model.parameters()]
    loss_of(model, 2).backward()
    torch.accelerator.synchronize()
    assert all(torch.isfinite(copied).all() for copied in copies)
    assert sim.races() == []
    optimizer.synchronize()


def test_who_reads_a_parameter_is_later_than_its_update(sim: ModuleType) -> None:
    """In virtual time: a host thread that waits for the conductor goes on no earlier than that."""
    sim.configure("sync")
    model = mlp(device="sim")
    optimizer = offload.AdamW(model.parameters(), plan="host", overlap="next_forward", **HYPER)
    for step in range(2):
        step_into_flight(model, optimizer, step)
    for param in model.parameters():
        param.detach()
    now_s = sim.host_time_s()
    assert now_s >= max(span.end_s for span in sim.trace() if span.engine == "host")


# ---- memory, life-times, errors


def test_gradients_are_freed_as_the_forward_goes(trained: tuple[nn.Sequential, offload.AdamW]) -> None:
    model, optimizer = trained
    optimizer.synchronize()
    optimizer.zero_grad()
    torch.accelerator.synchronize()
    without = torch.accelerator.memory_allocated()
    loss_of(model, 2).backward()
    torch.accelerator.synchronize()
    with_gradients = torch.accelerator.memory_allocated()
    optimizer.step()
    optimizer.zero_grad()
    assert torch.accelerator.memory_allocated() >= with_gradients
    seen = []
    for param in model.parameters():
        param.detach()
        seen.append(torch.accelerator.memory_allocated())
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == without


def test_an_optimizer_dropped_in_flight_lands(sim: ModuleType) -> None:
    sim.configure("lazy")
    model = mlp(device="sim")
    expected = mlp(device="sim")
    train(expected, offload.AdamW(expected.parameters(), plan=Stride(2), overlap="none", **HYPER), steps=range(3))
    others = set(threading.enumerate())
    optimizer = offload.AdamW(model.parameters(), plan=Stride(2), overlap="next_forward", **HYPER)
    allocated = torch.accelerator.memory_allocated()
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    model.zero_grad()
    del optimizer
    gc.collect()
    assert_same_bits(snapshot(model), snapshot(expected))
    assert all(type(param) is nn.Parameter for param in model.parameters())
    for thread in set(threading.enumerate()) - others:
        if thread.name.startswith(("offload-landing", "offload-conductor")):
            thread.join()  # they end by themselves, and let go of slots and states only then
    assert torch.accelerator.memory_allocated() < allocated
    assert sim.races() == []


def test_a_failed_update_is_an_error_for_whoever_reads(
    trained: tuple[nn.Sequential, offload.AdamW], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained
    optimizer.synchronize()
    monkeypatch.setattr("offload.adam.PreparedUpdate.__call__", None)
    monkeypatch.setattr("offload.adam.update", None)
    loss_of(model, 3).backward()
    optimizer.step()
    with pytest.raises(TypeError):
        loss_of(model, 4)
    with pytest.raises(RuntimeError, match="an earlier step failed half way"):
        optimizer.step()
    assert all(type(param) is nn.Parameter for param in model.parameters())
    assert all(param.grad is None or type(param.grad) is Tensor for param in model.parameters())


def test_a_timed_step_runs_in_order(trained: tuple[nn.Sequential, offload.AdamW]) -> None:
    model, optimizer = trained
    optimizer.time_next_step()
    train(model, optimizer, steps=range(2, 3))
    assert all(type(param) is nn.Parameter for param in model.parameters())
    assert {span.name[0] for span in optimizer.timeline()} == set("DCUPGF")


def test_auto_overlaps_on_an_accelerator_only(sim: ModuleType) -> None:
    for device, overlap in (("cpu", "none"), ("sim", "next_forward")):
        assert offload.AdamW(mlp(device=device).parameters()).runtime.options.overlap == overlap


def test_on_the_cpu_it_overlaps_when_asked_to() -> None:
    results = []
    for overlap in ("none", "next_forward"):
        model = mlp()
        optimizer = offload.AdamW(model.parameters(), overlap=overlap, **HYPER)  # type: ignore[arg-type]
        results.append((train(model, optimizer), state_snapshot(optimizer)))
    assert_same_bits(results[1], results[0])


def test_unknown_overlap() -> None:
    with pytest.raises(ValueError, match=r"overlap='always' is none of \('auto', 'none', 'backward', 'next_forward'\)"):
        offload.AdamW(mlp().parameters(), overlap="always")  # type: ignore[arg-type]


def test_resident_and_visiting_states_update_on_a_stream_of_their_own(sim: ModuleType) -> None:
    sim.configure("sync")
    model = mlp(device="sim")
    optimizer = offload.AdamW(model.parameters(), plan=Static(0.5), overlap="next_forward", **HYPER)
    assert Placement.RESIDENT in optimizer.plan.placements.values()
    train(model, optimizer, steps=range(2))
    assert sim.races() == []
