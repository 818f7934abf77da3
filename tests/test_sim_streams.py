"""Streams and events of the emulated device, in every executor."""

from __future__ import annotations

import threading
from types import ModuleType

import pytest
import torch

EXECUTORS = ["sync", "threads", "lazy", "eager", "random"]


@pytest.fixture(params=EXECUTORS)
def executor(sim: ModuleType, request: pytest.FixtureRequest) -> str:
    sim.configure(request.param)
    return str(request.param)


def test_events_order_streams(sim: ModuleType, executor: str) -> None:
    streams = [torch.Stream("sim") for _ in range(4)]
    x = torch.zeros(1000, device="sim")
    streams[0].wait_stream(torch.accelerator.current_stream())
    for i in range(20):
        stream, following = streams[i % 4], streams[(i + 1) % 4]
        with stream:
            x.mul_(2).add_(1)
        following.wait_event(stream.record_event())
    torch.accelerator.current_stream().wait_stream(streams[0])
    assert torch.equal(x.cpu(), torch.full((1000,), 2.0**20 - 1))
    assert sim.races() == []


def test_query_makes_progress(sim: ModuleType, executor: str) -> None:
    """Pitfall: a loop that polls must end where nothing runs by itself."""
    side = torch.Stream("sim")
    x = torch.zeros(10, device="sim")
    side.wait_stream(torch.accelerator.current_stream())
    with side:
        for _ in range(10):
            x.add_(1)
    event = side.record_event()
    while not event.query():
        pass
    while not side.query():
        pass
    torch.accelerator.synchronize()
    assert torch.equal(x.cpu(), torch.full((10,), 10.0))


def test_unrecorded_event_is_complete(sim: ModuleType, executor: str) -> None:
    event = torch.Event("sim")
    assert event.query()
    event.synchronize()
    torch.Stream("sim").wait_event(event)


def test_rerecorded_event_waits_for_what_was_recorded_when(sim: ModuleType, executor: str) -> None:
    first, second = torch.Stream("sim"), torch.Stream("sim")
    event = first.record_event()
    second.wait_event(event)
    with first:
        x = torch.ones(1000, device="sim")
    first.record_event(event)
    event.synchronize()
    with second:
        assert torch.equal(x.cpu(), torch.ones(1000))
    assert sim.races() == []


def test_error_in_asynchronous_work_surfaces_at_a_wait(sim: ModuleType, executor: str) -> None:
    index = torch.tensor([5], device="sim")
    message = "index 5 is out of bounds|out of range"
    if executor == "sync":
        with pytest.raises((RuntimeError, IndexError), match=message):
            torch.zeros(3, device="sim")[index]
        return
    torch.zeros(3, device="sim")[index]
    with pytest.raises(RuntimeError, match=f"asynchronous error in aten::index.*({message})"):
        torch.accelerator.synchronize()
    torch.accelerator.synchronize()  # told once


def test_another_thread_waits_while_this_one_enqueues(sim: ModuleType, executor: str) -> None:
    """A host worker waits for events of work that another thread enqueues, as the host lane does."""
    d2h = torch.Stream("sim")
    x = torch.zeros(1000, device="sim")
    host = torch.empty(1000, pin_memory=True)
    seen: list[float] = []
    events: list[torch.Event] = []
    ready, taken = threading.Semaphore(0), threading.Semaphore(0)

    def worker() -> None:
        for i in range(20):
            ready.acquire()
            events[i].synchronize()
            seen.append(host.mean().item())
            taken.release()

    thread = threading.Thread(target=worker)
    thread.start()
    for _ in range(20):
        x.add_(1)
        d2h.wait_stream(torch.accelerator.current_stream())
        with d2h:
            host.copy_(x, non_blocking=True)
        torch.accelerator.current_stream().wait_stream(d2h)
        events.append(d2h.record_event())
        ready.release()
        taken.acquire()
    thread.join()
    assert seen == [float(i) for i in range(1, 21)]
    assert sim.races() == []


def test_streams_come_from_a_pool_of_32(sim: ModuleType) -> None:
    ids = [torch.Stream("sim").stream_id for _ in range(65)]
    assert len(set(ids)) == 32
    assert 0 not in ids
    assert ids[0] == ids[32] == ids[64]


def test_threads_leave_when_the_executor_changes(sim: ModuleType) -> None:
    """Pitfall: workers that stay behind would run work of the next executor."""
    sim.configure("threads")
    for _ in range(40):
        with torch.Stream("sim"):
            torch.ones(10, device="sim").add_(1)
    sim.configure("lazy")
    x = torch.ones(10, device="sim").add_(1)
    assert not torch.accelerator.current_stream().query()
    assert torch.equal(x.cpu(), torch.full((10,), 2.0))


def test_random_is_repeatable_and_depends_on_the_seed(sim: ModuleType) -> None:
    streams = [torch.Stream("sim") for _ in range(8)]

    def order(seed: int) -> float:
        """Unordered on purpose: what comes out is the order in which it ran."""
        sim.configure("random", seed, races=False)
        x = torch.zeros((), device="sim")
        torch.accelerator.synchronize()
        for i, stream in enumerate(streams):
            with stream:
                x.mul_(3).add_(i)
        torch.accelerator.synchronize()
        return x.item()

    assert order(1) == order(1)
    assert len({order(seed) for seed in range(10)}) > 1


def test_counts_host_waits(sim: ModuleType) -> None:
    sim.configure("lazy")
    x = torch.ones(10, device="sim")
    host = torch.empty(10, pin_memory=True)
    host.copy_(x, non_blocking=True)
    torch.accelerator.synchronize()
    assert sim.counts()[1] == 0
    for num_waits, wait in enumerate(
        [lambda: x.sum().item(), lambda: x.cpu(), lambda: x.nonzero(), lambda: torch.equal(x, x), lambda: x.tolist()],
        start=1,
    ):
        wait()
        assert sim.counts()[1] == num_waits
