"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

# The fixture sim and its marker. Installed projects have it by its entry point; a checkout may be older than that.
pytest_plugins = ["pytest_offload"]


def pytest_configure() -> None:
    """Torch's threads take as many helpers as the process had asked for when they started: so that bits depend on
    nothing that ran before, all of them work alone, autograd's and those of the emulated device too.
    """
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu run by themselves where a CUDA device is; those of DeepSpeed come last.

    DeepSpeed keeps engines in globals of its own, and so memory of the emulated device, which other tests measure.
    """
    items.sort(key=lambda item: "integrations" in item.path.parts)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported stays: full collections, of which tests ask for many, need not go through it each time."""
    if any("sim" in getattr(item, "fixturenames", ()) for item in session.items):
        importlib.import_module("torch._dynamo")  # as the first optimizer would
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """For trainings so small that torch's own threads only wait for each other, long where processors are busy."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def poison(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """For streaming: freed places hold NaN, how many is counted, and no test ends with a race."""
    from tests.streaming_models import poison_freed_places

    yield poison_freed_places(monkeypatch)
    torch.accelerator.synchronize()
    assert sim.races() == []
