"""Virtual time: rates, latencies and duplex come out as configured, the same in every order of execution."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

NUM_BYTES = 4 << 20
RATES = {
    "h2d_bytes_per_s": 1e9,
    "d2h_bytes_per_s": 2e9,
    "pageable_bytes_per_s": 0.25e9,
    "memory_bytes_per_s": 1e12,
    "flops": 1e12,
    "latency_s": 1e-5,
    "launch_s": 0.0,
}


@pytest.fixture
def device(sim: ModuleType) -> torch.Tensor:
    tensor = torch.zeros(NUM_BYTES, dtype=torch.uint8, device="sim")
    sim.set_profile(**RATES)
    sim.configure("lazy")
    return tensor


def h2d(device: torch.Tensor, host: torch.Tensor) -> torch.Stream:
    stream = torch.Stream("sim")
    with stream:
        device.copy_(host, non_blocking=True)
    return stream


def test_link_rates_and_latency(sim: ModuleType, device: torch.Tensor) -> None:
    host = torch.empty(NUM_BYTES, dtype=torch.uint8, pin_memory=True)
    h2d(device, host).synchronize()
    assert sim.host_time_s() == pytest.approx(1e-5 + NUM_BYTES / 1e9)
    start_s = sim.host_time_s()
    host.copy_(device)
    assert sim.host_time_s() - start_s == pytest.approx(1e-5 + NUM_BYTES / 2e9)


def test_directions_overlap_and_one_direction_does_not(sim: ModuleType, device: torch.Tensor) -> None:
    hosts = [torch.empty(NUM_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    other = torch.empty_like(device)
    sim.configure("lazy")
    h2d(device, hosts[0])
    side = torch.Stream("sim")
    with side:
        hosts[1].copy_(other, non_blocking=True)
    torch.accelerator.synchronize()
    assert sim.host_time_s() == pytest.approx(1e-5 + NUM_BYTES / 1e9)

    sim.configure("lazy")
    h2d(device, hosts[0])
    h2d(other, hosts[1])
    torch.accelerator.synchronize()
    assert sim.host_time_s() == pytest.approx(2 * (1e-5 + NUM_BYTES / 1e9))


def test_pageable_memory_is_slower_and_makes_the_host_wait(sim: ModuleType, device: torch.Tensor) -> None:
    host = torch.empty(NUM_BYTES, dtype=torch.uint8)
    device.copy_(host, non_blocking=True)
    assert sim.host_time_s() == pytest.approx(1e-5 + NUM_BYTES / 0.25e9)
    assert sim.counts() == (1, 1)


def test_compute_takes_flops_or_bytes(sim: ModuleType, device: torch.Tensor) -> None:
    x = torch.ones(256, 256, device="sim")
    sim.configure("lazy")
    x @ x
    torch.accelerator.synchronize()
    assert sim.host_time_s() == pytest.approx(2 * 256**3 / 1e12)
    sim.configure("lazy")
    x.add_(1)
    torch.accelerator.synchronize()
    assert sim.host_time_s() == pytest.approx(2 * x.nbytes / 1e12)  # read and written


def test_copy_that_must_wait_does_not_hold_up_others(sim: ModuleType, device: torch.Tensor) -> None:
    """Enqueued first, but after long work: the link serves the copy behind it meanwhile."""
    hosts = [torch.empty(NUM_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    other = torch.empty_like(device)
    x = torch.ones(2048, 2048, device="sim")
    sim.configure("lazy")
    x @ x
    late = torch.Stream("sim")
    late.wait_stream(torch.accelerator.current_stream())
    with late:
        device.copy_(hosts[0], non_blocking=True)
    early = h2d(other, hosts[1])
    early.synchronize()
    copy_s = 1e-5 + NUM_BYTES / 1e9
    assert sim.host_time_s() == pytest.approx(copy_s)
    late.synchronize()
    assert sim.host_time_s() == pytest.approx(2 * 2048**3 / 1e12 + copy_s)


@pytest.mark.parametrize("executor", ["sync", "threads", "lazy", "eager", "random"])
def test_time_does_not_depend_on_the_executor(sim: ModuleType, device: torch.Tensor, executor: str) -> None:
    host = torch.empty(NUM_BYTES, dtype=torch.uint8, pin_memory=True)
    sim.configure(executor)
    stream = h2d(device, host)
    torch.accelerator.current_stream().wait_stream(stream)
    device.add_(1)
    torch.accelerator.synchronize()
    assert sim.host_time_s() == pytest.approx(1e-5 + NUM_BYTES / 1e9 + 2 * NUM_BYTES / 1e12)


def test_event_timing(sim: ModuleType, device: torch.Tensor) -> None:
    host = torch.empty(NUM_BYTES, dtype=torch.uint8, pin_memory=True)
    begin, end = (torch.Event("sim", enable_timing=True) for _ in range(2))
    stream = torch.Stream("sim")
    with stream:
        begin.record(stream)
        device.copy_(host, non_blocking=True)
        end.record(stream)
    end.synchronize()
    assert begin.elapsed_time(end) == pytest.approx(1e3 * (1e-5 + NUM_BYTES / 1e9))
    with pytest.raises((RuntimeError, ValueError), match="enable_timing=True"):
        stream.record_event().elapsed_time(end)


def test_launch_cost_is_the_hosts(sim: ModuleType, device: torch.Tensor) -> None:
    sim.set_profile(launch_s=1e-3)
    sim.configure("lazy")
    device.add_(1)
    device.add_(1)
    assert sim.host_time_s() == pytest.approx(2e-3)


def test_trace(sim: ModuleType, device: torch.Tensor) -> None:
    host = torch.empty(NUM_BYTES, dtype=torch.uint8, pin_memory=True)
    sim.configure("lazy")
    stream = h2d(device, host)
    sim.host_charge(0.5, "host update", num_bytes=28)
    copy, work = sim.trace()
    assert copy == ("h2d", stream.stream_id, "h2d", 0.0, pytest.approx(1e-5 + NUM_BYTES / 1e9), 0, NUM_BYTES)
    assert work == ("host update", -1, "host", 0.0, 0.5, 0, 28)
    stream.synchronize()


def test_worker_with_its_own_clock_overlaps(sim: ModuleType) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def update(submitted: object) -> tuple[float, object]:
        sim.own_host_clock()
        sim.host_join(submitted)
        sim.host_charge(1.0, "host update")
        return sim.host_time_s(), sim.host_mark()

    sim.host_charge(0.25)
    with ThreadPoolExecutor(1) as worker:
        time_s, mark = worker.submit(update, sim.host_mark()).result()
    assert time_s == 1.25
    assert sim.host_time_s() == 0.25
    sim.host_join(mark)
    assert sim.host_time_s() == 1.25


def test_configure_starts_at_zero(sim: ModuleType) -> None:
    torch.ones(10, device="sim").add_(1)
    sim.host_charge(1.0)
    sim.configure()
    assert sim.host_time_s() == 0
    assert sim.counts() == (0, 0)
    assert sim.trace() == []


@pytest.mark.parametrize("rate", ["h2d_bytes_per_s", "flops", "launch_s"])
def test_bad_rate(sim: ModuleType, rate: str) -> None:
    with pytest.raises(ValueError, match=f"{rate} must be positive, not -1"):
        sim.set_profile(**{rate: -1})
    with pytest.raises(ValueError, match="must not be negative"):
        sim.host_charge(-1.0)
    with pytest.raises(ValueError, match="executor must be one of sync, threads"):
        sim.configure("slow")
