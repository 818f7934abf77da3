"""Lightning with an offloaded optimizer: the bits of torch's, resumed in the middle too, and the callback's figures."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import offload
from tests.training import assert_same_bits, mlp, snapshot

lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import ModelCheckpoint

from offload.integrations.lightning import OffloadCallback

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

NUM_STEPS, SAVED_AT = 8, 4


class Module(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, optimizer_cls: Any, **options: Any) -> None:
        super().__init__()
        self.net, self.optimizer_cls, self.options = mlp(), optimizer_cls, options

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0].to(next(self.parameters()).dtype)).float().square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_cls(self.parameters(), lr=1e-2, **self.options)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, NUM_STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trainer_of(folder: Path, *callbacks: Any, **options: Any) -> Any:
    """An epoch of the data are SAVED_AT steps of two batches."""
    return lightning.Trainer(
        default_root_dir=folder, accelerator="cpu", max_steps=NUM_STEPS, accumulate_grad_batches=2, logger=False,
        gradient_clip_val=0.5, enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks], **options,
    )  # fmt: skip


def batches() -> Any:
    first_layer: Any = mlp()[0]
    rows = torch.randn(2 * SAVED_AT * 4, first_layer.in_features, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=4)


def train(folder: Path, module: Module, *callbacks: Any, **options: Any) -> dict[str, Tensor]:
    trainer_of(folder, *callbacks, **options).fit(module, batches())
    return snapshot(module.net)


def test_bits_of_torch(tmp_path: Path) -> None:
    ours = train(tmp_path, Module(offload.AdamW), enable_checkpointing=False)
    assert_same_bits(ours, train(tmp_path, Module(torch.optim.AdamW, fused=True), enable_checkpointing=False))


def test_resume_is_bit_identical(tmp_path: Path) -> None:
    """16-bit weights, so that the float32 masters must have been saved too."""
    saves = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=SAVED_AT, save_top_k=-1, filename="{step}")
    whole = train(tmp_path, Module(offload.AdamW), saves, precision="bf16-true")
    module = Module(offload.AdamW)
    trainer = trainer_of(tmp_path, enable_checkpointing=False, precision="bf16-true")
    trainer.fit(module, batches(), ckpt_path=tmp_path / f"step={SAVED_AT}.ckpt")
    assert_same_bits(snapshot(module.net), whole)


def test_figures_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = OffloadCallback()
    module = Module(offload.AdamW, subgroup_numel=1000)
    trainer = trainer_of(tmp_path, callback, enable_checkpointing=False)
    with caplog.at_level(logging.INFO, logger="offload"):
        trainer.fit(module, batches())
    optimizer = trainer.optimizers[0]
    assert trainer.callback_metrics["offload_num_subgroups"] == len(optimizer.runtime.subgroups) > 1
    phases = {f"offload_{phase}_rss_bytes" for phase in ("forward", "backward", "update")}
    assert phases <= trainer.callback_metrics.keys()
    assert "memory in MiB" in caplog.text
    assert callback.monitor is not None
    samples = callback.monitor.samples
    of_a_step = ["idle", "forward", "backward"] * 2 + ["idle", "update"]  # two batches
    assert [sample.phase.value for sample in samples] == of_a_step * NUM_STEPS
    assert [sample.step for sample in samples if sample.phase.value == "update"] == list(range(NUM_STEPS))


def test_another_optimizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="configure_optimizers gave SGD: return"):
        train(tmp_path, Module(torch.optim.SGD), OffloadCallback(), enable_checkpointing=False)
