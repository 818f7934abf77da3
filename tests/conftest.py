"""Fixtures shared by all tests."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu run by themselves where a CUDA device is."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def sim_device() -> ModuleType:
    """The emulated device, built and registered. A build that fails is a failure of every test that asks for it."""
    from offload.testing import sim

    sim.load()
    return sim


@pytest.fixture(scope="session", autouse=True)
def _sim_before_any_backward(request: pytest.FixtureRequest) -> None:
    """Autograd starts its threads at the first backward, one for each device there is by then and none later."""
    if any("sim_device" in getattr(item, "fixturenames", ()) for item in request.session.items):
        with contextlib.suppress(RuntimeError):  # of the build: the tests that need the device say so
            request.getfixturevalue("sim_device")


@pytest.fixture
def sim(sim_device: ModuleType) -> Iterator[ModuleType]:
    """The emulated device as every test may expect it: empty, "sync", 1 GiB, default rates, races and poison on."""
    if torch.accelerator.memory_allocated():
        sys.last_value = sys.last_traceback = sys.last_exc = None  # which hold the tensors of a test that failed
        gc.collect()
    sim_device.reset()
    yield sim_device
    torch.accelerator.synchronize()


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """For trainings so small that torch's own threads only wait for each other, long where processors are busy."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
