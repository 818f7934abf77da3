"""transformers' Trainer with ``install()``: trained, saved and resumed under another plan, stages 2 and 3."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.test_deepspeed_ranks import free_port

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SCRIPT = Path(__file__).with_name("deepspeed_trainer.py")


@pytest.mark.slow  # eight trainings in a process of their own
def test_trainer_saves_and_resumes(tmp_path: Path) -> None:
    """Ours against DeepSpeed's own, within rounding, and resumed bit for bit."""
    command = [sys.executable, str(SCRIPT), str(tmp_path / "runs"), "2", "3"]
    environment = {**os.environ, "MASTER_PORT": str(free_port())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
