"""transformers' Trainer with ``install()`` in a process of its own: its settings live in globals and the environment.

``python tests/integrations/deepspeed_trainer.py FOLDER STAGE...`` trains with save, then again from the checkpoint.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

ONE_RANK = {
    "DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
    "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def configuration(stage: int, plan: str | None) -> dict[str, Any]:
    """What stands in for a user's ds_config.json; "auto" is Trainer's word. Without ``plan`` it is DeepSpeed's own."""
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
        "zero_optimization": {"stage": stage, "sub_group_size": 4096, "offload_optimizer": {"device": "cpu"}},
    }  # fmt: skip
    if plan is None:
        found["optimizer"]["params"]["torch_adam"] = True  # DeepSpeedCPUAdam would be compiled
        return found
    return {**found, "interleaved_offload": {"plan": plan}}


def train(folder: Path, stage: int, plan: str | None, **train_arguments: Any) -> list[Any]:
    """The losses of each step."""
    from tests.integrations.trainer_runs import arguments, llama, record_losses, trainer_of

    args = arguments(folder, save_strategy="steps", save_steps=3, deepspeed=configuration(stage, plan))
    trainer = trainer_of(llama(), args, optimizer_cls_and_kwargs=None)
    losses = record_losses(trainer.model)
    trainer.train(**train_arguments)
    is_ours = type(trainer.deepspeed.optimizer).__name__.startswith("Offloaded")
    assert is_ours == (plan is not None), type(trainer.deepspeed.optimizer)
    return losses


def main() -> None:
    os.environ.update(ONE_RANK)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    deepspeed: Any = importlib.import_module("deepspeed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for minutes
    import torch

    from offload.integrations.deepspeed import install

    install()
    folder = Path(sys.argv[1])
    for stage in map(int, sys.argv[2:]):
        stock = train(folder / "stock", stage, None)
        torch.testing.assert_close(train(folder / "host", stage, "host"), stock)
        shutil.rmtree(folder / "host" / "checkpoint-6")
        resumed = train(folder / "host", stage, "device", resume_from_checkpoint=True)
        whole = train(folder / "device", stage, "device")
        assert [float(loss) for loss in resumed] == [float(loss) for loss in whole[3:]]
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
