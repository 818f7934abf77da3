"""One rank of tests/integrations/test_deepspeed_ranks.py: DeepSpeed's CPU accelerator and gloo, any number of ranks.

Ranks follow different plans, and must come to the reference's bits all the same.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

UNIVERSAL_INFO = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


def check_stage(stage: int, folder: Path, rank: int, num_ranks: int) -> None:
    from tests.integrations.deepspeed_training import config, engine_of, ours, reference, train
    from tests.training import assert_same_bits

    plan = ("device", "host")[rank % 2]
    expected = train(engine_of(reference(config(stage))), device="cpu")
    engine = engine_of(ours(config(stage), plan=plan))
    assert engine.world_size == num_ranks
    assert_same_bits(train(engine, device="cpu"), expected)
    tag = f"stage{stage}"
    engine.save_checkpoint(folder, tag=tag, client_state=UNIVERSAL_INFO)
    resumed = engine_of(ours(config(stage), plan="host"))
    resumed.load_checkpoint(folder, tag=tag)
    assert_same_bits(train(resumed, 2, first=4, device="cpu"), train(engine, 2, first=4, device="cpu"))
    if rank == 0:
        torch.save(expected.masters, folder / f"{tag}.pt")


def check_universal(stage: int, folder: Path) -> None:
    """What several ranks saved, loaded by this number of ranks by way of a universal checkpoint."""
    from tests.integrations.deepspeed_training import config, engine_of, ours, snapshot, train
    from tests.training import assert_same_bits

    tag = f"stage{stage}"
    engine = engine_of(ours(config(stage, checkpoint={"load_universal": True}), plan="device"))
    engine.load_checkpoint(folder, tag=f"{tag}_universal")
    assert_same_bits(snapshot(engine)[1], torch.load(folder / f"{tag}.pt"))
    optimizer: Any = engine.optimizer
    steps = [optimizer.optimizer.state[master]["step"] for master in optimizer.offloaded.masters]
    assert set(steps) == {4}, steps
    train(engine, 1, first=4, device="cpu")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("train", "universal"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("stages", type=int, nargs="+")
    arguments = parser.parse_args()
    os.environ["DS_ACCELERATOR"] = "cpu"
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    deepspeed: Any = importlib.import_module("deepspeed")
    # It would compile for minutes, to run collectives a little faster.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for stage in arguments.stages:
        if arguments.what == "train":
            check_stage(stage, arguments.folder, rank, num_ranks)
        else:
            check_universal(stage, arguments.folder)


if __name__ == "__main__":
    main()
