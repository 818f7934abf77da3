"""Each wait of the plugin: without it, what is read or left behind is wrong, or a race is reported."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload.pending import PendingParameter, PendingTensor
from offload.runtime import Runtime
from tests.integrations.deepspeed_training import close, config, engine_of, ours, tokens_of, train
from tests.training import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

Access = Callable[[Any, dict[str, Any]], list[Tensor]]


def states_at_rest(engine: Any) -> list[Tensor]:
    partition = engine.optimizer.offloaded.partition
    partition.synchronize()
    return [state.clone() for state in partition.states]


def saved(engine: Any, earlier: dict[str, Any]) -> list[Tensor]:
    return [flat.detach().clone() for flat in engine.optimizer.state_dict()["fp32_flat_groups"]]


def read(engine: Any, earlier: dict[str, Any]) -> list[Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return [safe_get_full_fp32_param(param).cpu().clone() for param in engine.module.parameters()]


def refreshed(engine: Any, earlier: dict[str, Any]) -> list[Tensor]:
    engine.optimizer.refresh_fp32_params()
    return states_at_rest(engine)


def loaded(engine: Any, earlier: dict[str, Any]) -> list[Tensor]:
    engine.optimizer.load_state_dict([earlier])
    return states_at_rest(engine)


@pytest.mark.parametrize(
    ("stage", "access"),
    [(3, saved), (3, read), (3, refreshed), (3, loaded), (2, read), pytest.param(1, read, marks=pytest.mark.slow)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_states_in_flight_are_waited_for(
    ds: ModuleType, stage: int, access: Access, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offload.integrations.deepspeed.update import ShardUpdate

    found = []
    for waits in (True, False):
        ds.configure("lazy")
        engine = engine_of(ours(config(stage), plan="device"))
        train(engine, 1)
        engine.optimizer.offloaded.synchronize()
        earlier = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), engine.optimizer.state_dict())
        with monkeypatch.context() as patch:
            if not waits:
                patch.setattr(ShardUpdate, "synchronize", lambda self: None)
            for micro_step in (1, 2):
                engine.backward(engine(tokens_of(micro_step)))
                engine.step()
            found.append(access(engine, earlier))
        engine.optimizer.offloaded.synchronize()
        close(engine)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(found[1], found[0])


@pytest.mark.parametrize("stage", [2, 3])
def test_a_missing_wait_of_the_update_is_reported(ds: ModuleType, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters must not be read before they are up: the wait is the core's, the reader DeepSpeed's."""
    from offload.lanes.accelerator import StreamLane

    engine = engine_of(ours(config(stage), plan="device"))
    train(engine, 1)
    assert ds.races() == []
    monkeypatch.setattr(StreamLane, "_wait", staticmethod(lambda stream, event: None))
    train(engine, 2, first=1)
    assert ds.races()
    close(engine)


class OneMatrix(nn.Module):
    """Aligned, so that DeepSpeed pads nothing and our gradient is the very buffer that it reduces into."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(64, 64))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.matrix[tokens].float().square().mean()


@pytest.mark.parametrize(
    "executor", ["lazy", "random", *(pytest.param(e, marks=pytest.mark.slow) for e in ("eager", "sync"))]
)
def test_memory_of_reduced_gradients_is_reused_in_order(ds: ModuleType, executor: str) -> None:
    """It belongs to DeepSpeed's stream, which waits for the current one before it takes it again."""
    ds.configure(executor)
    for stage in (1, 2):
        engine = engine_of(ours(config(stage), update_stride=2), OneMatrix())
        train(engine, 3)
        assert ds.races() == []
        close(engine)


def readers(engine: Any) -> list[Tensor]:
    """What the next forward reads parameters through."""
    return [getattr(param, "ds_tensor", param) for param in engine.module.parameters()]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_returns_before_its_update_is_done(ds: ModuleType, stage: int) -> None:
    """Also where DeepSpeed keeps small parameters gathered: they are gathered by the modules that read them."""
    found = config(stage)
    del found["zero_optimization"]["stage3_param_persistence_threshold"]
    ds.configure("lazy")
    engine = engine_of(ours(found, update_stride=2))
    train(engine, 1)
    assert stage == 2 or engine.optimizer.persistent_parameters
    engine.backward(engine(tokens_of(1)))
    engine.step()
    assert {type(tensor) for tensor in readers(engine)} <= {PendingTensor, PendingParameter}
    train(engine, 1, first=2)
    assert ds.races() == []
    close(engine)


@pytest.mark.parametrize(
    ("stage", "kept"),
    [(3, "gradients"), (3, "parameters"), (2, "parameters"), pytest.param(1, "parameters", marks=pytest.mark.slow)],
)
def test_a_reader_that_does_not_wait_is_reported(
    ds: ModuleType, stage: int, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the aliases of ``kept`` missing among those that are pending, DeepSpeed reads or writes too early."""
    from deepspeed.utils import safe_set_full_grad

    from offload.integrations.deepspeed.partition import FlatPartition

    by_subgroup = FlatPartition._by_subgroup

    def without(self: FlatPartition, aliases: Any) -> Any:
        read = {id(tensor) for tensor in readers(engine)}
        are_read = kept == "parameters"
        left = [[alias for alias in group if (id(alias.tensor) in read) != are_read] for group in aliases]
        return by_subgroup(self, left)

    ds.configure("lazy")
    engine = engine_of(ours(config(stage), plan="device"))
    train(engine, 1)
    assert ds.races() == []
    monkeypatch.setattr(FlatPartition, "_by_subgroup", without)
    for micro_step in (1, 2):
        engine.backward(engine(tokens_of(micro_step)))
        engine.step()
        if kept == "gradients":  # forward waits for all that gets a gradient: left is who sets one by himself
            for param in engine.module.parameters():
                safe_set_full_grad(param, torch.ones(param.ds_shape, device="sim"))
    assert ds.races()
    close(engine)


def test_ranks_gather_parameters_that_are_updated(ds: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages 1 and 2 with other ranks, which a loopback group stands for: their gathering must find new parameters."""
    from offload.integrations.deepspeed.stage12 import OffloadedStage12
    from offload.integrations.deepspeed.update import ShardUpdate

    monkeypatch.setattr(OffloadedStage12, "_gathers", True)
    for waits in (True, False):
        ds.configure("lazy")
        engine = engine_of(ours(config(2), plan="device"))
        train(engine, 1)
        if not waits:
            monkeypatch.setattr(ShardUpdate, "finish", lambda self: None)
        train(engine, 2, first=1)
        assert bool(ds.races()) != waits
        close(engine)


@pytest.mark.parametrize("waits", [True, False])
def test_a_gradient_that_is_set_after_it_went_down_goes_again(
    ds: ModuleType, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.utils import safe_set_full_grad

    if not waits:
        monkeypatch.setattr(Runtime, "before_gradient", lambda self, index: None)
    found, went_down = [], []
    for overlap in ("none", "backward"):
        ds.configure("lazy")
        engine = engine_of(ours(config(3), plan="host", overlap=overlap))
        begun = engine.optimizer.offloaded.partition.runtime._early

        def set_gradients(step: int, engine: Any = engine, begun: Any = begun) -> None:
            went_down.append(len(begun._begun))
            for param in engine.module.parameters():
                safe_set_full_grad(param, torch.full(param.ds_shape, 0.5 + step, device="sim"))

        found.append(train(engine, 3, before_step=set_gradients))
        close(engine)
        assert ds.races() == [] or not waits
    assert went_down == [0, 0, 0, 0, 2, 2]  # how many gradients a step has is what the one before had
    assert bool(ds.races()) != waits
    if waits:
        assert_same_bits(found[1], found[0])
