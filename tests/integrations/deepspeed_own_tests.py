"""DeepSpeed's own unit tests with the plugin installed: give it a source tree of DeepSpeed, and pytest's arguments.

::

    python -m tests.integrations.deepspeed_own_tests TREE unit/v1/zero/test_zero.py -k cpu_offload
    OFFLOAD_ZERO=none python -m tests.integrations.deepspeed_own_tests TREE ...        # the same by DeepSpeed alone

The tests start their ranks with multiprocessing's fork server, which imports ``deepspeed_installed.py`` first: it calls
``install()`` and adds our block to the configurations that the tests give. ``OFFLOAD_ZERO`` says to which:

- ``asked`` (default): those that offload the optimizer to the CPU;
- ``all``: every ZeRO configuration, as if it did;
- ``stock``: none, but all are given to DeepSpeed as if they offloaded;
- ``none``: no configuration, and nothing is installed.

Configurations that the plugin refuses are left to DeepSpeed. ``OFFLOAD_BLOCK`` is the block, as JSON; what was done
with each configuration is appended to the file ``OFFLOAD_LOG``. ``OFFLOAD_FP16=1`` has DeepSpeed's CPU accelerator say
that it can do fp16, which torch can.

Two things are mended in the tests' own machinery: a test whose ranks wait for each other beyond ``DS_UNITTEST_TIMEOUT``
seconds fails by itself, where it ended or hung the whole run; and its distributed fixtures are found by pytest 8.4 and
later, which no longer looks at the attribute that marks them.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = "tests.integrations.deepspeed_installed"
SECONDS_TO_END = 20


def pytest_configure(config: object) -> None:
    """As a plugin of pytest: its process and the ranks import that module before they run a test."""
    multiprocessing.set_forkserver_preload([INSTALLED, "pytest", "unit.common", "unit.simple_model"])
    importlib.import_module(INSTALLED)


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> None:
    """Before the first module of tests is collected: a hang costs one test."""
    common = importlib.import_module("unit.common")
    common.pytest = _FailingPytest()
    common.DistributedExec._close_pool = _close_pool


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Make fixtures of a module's distributed fixtures, which are classes."""
    if not isinstance(collector, pytest.Module):
        return
    with contextlib.suppress(Exception, pytest.skip.Exception):  # which collecting it will report
        _add_distributed_fixtures(collector.obj)


def _add_distributed_fixtures(module: Any) -> None:
    for name, found in list(vars(module).items()):
        if getattr(found, "is_dist_fixture", False) and isinstance(found.world_size, int):
            setattr(module, f"_fixture_{name}", _distributed_fixture(name, found))


def _distributed_fixture(name: str, launcher: Any) -> Any:
    @pytest.fixture(name=name)
    def fixture(request: pytest.FixtureRequest) -> None:
        launcher()(request)

    return fixture


class _FailingPytest:
    """``pytest`` for the module that starts ranks: it ends the run when they hang, where this fails the test."""

    def __getattr__(self, name: str) -> Any:
        return getattr(pytest, name)

    @staticmethod
    def exit(reason: str, returncode: int) -> None:
        pytest.fail(reason, pytrace=False)


def _close_pool(test: Any, pool: Any, num_procs: int, force: bool = False) -> None:
    """End ranks as DeepSpeed's does, but what does not answer by force; a pool that lost a rank is never done."""
    if not force and test.reuse_dist_env:
        return
    with contextlib.suppress(Exception):  # whatever it was: the ranks wait for one that failed
        pool.starmap_async(test._dist_destroy, [()] * num_procs).get(SECONDS_TO_END)
    ranks = list(pool._pool)
    ending = threading.Thread(target=pool.terminate, daemon=True)  # it may wait for a lock that a dead rank had
    ending.start()
    ending.join(SECONDS_TO_END)
    for rank in ranks:
        rank.kill()


def main() -> int:
    tree = Path(sys.argv[1]).resolve()
    shared = {
        **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tree / 'tests'}", "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "LOCAL_SIZE": os.environ.get("LOCAL_SIZE", "4"),  # how many devices DeepSpeed's CPU accelerator says it has
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-p", "tests.integrations.deepspeed_own_tests", "-q", *sys.argv[2:]]
    return subprocess.run(command, cwd=tree / "tests", env=shared, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
