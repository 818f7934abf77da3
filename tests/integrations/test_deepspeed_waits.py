"""Each wait of the plugin: without it, what is read or left behind is wrong, or a race is reported."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

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
