"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="session")
def sim_device() -> ModuleType:
    """The emulated device, built and registered. A build that fails is a failure of every test that asks for it."""
    from offload.testing import sim

    sim.load()
    return sim


@pytest.fixture
def sim(sim_device: ModuleType) -> Iterator[ModuleType]:
    """The emulated device as every test may expect it: empty, "sync", 1 GiB, default rates, races and poison on."""
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
