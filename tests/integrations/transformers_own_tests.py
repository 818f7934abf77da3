"""transformers' own trainer tests with our optimizers put in: give it its source tree, and pytest's arguments.

::

    python -m tests.integrations.transformers_own_tests TREE trainer/test_trainer_checkpointing.py -k Resume
    OFFLOAD_OPTIMIZER=none python -m tests.integrations.transformers_own_tests TREE ...        # the same with torch's

Where a test lets Trainer make the optimizer, that is ``offloaded(args)``; where it gives Trainer a ``torch.optim.SGD``,
that is ours as well. ``optim`` values that are not offered stay transformers'. ``OFFLOAD_OPTIONS`` are options of ours,
as JSON. The last lines say in which tests an optimizer of ours was made: the others passed or failed without it.

The tests want ``parameterized`` and ``datasets`` beside what ``.[dev]`` installs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import offload
from offload.integrations.transformers import offloaded

OPTIONS = json.loads(os.environ.get("OFFLOAD_OPTIONS", "{}"))
_tests_with_ours: set[str] = set()


def note_test() -> None:
    _tests_with_ours.add(os.environ["PYTEST_CURRENT_TEST"].split(" ")[0])


class NotedSGD(offload.SGD):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        note_test()


def install() -> None:
    create_optimizer = transformers.Trainer.create_optimizer

    def create(trainer: Any, model: Any = None) -> torch.optim.Optimizer:
        if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
            return create_optimizer(trainer, model)
        try:
            trainer.optimizer_cls_and_kwargs = offloaded(trainer.args, **OPTIONS)
        except ValueError:  # what ``args.optim`` names is not offered
            return create_optimizer(trainer, model)
        note_test()
        try:
            return create_optimizer(trainer, model)
        finally:  # a second training of the same Trainer may have other arguments
            trainer.optimizer_cls_and_kwargs = None

    transformers.Trainer.create_optimizer = create
    torch.optim.SGD = NotedSGD  # type: ignore[misc]


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("OFFLOAD_OPTIMIZER", "ours") != "none":
        install()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"tests in which an optimizer of ours was made: {len(_tests_with_ours)}")
    for name in sorted(_tests_with_ours):
        terminalreporter.write_line(f"  {name}")


def main() -> int:
    tree = Path(sys.argv[1]).resolve()
    # Not as tests.integrations...: to the tests that run, "tests" is their own package.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", Path(__file__).stem, "-q", *sys.argv[2:]]
    return subprocess.run(command, cwd=tree / "tests", env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
