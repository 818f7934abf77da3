"""Fixtures of tests with DeepSpeed, which are skipped without it."""

from __future__ import annotations

import gc
import importlib
import logging
from collections.abc import Iterator
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def _deepspeed_on_sim(sim_device: ModuleType) -> None:
    pytest.importorskip("deepspeed")
    from offload.integrations.deepspeed.emulated import use_emulated_device

    use_emulated_device()
    importlib.import_module("torch._inductor.compile_fx")  # as the first engine would
    gc.collect()
    gc.freeze()  # every engine asks for full collections: see pytest_collection_finish


@pytest.fixture
def ds(_deepspeed_on_sim: None, sim: ModuleType, one_torch_thread: None) -> Iterator[ModuleType]:
    """The emulated device, with DeepSpeed on it."""
    logging.disable(logging.WARNING)
    yield sim
    logging.disable(logging.NOTSET)
