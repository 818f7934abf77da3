"""Seams: a DeepSpeed that differs is refused by name, and nothing of it stays replaced."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

deepspeed = pytest.importorskip("deepspeed")

from deepspeed.runtime import engine as engine_module
from deepspeed.runtime.zero import stage3 as stage3_module

from offload.integrations.deepspeed import SeamError, entry, initialize, install, seams
from tests.integrations.deepspeed_training import Model, close, config, engine_of, ours


@pytest.mark.parametrize("seam", [*seams.STAGE3_SEAMS, *seams.STAGE12_SEAMS], ids=lambda seam: seam.name)
def test_this_version_has_every_seam(seam: seams.Seam) -> None:
    seam.check()


def test_a_seam_that_is_gone_is_named_with_the_version() -> None:
    gone = seams.Seam(seams.STAGE3, "DeepSpeedZeroOptimizer_Stage3._gone", (), "not there")
    with pytest.raises(
        SeamError, match=rf"DeepSpeed {deepspeed.__version__} .*Stage3\._gone \(not there\) is not there"
    ):
        gone.check()


def test_other_parameters_are_named() -> None:
    moved = seams.Seam(seams.STAGE3, "DeepSpeedZeroOptimizer_Stage3._optimizer_step", ("group",), "called")
    with pytest.raises(SeamError, match=r"_optimizer_step \(called\) takes \(sub_group_id\), not \(group\)"):
        moved.check()


def test_an_engine_is_not_made_on_a_version_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(stage3_module.DeepSpeedZeroOptimizer_Stage3, "_release_sub_group")
    with pytest.raises(SeamError, match="_release_sub_group"):
        initialize(config=ours(config(3)))


def test_missing_attributes_are_named() -> None:
    with pytest.raises(SeamError, match="attribute averaged_gradients of object"):
        seams.check_attributes(deepspeed, seams.STAGE3_ATTRIBUTES)


def test_deepspeed_is_as_before_when_an_engine_is_made(ds: ModuleType) -> None:
    before = stage3_module.DeepSpeedZeroOptimizer_Stage3, engine_module.DeepSpeedZeroOptimizer
    engine = engine_of(ours(config(3)))
    assert type(engine.optimizer).__name__ == "OffloadedStage3"
    assert before == (stage3_module.DeepSpeedZeroOptimizer_Stage3, engine_module.DeepSpeedZeroOptimizer)
    close(engine)


def test_install_serves_calls_of_deepspeed_itself(ds: ModuleType) -> None:
    stock = deepspeed.initialize
    installed = install()
    try:
        assert deepspeed.initialize is initialize
        install()
        model = Model()
        configuration = ours(config(2))
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config_params=configuration)
        assert type(engine.optimizer).__name__ == "OffloadedStage12"
        close(engine)
    finally:
        installed.remove()
    assert deepspeed.initialize is stock


def test_the_users_args_keep_their_configuration(ds: ModuleType, tmp_path: Path) -> None:
    """Two engines may be made with the same args; without our block they reach DeepSpeed as they are."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ours(config(2))), encoding="utf-8")
    args = Namespace(deepspeed_config=str(path))
    for _ in range(2):
        model = Model()
        engine, *_ = initialize(args=args, model=model, model_parameters=model.parameters())
        assert type(engine.optimizer).__name__ == "OffloadedStage12"
        assert args.deepspeed_config == str(path)
        close(engine)


def test_args_without_our_block_are_left_to_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ds.json"
    path.write_text("{}", encoding="utf-8")
    seen: list[Any] = []
    monkeypatch.setattr(entry, "_stock_initialize", lambda args=None, config=None: seen.append(args.deepspeed_config))
    initialize(args=Namespace(deepspeed_config=str(path)))
    assert seen == [str(path)]
