"""The race detector of the emulated device names every missing wait, in one run, and is silent when none is missing.

The workload is the kind of program that the runtime is: AdamW over subgroups of which some are updated on the device,
in two slots that are refilled while others drain, and some on the host from pinned staging buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

NUM_SUBGROUPS, NUMEL, NUM_STEPS = 12, 3000, 2
ON_HOST = [i for i in range(NUM_SUBGROUPS) if i % 5 in (0, 4)]
# The last flush comes after the last gradient, the last upload after the last prefetch: no other wait covers for them.
ORDER = [*range(NUM_SUBGROUPS - 2), NUM_SUBGROUPS - 1, NUM_SUBGROUPS - 2]

# Removing any of these waits is a bug. What else shows it (besides the race detector): executors that go wrong.
WAITS = {
    "update waits for prefetch": {"lazy", "eager"},
    "flush waits for update": {"lazy"},
    "prefetch waits for slot": {"eager"},
    "gradient copy waits for backward": {"lazy"},
    "host waits for gradient": {"lazy", "eager"},
    "host waits for staging": {"lazy"},
    "next forward waits for parameters": {"lazy", "eager"},
    "host waits for flush": {"lazy", "eager"},
}


def adamw(master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int) -> None:
    exp_avg.mul_(0.9).add_(grad, alpha=0.1)
    exp_avg_sq.mul_(0.95).addcmul_(grad, grad, value=0.05)
    denominator = (exp_avg_sq / (1 - 0.95**step)).sqrt_().add_(1e-8)
    master.mul_(1 - 1e-4).addcdiv_(exp_avg, denominator, value=-1e-2 / (1 - 0.9**step))


def initial_values() -> tuple[list[list[Tensor]], Tensor]:
    generator = torch.Generator().manual_seed(0)
    masters = [torch.randn(NUMEL, generator=generator) for _ in range(NUM_SUBGROUPS)]
    targets = torch.randn(NUM_SUBGROUPS, NUMEL, generator=generator)
    return [[master, torch.zeros(NUMEL), torch.zeros(NUMEL)] for master in masters], targets


def reference() -> Tensor:
    states, targets = initial_values()
    for step in range(1, NUM_STEPS + 1):
        for i, (master, exp_avg, exp_avg_sq) in enumerate(states):
            adamw(master, (master.bfloat16().float() - targets[i]) * (1 + i), exp_avg, exp_avg_sq, step)
    return torch.stack([state[0] for state in states])


class Interleaved:
    """The workload on device "sim", without the wait called ``removed``."""

    def __init__(self, sim: ModuleType, removed: str | None) -> None:
        self.sim, self.removed = sim, removed
        states, targets = initial_values()
        self.states = [[tensor.pin_memory() for tensor in state] for state in states]
        self.compute = torch.accelerator.current_stream()
        self.h2d, self.d2h = torch.Stream("sim"), torch.Stream("sim")
        self.params = [state[0].bfloat16().to("sim") for state in states]
        self.targets = targets.to("sim")
        self.slots = [[torch.empty(NUMEL, device="sim") for _ in range(3)] for _ in range(2)]
        self.drained: list[torch.Event | None] = [None, None]
        self.host_grads = [torch.empty(NUMEL, pin_memory=True) for _ in range(2)]
        self.staging = [torch.empty(NUMEL, dtype=torch.bfloat16, pin_memory=True) for _ in range(2)]
        self.uploaded: list[torch.Event | None] = [None, None]

    def wait(self, name: str, wait: Callable[[torch.Event], None], event: torch.Event | None) -> None:
        assert name in WAITS
        if name != self.removed and event is not None:
            wait(event)

    def run(self) -> Tensor:
        for step in range(1, NUM_STEPS + 1):
            self.step(step)
        self.wait("host waits for flush", torch.Event.synchronize, self.d2h.record_event())
        for state in self.states:
            self.sim.host_access(state[0], False, "checkpoint")
        return torch.stack([state[0].clone() for state in self.states])

    def step(self, step: int) -> None:
        grads = [(self.params[i].float() - self.targets[i]) * (1 + i) for i in range(NUM_SUBGROUPS)]
        self.wait("gradient copy waits for backward", self.d2h.wait_event, self.compute.record_event())
        fetched = {}
        num_on_device = 0
        for i in ORDER:
            if i in ON_HOST:
                k = ON_HOST.index(i)
                for ahead in range(k, min(k + 2, len(ON_HOST))):
                    if ahead not in fetched:
                        fetched[ahead] = self.fetch(grads[ON_HOST[ahead]], ahead % 2)
                self.update_on_host(i, k % 2, fetched[k], step)
            else:
                self.update_on_device(i, num_on_device % 2, grads[i], step)
                num_on_device += 1
        self.wait("next forward waits for parameters", self.compute.wait_event, self.h2d.record_event())
        for i in ON_HOST:
            grads[i].record_stream(self.d2h)

    def fetch(self, grad: Tensor, buffer: int) -> torch.Event:
        with self.d2h:
            self.host_grads[buffer].copy_(grad, non_blocking=True)
        return self.d2h.record_event()

    def update_on_device(self, i: int, k: int, grad: Tensor, step: int) -> None:
        slot = self.slots[k]
        self.wait("prefetch waits for slot", self.h2d.wait_event, self.drained[k])
        if step > 1:
            self.h2d.wait_event(self.d2h.record_event())  # the state was flushed in the step before
        with self.h2d:
            for device, host in zip(slot, self.states[i], strict=True):
                device.copy_(host, non_blocking=True)
        self.wait("update waits for prefetch", self.compute.wait_event, self.h2d.record_event())
        adamw(slot[0], grad, slot[1], slot[2], step)
        self.params[i].copy_(slot[0])
        self.wait("flush waits for update", self.d2h.wait_event, self.compute.record_event())
        with self.d2h:
            for device, host in zip(slot, self.states[i], strict=True):
                host.copy_(device, non_blocking=True)
        self.drained[k] = self.d2h.record_event()

    def update_on_host(self, i: int, k: int, fetched: torch.Event, step: int) -> None:
        self.wait("host waits for gradient", torch.Event.synchronize, fetched)
        self.sim.host_access(self.host_grads[k], False, "host update")
        for tensor in self.states[i]:
            self.sim.host_access(tensor, True, "host update")
        adamw(self.states[i][0], self.host_grads[k], *self.states[i][1:], step)
        self.wait("host waits for staging", torch.Event.synchronize, self.uploaded[k])
        self.sim.host_access(self.staging[k], True, "cast")
        self.staging[k].copy_(self.states[i][0])
        # No wait for backward: the host has waited for a gradient that came after it.
        with self.h2d:
            self.params[i].copy_(self.staging[k], non_blocking=True)
        self.uploaded[k] = self.h2d.record_event()


EXECUTORS = [("sync", 0), ("threads", 0), ("lazy", 0), ("eager", 0), ("random", 0), ("random", 1), ("random", 2)]


@pytest.mark.parametrize(("executor", "seed"), EXECUTORS)
def test_nothing_removed(sim: ModuleType, executor: str, seed: int) -> None:
    sim.configure(executor, seed)
    assert torch.equal(Interleaved(sim, None).run(), reference())
    assert sim.races() == []


@pytest.mark.parametrize("executor", ["sync", "lazy", "random"])
@pytest.mark.parametrize("removed", WAITS)
def test_missing_wait_is_named(sim: ModuleType, removed: str, executor: str) -> None:
    sim.configure(executor, poison=False)
    Interleaved(sim, removed).run()
    assert sim.races(), f"nothing reported without {removed!r}"


@pytest.mark.parametrize("removed", WAITS)
def test_missing_wait_gives_wrong_numbers(sim: ModuleType, removed: str) -> None:
    wrong = set()
    for executor in ("sync", "lazy", "eager"):
        sim.configure(executor)
        if not torch.equal(Interleaved(sim, removed).run(), reference()):
            wrong.add(executor)
    assert wrong == WAITS[removed]


def two_streams(sim: ModuleType, waits: bool) -> None:
    side = torch.Stream("sim")
    x = torch.zeros(1000, device="sim")
    if waits:
        side.wait_stream(torch.accelerator.current_stream())
    with side:
        x.add_(1)
    x.record_stream(side)


def test_report_names_both_operations(sim: ModuleType) -> None:
    two_streams(sim, waits=False)
    (report,) = sim.races()
    assert report.startswith("aten::add.out writes on stream ")
    assert "unordered after aten::zero_ writes on stream 0 (" in report
    assert report.count("test_sim_races.py:") >= 2  # call sites of both
    assert "in two_streams" in report
    assert "4000 bytes of device memory" in report
    sim.clear_races()
    assert sim.races() == []


def test_waiting_stream_is_silent(sim: ModuleType) -> None:
    two_streams(sim, waits=True)
    assert sim.races() == []


def test_no_reports_when_off(sim: ModuleType) -> None:
    sim.configure(races=False)
    two_streams(sim, waits=False)
    assert sim.races() == []


def test_fresh_memory_belongs_to_any_stream(sim: ModuleType) -> None:
    """Recycled memory does not, while work of its former owner may still be queued."""
    torch.accelerator.empty_cache()
    side = torch.Stream("sim")
    host = torch.zeros(1000, pin_memory=True)
    for former_use in ("none", "over", "queued"):
        if former_use != "none":
            torch.zeros(1000, device="sim")  # and freed
        if former_use == "over":
            torch.accelerator.synchronize()
        x = torch.empty(1000, device="sim")
        with side:
            x.copy_(host, non_blocking=True)
        torch.accelerator.synchronize()
        assert bool(sim.races()) is (former_use == "queued")
        del x


def free_while_side_reads(sim: ModuleType) -> torch.Stream:
    """Memory of the current stream that another still reads when it is freed."""
    side = torch.Stream("sim")
    x = torch.zeros(1000, device="sim")
    side.wait_stream(torch.accelerator.current_stream())
    with side:
        x + 1
    del x
    return side


def test_freeing_alone_is_no_use(sim: ModuleType) -> None:
    """FSDP2 frees gradients so: they belong to the stream that reduced them, which waits before it reduces again."""
    side = free_while_side_reads(sim)
    torch.empty(500, device="sim")
    torch.accelerator.current_stream().wait_stream(side)
    torch.zeros(1000, device="sim")
    assert sim.races() == []


@pytest.mark.parametrize("numel", [100, 1000, 5000])
def test_freed_memory_may_come_back_in_any_size(sim: ModuleType, numel: int) -> None:
    """Which piece an allocation gets is the allocator's affair: the program must be right with any."""
    free_while_side_reads(sim)
    torch.ones(10, device="sim").cpu()  # the host knows of the current stream only
    sim.clear_races()
    y = torch.empty(numel, device="sim")
    y.zero_()
    (report,) = sim.races()
    assert report.startswith("aten::zero_ writes on stream 0 (")
    assert "memory just allocated, unordered after aten::add.out reads on stream " in report
    assert "and was freed: record_stream is missing, or a wait for that stream" in report
    assert "in free_while_side_reads" in report


def test_memory_of_other_streams_stays_theirs(sim: ModuleType) -> None:
    free_while_side_reads(sim)
    with torch.Stream("sim"):
        torch.zeros(1000, device="sim")
    assert sim.races() == []


def test_record_stream_ends_only_the_uses_of_that_stream(sim: ModuleType) -> None:
    """Those of the memory's own stream may still be queued when a third stream gets to use it."""
    torch.accelerator.empty_cache()
    side = torch.Stream("sim")
    x = torch.zeros(1000, device="sim")
    side.wait_stream(torch.accelerator.current_stream())
    with side:
        x + 1
    kept = x * 2
    x.record_stream(side)
    del x  # and not kept, whose memory would do as well
    y = torch.empty(1000, device="sim")
    with torch.Stream("sim"):
        y.zero_()
    (report,) = sim.races()
    assert "unordered after aten::mul.out reads on stream 0 (" in report
    del kept


def test_own_host_clock_separates_threads(sim: ModuleType) -> None:
    """A worker's update is ordered before the copy of its result only if the copy's thread has joined it."""
    from concurrent.futures import ThreadPoolExecutor

    state = torch.zeros(1000, pin_memory=True)
    device = torch.empty(1000, device="sim")

    def update() -> object:
        sim.own_host_clock()
        sim.host_access(state, True, "host update")
        return sim.host_mark()

    with ThreadPoolExecutor(1) as worker:
        for joins in (True, False):
            mark = worker.submit(update).result()
            if joins:
                sim.host_join(mark)
            device.copy_(state, non_blocking=True)
            torch.accelerator.synchronize()
            assert bool(sim.races()) is not joins
