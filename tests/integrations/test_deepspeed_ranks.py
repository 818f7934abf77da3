"""Two ranks over gloo, each with a plan of its own, and a universal checkpoint of theirs in one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

SCRIPT = Path(__file__).with_name("deepspeed_ranks.py")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run_ranks(num_ranks: int, what: str, folder: Path, stages: tuple[int, ...]) -> None:
    shared = {
        **os.environ, "WORLD_SIZE": str(num_ranks), "LOCAL_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(SCRIPT), what, str(folder), *map(str, stages)]
    ranks = [
        subprocess.Popen(
            command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(num_ranks)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output[-3000:]


def convert(folder: Path, stages: tuple[int, ...]) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    for stage in stages:
        main(
            Namespace(
                input_folder=str(folder / f"stage{stage}"), output_folder=str(folder / f"stage{stage}_universal"),
                num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True,
                inject_missing_state=False,
            )
        )  # fmt: skip


@pytest.mark.slow  # DeepSpeed compiles an extension for its collectives first
@pytest.mark.parametrize(
    "stages",
    [pytest.param((3,), id="stage3"), pytest.param((1, 2), id="stages1and2")],
)
def test_two_ranks_with_plans_of_their_own_then_one(stages: tuple[int, ...], tmp_path: Path) -> None:
    run_ranks(2, "train", tmp_path, stages)
    convert(tmp_path, stages)
    run_ranks(1, "universal", tmp_path, stages)
