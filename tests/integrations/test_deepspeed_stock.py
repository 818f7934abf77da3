"""DeepSpeed as it is, without the plugin: nothing that it does on the emulated device is reported."""

from __future__ import annotations

from types import ModuleType
from typing import get_args

import pytest
import torch

from offload.accelerators.sim import Executor
from tests.integrations.deepspeed_training import HYPER, Model, close, config, train

EXECUTORS = tuple(name for name in get_args(Executor) if name not in ("threads", "systematic"))
BY_DEFAULT = (3, "bf16", "random", True)


def cases() -> list[object]:
    """Each stage, with and without ZeRO-Offload, in every order."""
    found = [
        (stage, dtype, executor, offloads)
        for stage in (1, 2, 3)
        for dtype in ("bf16", "fp16")
        for executor in EXECUTORS
        for offloads in (True, False)
    ]
    return [pytest.param(*case, marks=[] if case == BY_DEFAULT else pytest.mark.slow) for case in found]


@pytest.mark.parametrize(("stage", "dtype", "executor", "offloads"), cases())
def test_a_training_is_silent(ds: ModuleType, stage: int, dtype: str, executor: Executor, offloads: bool) -> None:
    """Its Adam on the CPU is torch's: DeepSpeed's own is compiled for minutes, and the device does not see into it."""
    import deepspeed

    ds.configure(executor, seed=1)
    found = config(stage, dtype, num_micro=2, zero_allow_untested_optimizer=True, zero_force_ds_cpu_optimizer=False)
    if offloads:
        found["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    torch.manual_seed(0)
    model = Model(recompute=True)
    engine, *_ = deepspeed.initialize(
        model=model, config=found, optimizer=torch.optim.AdamW(model.parameters(), **HYPER)
    )
    train(engine, 3)
    torch.accelerator.synchronize()
    found_races, num_operations = ds.races(), ds.counts()[0]
    close(engine)
    assert num_operations > 100
    assert found_races == []
