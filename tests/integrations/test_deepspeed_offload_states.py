"""DeepSpeed's ``offload_states()`` and ``reload_states()``: parameters and gradients go to host memory and back."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.integrations.deepspeed_training import close, config, engine_of, ours, snapshot, train
from tests.training import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.mark.parametrize("pin_memory", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_a_run_goes_on_after_its_states_were_away(ds: ModuleType, stage: int, pin_memory: bool, tmp_path: Path) -> None:
    """All of them, while an update is in flight; what is saved afterwards is what was trained afterwards."""
    ds.configure("lazy")
    undisturbed = engine_of(ours(config(stage), plan="device"))
    expected = train(undisturbed, 4)
    close(undisturbed)

    engine = engine_of(ours(config(stage), plan="device"))
    for first in (0, 1):
        train(engine, 1, first=first)
        engine.offload_states(pin_memory=pin_memory)
        own = [param.ds_tensor for param in engine.parameters()] if stage == 3 else list(engine.parameters())
        assert {tensor.device.type for tensor in own} == {"cpu"}
        engine.reload_states()
    found = train(engine, 2, first=2)
    assert_same_bits(found, expected._replace(losses=expected.losses[2:]))
    engine.save_checkpoint(tmp_path)
    resumed = engine_of(ours(config(stage)))
    resumed.load_checkpoint(tmp_path)
    assert_same_bits(snapshot(resumed), (expected.params, expected.masters))
    assert ds.races() == []
    close(engine)
    close(resumed)
