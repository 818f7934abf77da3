"""The plugin as another project has it: the example of docs/testing.md, and how the marker is read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import torch

import pytest_offload
from offload.accelerators import sim as device
from pytest_offload import ALL, EXECUTORS, SimOptions, executors_of, options_of

ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")


def code_of(name: str) -> str:
    """The block of the page that begins with ``# name``."""
    (block,) = re.findall(rf"```python\n# {re.escape(name)}\n(.*?)```", DOCS, flags=re.DOTALL)
    return str(block)


def run_pytest(directory: Path, *arguments: str) -> str:
    """What pytest prints in a project of its own, which knows of this one only that it is installed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-p", "pytest_offload", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    return done.stdout + done.stderr


def test_example_of_the_page(sim: ModuleType, tmp_path: Path) -> None:
    """The bug is found in every order, with both lines, and nothing is left of it once it is fixed."""
    loader, fix, test = code_of("prefetch.py"), code_of("the fix, in copy()"), code_of("test_prefetch.py")
    assert "        with self.stream:\n" in loader
    (tmp_path / "prefetch.py").write_text("# prefetch.py\n" + loader)
    (tmp_path / "test_prefetch.py").write_text("# test_prefetch.py\n" + test)
    (tmp_path / "fixed.py").write_text(
        loader.replace("        with self.stream:\n", fix + "        with self.stream:\n")
    )
    (tmp_path / "test_fixed.py").write_text(test.replace("from prefetch import", "from fixed import"))
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    printed = run_pytest(tmp_path, "-v", "--tb=short", "-rN")  # under CI, pytest's summary repeats whole reports
    for executor in ALL:
        assert re.search(rf"test_prefetch\.py::test_batches_arrive\[{executor}\] FAILED", printed), printed
        assert re.search(rf"test_fixed\.py::test_batches_arrive\[{executor}\] PASSED", printed), printed
    assert "assert [" in printed  # wrong sums, in some order
    (report,) = re.findall(r"^    (h2d writes .*?)\n\n", DOCS, flags=re.DOTALL | re.MULTILINE)
    expected = re.escape(" ".join(report.split())).replace(re.escape("..."), ".*").replace("project/", r"\S*/")
    assert len(re.findall(expected.replace(r"stream\ 1", r"stream\ \d+"), printed)) == len(ALL), printed


@pytest.mark.sim(executors=["lazy", "random:3"], capacity="64MiB")
def test_marker_sets_up_the_device(request: pytest.FixtureRequest) -> None:
    """Without asking for the fixture, too."""
    assert torch.accelerator.get_memory_info()[1] == 64 << 20
    assert request.node.callspec.id in ("lazy", "random:3")
    x = torch.zeros(1000, device="sim")
    host = torch.ones(1000, pin_memory=True)
    host.copy_(x, non_blocking=True)
    if request.node.callspec.id == "lazy":
        assert host[0] == 1  # not yet
    torch.accelerator.synchronize()


@pytest.mark.sim(executors="sync", races=False)
def test_races_may_be_left_to_the_test(sim: ModuleType) -> None:
    x = torch.zeros(1000, device="sim")
    with torch.Stream("sim"):
        x.add_(1)
    assert len(sim.races()) == 1


def test_plugin_knows_all_executors() -> None:
    assert get_args(device.Executor) == EXECUTORS
    assert {name.partition(":")[0] for name in ALL} == set(EXECUTORS) - {"systematic"}


def test_importing_the_plugin_loads_no_torch() -> None:
    program = "import sys, pytest_offload; assert not {'torch', 'offload'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)


def test_reading_the_marker() -> None:
    marker = pytest.mark.sim(executors=["sync", "systematic:77"], capacity="2GiB").mark
    assert [options_of(marker, name) for name in executors_of(marker)] == [
        SimOptions("sync", 0, True, "2GiB"),
        SimOptions("systematic", 77, True, "2GiB"),
    ]
    assert executors_of(pytest.mark.sim.mark) == ALL
    assert executors_of(pytest.mark.sim(executors="lazy").mark) == ["lazy"]


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        (pytest.mark.sim(executors="slow"), r"executor 'slow' is not one of sync, threads"),
        (pytest.mark.sim(executors=["random:x"]), r"executor 'random:x' is not one of"),
        (pytest.mark.sim("lazy"), r"by keyword, got \('lazy',\)"),
        (pytest.mark.sim(executor="lazy"), r"takes executors, races and capacity by keyword"),
    ],
)
def test_bad_marker(marker: pytest.MarkDecorator, message: str) -> None:
    with pytest.raises(pytest.UsageError, match=message):
        [options_of(marker.mark, name) for name in executors_of(marker.mark)]


def test_entry_point_is_named_as_the_module() -> None:
    """So that asking for the plugin by name, as this project's tests do, does not register it twice."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'{pytest_offload.__name__} = "{pytest_offload.__name__}"' in text
