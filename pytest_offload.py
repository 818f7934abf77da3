"""pytest plugin: tests on an emulated accelerator. See ``docs/testing.md``.

A module of its own, outside the package, because pytest imports it in every session wherever it is installed: torch and
the device are only loaded for tests that ask for them.

- fixture ``sim``: the emulated device, empty and as it starts;
- ``@pytest.mark.sim(executors="all", races=True, capacity="2GiB")``: the test runs once in each order of execution, and
  fails if it leaves a race behind.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

EXECUTORS = ("sync", "threads", "lazy", "eager", "random", "systematic")
ALL = ("sync", "threads", "lazy", "eager", "random:0", "random:1", "random:2")


@dataclass(frozen=True, slots=True)
class SimOptions:
    """How a test runs on the device: what the marker said, and one of its executors."""

    executor: str = "sync"
    seed: int = 0
    races: bool = True
    capacity: int | str | None = None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "sim(executors='all', races=True, capacity=None): run on an emulated accelerator, once in each order of "
        "execution ('sync', 'threads', 'lazy', 'eager', 'random:SEED', 'systematic:SEED', a list of them, or 'all'); "
        "fail if the test leaves races, unless races=False; device memory in bytes or as '2GiB'",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("sim")
    if marker is None:
        return
    if "sim" not in metafunc.fixturenames:
        metafunc.fixturenames.append("sim")  # for _sim_of_marker to ask for
    executors = executors_of(marker)
    options = [options_of(marker, executor) for executor in executors]
    metafunc.parametrize("sim", options, ids=executors, indirect=True)


def executors_of(marker: pytest.Mark) -> Sequence[str]:
    """What the marker's ``executors`` names, one by one."""
    if marker.args or marker.kwargs.keys() - {"executors", "races", "capacity"}:
        raise pytest.UsageError(
            f"@pytest.mark.sim takes executors, races and capacity by keyword, got {marker.args} {marker.kwargs}"
        )
    executors = marker.kwargs.get("executors", "all")
    if executors == "all":
        return ALL
    return [executors] if isinstance(executors, str) else list(executors)


def options_of(marker: pytest.Mark, executor: str) -> SimOptions:
    name, _, seed = executor.partition(":")
    if name not in EXECUTORS or not (seed.isdigit() or seed == ""):
        raise pytest.UsageError(
            f"@pytest.mark.sim: executor {executor!r} is not one of {', '.join(EXECUTORS)}, with a seed as 'random:3'"
        )
    return SimOptions(name, int(seed or 0), marker.kwargs.get("races", True), marker.kwargs.get("capacity"))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """A marked test fails for the races it leaves, as a test and not as its teardown; one that failed names them."""
    marker = pyfuncitem.get_closest_marker("sim")
    if marker is None or not marker.kwargs.get("races", True):
        return (yield)
    import torch

    from offload.testing import sim

    try:
        result = yield
    except Exception:
        pyfuncitem.add_report_section("call", "races on the emulated device", "\n".join(sim.races()))
        raise
    torch.accelerator.synchronize()
    if reports := sim.races():
        pytest.fail("\n".join(["races on the emulated device:", *reports]), pytrace=False)
    return result


@pytest.fixture(scope="session")
def sim_device() -> ModuleType:
    """The emulated device, built and registered. A build that fails is a failure of every test that asks for it."""
    from offload.testing import sim

    sim.load()
    return sim


@pytest.fixture(scope="session", autouse=True)
def _sim_before_any_backward(request: pytest.FixtureRequest) -> None:
    """Autograd starts its threads at the first backward, one for each device there is by then and none later."""
    items = request.session.items
    if any("sim_device" in getattr(item, "fixturenames", ()) or item.get_closest_marker("sim") for item in items):
        with contextlib.suppress(RuntimeError):  # of the build: the tests that need the device say so
            request.getfixturevalue("sim_device")


@pytest.fixture(autouse=True)
def _sim_of_marker(request: pytest.FixtureRequest) -> None:
    """A marked test has the device whether it takes the fixture or not."""
    if request.node.get_closest_marker("sim") is not None:
        request.getfixturevalue("sim")


@pytest.fixture
def sim(sim_device: ModuleType, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """``offload.testing.sim`` as every test may expect it: empty, 1 GiB, default rates, races and poison on, "sync".

    The marker changes the executor, and the capacity.
    """
    import torch

    options = getattr(request, "param", SimOptions())
    if torch.accelerator.memory_allocated():
        for name in ("last_value", "last_traceback", "last_exc"):  # they hold the tensors of a test that failed
            setattr(sys, name, None)
        gc.collect()
    sim_device.reset()
    if options != SimOptions():
        sim_device.configure(options.executor, options.seed, capacity=options.capacity)
    yield sim_device
    torch.accelerator.synchronize()
