"""Checkpoints in DeepSpeed's own format: from DeepSpeed to the plugin and back."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.integrations.deepspeed_training import (
    HYPER,
    close,
    config,
    engine_of,
    ours,
    reference,
    snapshot,
    train,
)
from tests.training import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

STAGES = (1, 2, 3)


def stock_offload(found: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's own offloading of the same training, with torch's Adam on the CPU."""
    found["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    params = {**HYPER, "torch_adam": True}
    return {**found, "optimizer": {"type": "AdamW", "params": params}, "zero_force_ds_cpu_optimizer": False}


def states_of(engine: Any) -> list[tuple[torch.Tensor, ...]]:
    optimizer = engine.optimizer
    optimizer.offloaded.synchronize()
    entries = [optimizer.optimizer.state[master] for master in optimizer.offloaded.masters]
    return [(torch.tensor(float(e["step"])), e["exp_avg"].clone(), e["exp_avg_sq"].clone()) for e in entries]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("executor", ["lazy", pytest.param("sync", marks=pytest.mark.slow)])
def test_a_run_goes_on_where_it_was_saved(ds: ModuleType, stage: int, executor: str, tmp_path: Path) -> None:
    """Also under another plan, and with every state still in flight when it is saved."""
    ds.configure(executor)
    through = engine_of(ours(config(stage), plan="device"))
    train(through, 2)
    through.save_checkpoint(tmp_path)
    expected, states = train(through, 2, first=2), states_of(through)
    resumed = engine_of(ours(config(stage), update_stride=2))
    resumed.load_checkpoint(tmp_path)
    assert_same_bits(train(resumed, 2, first=2), expected)
    assert_same_bits(states_of(resumed), states)
    assert ds.races() == []
    close(through)
    close(resumed)


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        (3, "bf16"),
        (2, "fp16"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, "bf16"), (1, "fp16"), (2, "bf16"), (3, "fp16")]),
    ],
)
def test_from_deepspeed_to_the_plugin_and_back(ds: ModuleType, stage: int, dtype: str, tmp_path: Path) -> None:
    """With the reference's arithmetic in DeepSpeed all along, the weights are the same as without any change."""
    through = engine_of(reference(config(stage, dtype)))
    expected = train(through, 6)
    close(through)

    before = engine_of(reference(config(stage, dtype)))
    train(before, 2)
    before.save_checkpoint(tmp_path / "a")
    close(before)
    here = engine_of(ours(config(stage, dtype)))
    here.load_checkpoint(tmp_path / "a")
    train(here, 2, first=2)
    here.save_checkpoint(tmp_path / "b")
    close(here)
    after = engine_of(reference(config(stage, dtype)))
    after.load_checkpoint(tmp_path / "b")
    finished = train(after, 2, first=4)
    assert_same_bits((finished.params, finished.masters), (expected.params, expected.masters))
    close(after)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_deepspeeds_own_offloading_loads_ours(ds: ModuleType, stage: int, tmp_path: Path) -> None:
    here = engine_of(ours(config(stage)))
    train(here, 2)
    here.save_checkpoint(tmp_path / "a")
    saved = snapshot(here)
    close(here)
    stock = engine_of(stock_offload(config(stage)))
    stock.load_checkpoint(tmp_path / "a")
    assert_same_bits(snapshot(stock), saved)
    train(stock, 1, first=2)
    stock.save_checkpoint(tmp_path / "b")
    saved = snapshot(stock)
    close(stock)
    back = engine_of(ours(config(stage)))
    back.load_checkpoint(tmp_path / "b")
    assert_same_bits(snapshot(back), saved)
    train(back, 1, first=3)
    close(back)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_to_fp32_finds_the_masters(ds: ModuleType, stage: int, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    engine = engine_of(ours(config(stage)))
    masters = train(engine, 2).masters
    engine.save_checkpoint(tmp_path)
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    assert_same_bits({name: found[name].clone() for name in masters}, masters)
    close(engine)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_a_module_may_be_loaded_without_optimizer_states(ds: ModuleType, stage: int, tmp_path: Path) -> None:
    engine = engine_of(ours(config(stage)))
    params = train(engine, 2).params
    engine.save_checkpoint(tmp_path)
    close(engine)
    fresh = engine_of(ours(config(stage)))
    fresh.load_checkpoint(tmp_path, load_optimizer_states=False, load_module_only=True)
    loaded, masters = snapshot(fresh)
    assert_same_bits(loaded, params)
    assert_same_bits(masters, {name: param.float() for name, param in params.items()})
    close(fresh)


@pytest.mark.parametrize("stage", [2, 3])
def test_masters_may_be_read_and_set(ds: ModuleType, stage: int) -> None:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_fp32_param

    ds.configure("lazy")
    engine = engine_of(ours(config(stage), plan="device"))
    train(engine, 2)
    param = engine.module.head.weight
    assert safe_get_full_optimizer_state(param, "exp_avg").abs().sum() > 0
    value = torch.full_like(safe_get_full_fp32_param(param), 0.25)
    safe_set_full_fp32_param(param, value)
    assert_same_bits(safe_get_full_fp32_param(param), value)
    assert ds.races() == []
    close(engine)
