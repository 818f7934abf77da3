"""What the emulated device says of a program besides races: exact bytes, life-times, waits that nobody meant."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor


def on_two_streams(first: Callable[[], object], second: Callable[[], object]) -> None:
    """Both after what came before, and in no order."""
    streams = [torch.Stream("sim"), torch.Stream("sim")]
    for stream, work in zip(streams, (first, second), strict=True):
        stream.wait_stream(torch.accelerator.current_stream())
        with stream:
            work()
    torch.accelerator.synchronize()


# ---- exact bytes of strided tensors

VIEWS: list[tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], bool]] = [
    ("column halves", lambda x: x[:, :3], lambda x: x[:, 3:], False),
    ("column halves that meet", lambda x: x[:, :4], lambda x: x[:, 3:], True),
    ("even and odd rows", lambda x: x[::2], lambda x: x[1::2], False),
    ("even and third rows", lambda x: x[::2], lambda x: x[::3], True),
    ("a row in a gap", lambda x: x[::2], lambda x: x[1], False),
    ("a row across", lambda x: x[:, :3], lambda x: x[1], True),
    ("transposed halves", lambda x: x.t()[:3], lambda x: x.t()[3:], False),
    ("blocks of three dimensions", lambda x: x.view(2, 3, 6)[:, 1], lambda x: x.view(2, 3, 6)[:, ::2], False),
]


@pytest.mark.parametrize(("first", "second", "is_race"), [v[1:] for v in VIEWS], ids=[v[0] for v in VIEWS])
def test_strided_views(sim: ModuleType, first: Callable, second: Callable, is_race: bool) -> None:
    x = torch.zeros(6, 6, device="sim")
    on_two_streams(lambda: first(x).fill_(1), lambda: second(x).fill_(2))
    assert bool(sim.races()) is is_race
    sim.clear_races()
    on_two_streams(lambda: second(x) + 1, lambda: first(x).fill_(1))
    assert bool(sim.races()) is is_race


def test_strided_write_does_not_hide_an_earlier_one(sim: ModuleType) -> None:
    """Writes of other columns, ordered after, leave the first write's bytes with their history."""
    x = torch.zeros(6, 6, device="sim")
    first, second = torch.Stream("sim"), torch.Stream("sim")
    for stream in (first, second):
        stream.wait_stream(torch.accelerator.current_stream())
    with first:
        x[:, :3].fill_(1)
        x[:, 3:].fill_(2)
    with second:
        x[:, 2].fill_(3)
    torch.accelerator.synchronize()
    (report,) = sim.races()
    assert "bytes with gaps of device memory" in report


# ---- memory that nothing has written


@pytest.mark.parametrize("recycled", [False, True])
def test_read_of_fresh_memory(sim: ModuleType, recycled: bool) -> None:
    if recycled:
        torch.ones(1000, device="sim")
    else:
        torch.accelerator.empty_cache()
    torch.empty(1000, device="sim") + 1
    (report,) = sim.races()
    assert "what nothing has written since it was allocated" in report
    assert "test_sim_reports.py:" in report
    assert "from 0 to 4000 of a block of 4000" in report


def test_fresh_memory_that_is_written_first(sim: ModuleType) -> None:
    x, y = torch.empty(1000, device="sim"), torch.empty(10, 10, device="sim")
    x[:500].zero_()
    x[500:].copy_(torch.ones(500))
    y.t().normal_()
    (x + 1, y * 2)
    torch.nonzero(torch.ones(10, device="sim")) + 1  # made by the host
    assert sim.races() == []
    x = torch.empty(1000, device="sim")
    x[:500].zero_()
    x + 1
    assert len(sim.races()) == 1


def test_copies_may_carry_padding(sim: ModuleType) -> None:
    torch.empty(1000, device="sim").clone()
    assert sim.races() == []


def test_use_after_storage_was_freed(sim: ModuleType) -> None:
    x = torch.ones(1000, device="sim")
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"use after free: a tensor needs 4000 bytes of a storage .* resized to 0"):
        x + 1


# ---- waits


def test_forbid_sync(sim: ModuleType) -> None:
    x, host = torch.ones(10, device="sim"), torch.ones(10)
    event = torch.accelerator.current_stream().record_event()
    waits: dict[str, Callable[[], object]] = {
        "reading a value, as .item() does,": x.sum().item,
        "a blocking copy between host and device": x.cpu,
        "a copy of host memory that is not pinned": lambda: x.copy_(host, non_blocking=True),
        "aten::nonzero": x.nonzero,
        "comparing tensors": lambda: torch.equal(x, x),
        "synchronizing an event": event.synchronize,
        "synchronizing a stream": torch.accelerator.current_stream().synchronize,
        "synchronizing the device": torch.accelerator.synchronize,
    }
    for reason, wait in waits.items():
        with sim.forbid_sync(), pytest.raises(RuntimeError) as error:
            wait()
        assert str(error.value).startswith(f"sim: {reason} makes the host wait, inside sim.forbid_sync()")
        wait()  # outside


def test_forbid_sync_allows_what_does_not_wait(sim: ModuleType) -> None:
    x, host = torch.ones(10, device="sim", requires_grad=True), torch.ones(10, pin_memory=True)
    event = torch.accelerator.current_stream().record_event()
    with sim.forbid_sync():
        (x * 2).sum().backward()
        torch.empty(10, device="sim").copy_(host, non_blocking=True)
        event.query()
        torch.Stream("sim").wait_event(event)

        def work() -> None:
            sim.own_host_clock()
            event.synchronize()

        worker = threading.Thread(target=work)
        worker.start()
        worker.join()


def test_warns_of_pageable_copies(sim: ModuleType) -> None:
    x, host, pinned = torch.ones(10, device="sim"), torch.ones(10), torch.ones(10, pin_memory=True)
    x.copy_(pinned, non_blocking=True)
    pinned.copy_(x, non_blocking=True)
    x.copy_(host)
    assert sim.warnings() == []
    for _ in range(2):
        x.copy_(host, non_blocking=True)
        host.copy_(x, non_blocking=True)
    up, down = sim.warnings()
    assert up.startswith("h2d of 40 bytes blocks although it was asked not to: the host memory is not pinned (")
    assert down.startswith("d2h of 40 bytes blocks")
    assert "test_sim_reports.py:" in up
    sim.configure()
    assert sim.warnings() == []


def test_warns_of_shared_streams(sim: ModuleType) -> None:
    streams = [torch.Stream("sim") for _ in range(32)]
    assert len(set(streams)) == 32
    assert sim.warnings() == []
    assert torch.Stream("sim") in streams
    assert "more than 32 streams" in sim.warnings()[0]
