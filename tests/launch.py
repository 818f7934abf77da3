"""Starts the ranks of tests that need several processes: ``python launch.py NUM_RANKS SCRIPT ARGUMENTS``.

The ranks are forks of one process that has imported the script, and torch with it, but started no thread yet: importing
costs more than most of these tests do.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

TIMEOUT_S = 240


def run_ranks(num_ranks: int, script: Path, *arguments: str) -> None:
    """Run ``main()`` of ``script`` once for each rank, on gloo and on this machine. Fails as soon as one rank does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent),
    }  # fmt: skip
    command = [sys.executable, __file__, str(num_ranks), str(script), *arguments]
    ranks = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = ranks.communicate(timeout=TIMEOUT_S)
    finally:
        if ranks.poll() is None:
            os.killpg(ranks.pid, signal.SIGKILL)
    assert ranks.returncode == 0, output[-6000:]


def run_rank(rank: int, script: ModuleType) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    script.main()


def main() -> None:
    from torch.multiprocessing import start_processes

    num_ranks, path, *arguments = sys.argv[1:]
    sys.argv = [path, *arguments]
    spec = importlib.util.spec_from_file_location("script", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    # Where one rank fails, the others are ended and its traceback is shown.
    start_processes(run_rank, (script,), nprocs=int(num_ranks), start_method="fork")


if __name__ == "__main__":
    main()
