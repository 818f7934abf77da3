"""Training with the plugin against DeepSpeed with the plainest update there is, bit for bit."""

from __future__ import annotations

import functools
import itertools
import random
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload import Placement
from tests.integrations.deepspeed_training import (
    HYPER,
    WIDTH,
    Model,
    Trained,
    close,
    config,
    engine_of,
    ours,
    reference,
    snapshot,
    tokens_of,
    train,
)
from tests.training import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

STAGES = (1, 2, 3)
DTYPES = ("bf16", "fp16", "fp32")
PLANS: tuple[dict[str, Any], ...] = (
    {"plan": "host"},
    {"plan": "device", "overlap": "backward"},
    {"update_stride": 2, "overlap": "none"},
    {},
)


def trained(configuration: dict[str, Any], model: Any = None, **arguments: Any) -> Trained:
    engine = engine_of(configuration, model, **arguments)
    result = train(engine)
    close(engine)
    return result


@functools.cache
def expected(stage: int, dtype: str = "bf16", clip: float = 0.5, num_micro: int = 1) -> Trained:
    """What DeepSpeed makes of it with the reference update. Call it before an executor is chosen."""
    return trained(reference(config(stage, dtype, clip=clip, num_micro=num_micro)))


def cases() -> list[Any]:
    """Each stage with each dtype; clipping, accumulation and plans take turns, and all of them in slow tests."""
    found = []
    combinations = itertools.product(STAGES, DTYPES, (0.5, 0.0), (1, 4))
    for rank, (stage, dtype, clip, num_micro) in enumerate(combinations):
        marks = [] if rank % 4 == (rank // 4) % 4 else [pytest.mark.slow]
        plan = PLANS[(rank + rank // 4) % 4]
        name = f"stage{stage}-{dtype}-clip{clip}-micro{num_micro}-{plan}"
        found.append(pytest.param(stage, dtype, clip, num_micro, plan, marks=marks, id=name))
    return found


@pytest.mark.parametrize(("stage", "dtype", "clip", "num_micro", "plan"), cases())
def test_losses_and_weights_are_the_references(
    ds: ModuleType, stage: int, dtype: str, clip: float, num_micro: int, plan: dict[str, Any]
) -> None:
    found = config(stage, dtype, clip=clip, num_micro=num_micro)
    assert_same_bits(trained(ours(found, **plan)), expected(stage, dtype, clip, num_micro))


def orders() -> list[Any]:
    """Each stage in each order, with a mode of overlap; by default a quarter of them."""
    found = []
    for rank, (stage, executor, overlap) in enumerate(
        itertools.product((1, 2, 3), ("sync", "lazy", "eager", "random"), ("none", "backward", "next_forward"))
    ):
        by_default = (stage == 3 and overlap == "next_forward") or rank in (4, 15, 17, 23, 25)
        marks = [] if by_default else [pytest.mark.slow]
        found.append(pytest.param(stage, executor, overlap, marks=marks, id=f"stage{stage}-{executor}-{overlap}"))
    return found


@pytest.mark.parametrize(("stage", "executor", "overlap"), orders())
def test_every_order_gives_the_same_bits_and_no_race(ds: ModuleType, stage: int, executor: str, overlap: str) -> None:
    bits = expected(stage)
    ds.configure(executor, seed=stage)
    assert_same_bits(trained(ours(config(stage), update_stride=2, overlap=overlap)), bits)
    assert ds.races() == []


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("overlap", [pytest.param("backward", marks=pytest.mark.slow), "next_forward"])
def test_layers_may_be_frozen_and_thawed_on_the_way(ds: ModuleType, stage: int, overlap: str) -> None:
    def with_frozen(engine: Any) -> Trained:
        """Frozen in steps 1 and 2."""
        result = train(engine, before_step=lambda step: engine.module.layers.requires_grad_(step >= 2))
        close(engine)
        return result

    expected = with_frozen(engine_of(reference(config(stage))))
    ds.configure("lazy")
    assert_same_bits(with_frozen(engine_of(ours(config(stage), plan="device", overlap=overlap))), expected)
    assert ds.races() == []


@pytest.mark.parametrize("stage", [2, 3])
def test_placements_may_change_every_step(ds: ModuleType, stage: int) -> None:
    bits = expected(stage)
    ds.configure("random")
    engine, rng = engine_of(ours(config(stage))), random.Random(0)
    partition = engine.optimizer.offloaded.partition

    def replan(step: int) -> None:
        num = len(partition.runtime.subgroups)
        placements = [rng.choice([Placement.HOST, Placement.DEVICE]) for _ in range(num)]
        order = rng.sample(range(num), num)
        partition.set_plan(offload.lower(placements, num_slots=2, num_staging=2, order=order))

    assert len(partition.runtime.subgroups) > 3
    assert_same_bits(train(engine, before_step=replan), bits)
    assert ds.races() == []
    close(engine)


def test_states_may_be_resident(ds: ModuleType) -> None:
    bits = expected(3)
    ds.configure("random")
    engine = engine_of(ours(config(3), resident_fraction=0.5))
    assert 0 < len(engine.optimizer.offloaded.partition.runtime.homes.residents) < 6
    assert_same_bits(train(engine), bits)
    close(engine)


@pytest.mark.parametrize("stage", STAGES)
def test_overflow_leaves_everything_untouched(ds: ModuleType, stage: int) -> None:
    found = config(stage, "fp16")
    found["fp16"] |= {"initial_scale_power": 40, "hysteresis": 1}  # far beyond fp16
    engine = engine_of(ours(found))
    before = snapshot(engine)
    train(engine, 1)
    assert engine.skipped_steps == 1
    assert_same_bits(snapshot(engine), before)
    offloaded = engine.optimizer.offloaded
    assert [engine.optimizer.optimizer.state[master]["step"] for master in offloaded.masters] == [0] * len(
        offloaded.masters
    )
    assert engine.optimizer.loss_scale < 2**40
    close(engine)


def groups_of(model: Model) -> list[dict[str, Any]]:
    """Matrices and all else, with rates and decays of their own."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "lr": 2e-2}, {"params": others, "weight_decay": 0.0}]


@pytest.mark.parametrize("stage", [2, 3])
def test_groups_have_their_own_rates_and_follow_a_scheduler(ds: ModuleType, stage: int) -> None:
    extra = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [2e-2, 1e-2], "warmup_num_steps": 8}}}
    results = []
    for made in (ours, reference):
        torch.manual_seed(0)
        model = Model()
        results.append(trained(made(config(stage, **extra)), model, model_parameters=groups_of(model)))
    assert_same_bits(*results)


def test_zero_init_and_recomputed_activations(ds: ModuleType) -> None:
    import deepspeed

    results = []
    for made in (ours, reference):
        configuration = made(config(3))
        stock = {key: value for key, value in configuration.items() if key != "interleaved_offload"}
        torch.manual_seed(0)
        with deepspeed.zero.Init(config_dict_or_path=stock):
            model = Model(recompute=True)
        results.append(trained(configuration, model))
    assert_same_bits(*results)


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_go_down_once_and_parameters_up_once(ds: ModuleType, stage: int) -> None:
    """2 bytes each way, a parameter, and nothing that grows with the model beyond them."""
    engine = engine_of(ours(config(stage), plan="host"))
    train(engine, 2)
    numel = sum(subgroup.numel for subgroup in engine.optimizer.offloaded.partition.runtime.subgroups)
    ds.configure()
    engine.backward(engine(tokens_of(2)))
    engine.step()
    engine.optimizer.offloaded.synchronize()
    spans = ds.trace()
    down = [span for span in spans if span.engine == "d2h"]
    up = [span for span in spans if span.engine == "h2d"]
    num_subgroups = len(engine.optimizer.offloaded.partition.runtime.subgroups)
    link = 12e9  # bytes/s of the default profile
    assert sum(s.end_s - s.start_s - 5e-6 for s in down) * link < 2.2 * numel + 8 * len(down)
    assert num_subgroups <= len(up)
    close(engine)


def test_a_client_optimizer_keeps_its_groups(ds: ModuleType) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), **HYPER)
    configuration = ours(config(3))
    del configuration["optimizer"]
    engine = engine_of(configuration, model, optimizer=optimizer)
    assert engine.optimizer.param_groups is optimizer.param_groups
    optimizer.param_groups[0]["lr"] = 0.0
    before = snapshot(engine)[1]
    optimizer.param_groups[0]["weight_decay"] = 0.0
    assert_same_bits(train(engine, 2).masters, before)
    close(engine)


def test_only_adam_can_be_offloaded(ds: ModuleType) -> None:
    model = Model()
    configuration = ours(config(3))
    del configuration["optimizer"]
    configuration["zero_allow_untested_optimizer"] = True
    with pytest.raises(TypeError, match="SGD cannot be offloaded"):
        engine_of(configuration, model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


class WithUnused(Model):
    """Has a layer that the loss depends on in odd micro-batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.num_calls = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.num_calls += 1
        loss = super().forward(tokens)
        return loss + self.unused.weight.sum() + self.unused.bias.sum() if self.num_calls % 2 else loss


@pytest.mark.parametrize(("stage", "num_micro"), [(1, 1), (2, 2)])
def test_unused_parameters_are_an_error_where_that_is_asked_for(ds: ModuleType, stage: int, num_micro: int) -> None:
    """As DeepSpeed has it where it offloads; used in one of a step's micro-batches is used."""
    found = ours(config(stage, num_micro=num_micro))
    found["zero_optimization"]["ignore_unused_parameters"] = False
    engine = engine_of(found, WithUnused())
    train(engine, 1)
    if num_micro == 1:
        with pytest.raises(AssertionError, match="ignore_unused_parameters"):
            train(engine, 1, first=1)
    else:
        train(engine, 1, first=1)
    close(engine)
