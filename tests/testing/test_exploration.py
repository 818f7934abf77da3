"""Every order of a small program: as many as there are, each failing one found, named and replayed."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from offload.testing import FailedOrder, explore

NUMEL = 256


def copies(num_streams: int, num_each: int, *, is_shared: bool) -> Callable[[], None]:
    """``num_each`` increments on each stream; of one tensor, or of one for each stream."""

    def program() -> None:
        tensors = [torch.zeros(NUMEL, device="sim")] * num_streams
        if not is_shared:
            tensors = [torch.zeros(NUMEL, device="sim") for _ in range(num_streams)]
        torch.accelerator.synchronize()
        streams = [torch.Stream("sim") for _ in range(num_streams)]
        for _ in range(num_each):
            for stream, tensor in zip(streams, tensors, strict=True):
                with stream:
                    tensor.add_(1)
        torch.accelerator.synchronize()

    return program


def test_independent_streams_have_one_order(sim: ModuleType) -> None:
    """Nothing can tell in which order operations on different bytes ran."""
    exploration = explore(copies(3, 2, is_shared=False), max_orders=50)
    assert exploration.is_complete
    assert exploration.num_orders == 1


@pytest.mark.parametrize(("num_streams", "num_each"), [(2, 1), (2, 2), (2, 3), (3, 1)])
def test_conflicting_streams_have_every_order(sim: ModuleType, num_streams: int, num_each: int) -> None:
    """As many as there are ways to merge the streams' operations."""
    orders = set()

    def steps() -> None:
        """One operation a step, which appends its number to a shared log."""
        log = torch.zeros(1, dtype=torch.float64, device="sim")
        torch.accelerator.synchronize()
        streams = [torch.Stream("sim") for _ in range(num_streams)]
        one = torch.ones(1, dtype=torch.float64, device="sim")
        torch.accelerator.synchronize()
        for i in range(num_streams * num_each):
            with streams[i % num_streams]:
                torch.add(one * 0 + i, log, alpha=10, out=log)
        torch.accelerator.synchronize()
        orders.add(log.item())

    exploration = explore(steps, max_orders=2000)
    num_merges = math.factorial(num_streams * num_each) // math.factorial(num_each) ** num_streams
    assert exploration.is_complete
    assert len(orders) == num_merges


def test_bound(sim: ModuleType) -> None:
    exploration = explore(copies(2, 4, is_shared=True), max_orders=5)
    assert exploration == type(exploration)(num_orders=5, is_complete=False)
    with pytest.raises(ValueError, match="max_orders must be at least 1, got 0"):
        explore(lambda: None, max_orders=0)


def double_buffered(has_bug: bool) -> None:
    """Two batches through one pinned buffer; with the bug the host refills it without a wait."""
    staging = torch.empty(NUMEL, pin_memory=True)
    sums = []
    for value in (1.0, 2.0):
        staging.fill_(value)
        batch = torch.empty(NUMEL, device="sim")
        batch.copy_(staging, non_blocking=True)
        sums.append(batch.sum())
        if not has_bug:
            torch.accelerator.synchronize()
    assert [total.item() for total in sums] == [NUMEL, 2 * NUMEL]


def test_failing_order_is_a_seed_that_replays_it(sim: ModuleType) -> None:
    assert explore(lambda: double_buffered(has_bug=False)).is_complete
    with pytest.raises(FailedOrder, match="replay it with") as failure:
        explore(lambda: double_buffered(has_bug=True))
    for _ in range(2):
        sim.configure("systematic", failure.value.seed)
        with pytest.raises(AssertionError):
            double_buffered(has_bug=True)


def test_order_that_random_seldom_finds(sim: ModuleType) -> None:
    """One order of many is wrong: a flag must be seen between two writes of another stream."""

    def program() -> None:
        flag, seen = torch.zeros(1, device="sim"), torch.zeros(1, device="sim")
        torch.accelerator.synchronize()
        writer, reader = torch.Stream("sim"), torch.Stream("sim")
        with writer:
            for value in (1.0, 2.0, 3.0):
                flag.fill_(value)
        with reader:
            seen.copy_(flag)
        torch.accelerator.synchronize()
        assert seen.item() != 2

    with pytest.raises(FailedOrder):
        explore(program)


def test_host_access_is_a_place_for_copies_to_come_between(sim: ModuleType) -> None:
    """Pinned memory is read twice; a copy may end between."""

    def program() -> None:
        host, device = torch.zeros(NUMEL, pin_memory=True), torch.ones(NUMEL, device="sim")
        torch.accelerator.synchronize()
        host.copy_(device, non_blocking=True)
        before = host[0].item()
        sim.host_access(host, False, "second look")
        assert before == host[0].item()

    with pytest.raises(FailedOrder):
        explore(program)


def test_bad_seed(sim: ModuleType) -> None:
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        sim.configure("systematic", -1)
