"""A training run that is killed, starved and broken again and again ends with the bits of one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

import offload
from tests import soak
from tests.training import assert_same_bits

NUM_STEPS = int(os.environ.get("OFFLOAD_SOAK_STEPS", "2000"))
NUM_KILLS = 20


def undisturbed(num_steps: int) -> dict[str, torch.Tensor]:
    model = soak.new_model("sim")
    optimizer = offload.AdamW(model.parameters(), lr=3e-3, plan="host", overlap="none")
    for step in range(num_steps):
        soak.one_step(model, optimizer, step, "sim")
    return {name: param.detach().cpu() for name, param in model.named_parameters()}


def disturbed(folder: Path, num_steps: int, num_kills: int, seed: int) -> Counter[str]:
    """Run lives until one ends by itself; kill each after some of the lines that it says. What was said, counted."""
    rng, said, num_killed = random.Random(seed), Counter[str](), 0
    while not (folder / "weights.pt").exists():
        command = [sys.executable, "-m", "tests.soak", str(folder), str(num_steps), str(rng.randrange(2**31))]
        life = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert life.stdout is not None
        spare = num_killed == num_kills
        lines_left = rng.randint(5, 3 * num_steps // (2 * num_kills))
        for line in life.stdout:
            said[line.split()[0]] += 1
            lines_left -= 1
            if lines_left <= 0 and not spare:
                life.send_signal(signal.SIGKILL)  # wherever it is: in a step, or in a save
                break
        status = life.wait()
        num_killed += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL), f"a life ended with {status}"
    said["killed"] = num_killed
    return said


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_soak(sim: ModuleType, tmp_path: Path, one_torch_thread: None) -> None:
    sim.configure(races=False)
    begun_s = time.monotonic()
    said = disturbed(tmp_path, NUM_STEPS, NUM_KILLS, seed=0)
    took_s = time.monotonic() - begun_s
    assert_same_bits(torch.load(tmp_path / "weights.pt", weights_only=True), undisturbed(NUM_STEPS))
    print(f"\n{NUM_STEPS} steps, {dict(said)}, {took_s:.0f} s")
    assert said["killed"] == NUM_KILLS
    assert min(said["fault"], said["reload"], said["saving"]) > 0
