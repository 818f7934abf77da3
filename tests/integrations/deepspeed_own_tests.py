"""DeepSpeed's own unit tests with the plugin installed: give it a source tree of DeepSpeed, and pytest's arguments.

::

    python -m tests.integrations.deepspeed_own_tests TREE unit/v1/zero/test_zero.py -k cpu_offload
    OFFLOAD_ZERO=none python -m tests.integrations.deepspeed_own_tests TREE ...        # the same by DeepSpeed alone

The tests start their ranks with multiprocessing's fork server, which imports ``deepspeed_installed.py`` first: it calls
``install()`` and adds our block to the configurations that the tests give. ``OFFLOAD_ZERO`` says to which:

- ``asked`` (default): those that offload the optimizer to the CPU;
- ``all``: every ZeRO configuration, as if it did;
- ``none``: no configuration, and nothing is installed.

Configurations that the plugin refuses are left to DeepSpeed. ``OFFLOAD_BLOCK`` is the block, as JSON; what was done
with each configuration is appended to the file ``OFFLOAD_LOG``.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = "tests.integrations.deepspeed_installed"


def pytest_configure(config: object) -> None:
    """As a plugin of pytest: its process and the ranks import that module before they run a test."""
    multiprocessing.set_forkserver_preload([INSTALLED])
    importlib.import_module(INSTALLED)


def main() -> int:
    tree = Path(sys.argv[1]).resolve()
    shared = {
        **os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        "LOCAL_SIZE": os.environ.get("LOCAL_SIZE", "4"),  # how many devices DeepSpeed's CPU accelerator says it has
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-p", "tests.integrations.deepspeed_own_tests", "-q", *sys.argv[2:]]
    return subprocess.run(command, cwd=tree / "tests", env=shared, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
