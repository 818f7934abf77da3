"""Two emulated devices: memory, streams, generators and rates of their own, and copies between them."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

NUM_BYTES = 4 << 20
EXECUTORS = ["sync", "threads", "lazy", "eager", "random"]


@pytest.fixture(autouse=True)
def _first_device_again(sim: ModuleType) -> None:
    assert torch.accelerator.current_device_index() == 0


def test_where_tensors_are(sim: ModuleType) -> None:
    assert torch.accelerator.device_count() == 2
    x = torch.ones(4, 4, device="sim:1")
    assert x.device == torch.device("sim", 1)
    for result in (x + 1, x @ x, x[0], x.sum(), torch.empty_like(x), x.nonzero(), torch.zeros(3, device="sim:1")):
        assert result.device == torch.device("sim", 1)
    assert torch.ones(2, device="sim").device == torch.device("sim", 0)
    torch.accelerator.set_device_index(1)
    assert torch.ones(2, device="sim").device == torch.device("sim", 1)
    assert torch.sim.current_device() == 1
    with torch.sim.device(0):
        assert torch.ones(2, device="sim").device == torch.device("sim", 0)
    assert torch.accelerator.current_device_index() == 1
    torch.accelerator.set_device_index(0)


def test_tensors_on_both_are_an_error(sim: ModuleType) -> None:
    x, y = torch.ones(4, device="sim:0"), torch.ones(4, device="sim:1")
    with pytest.raises(RuntimeError, match="found at least two devices, sim:0 and sim:1"):
        x + y
    with pytest.raises(RuntimeError, match="sim has devices 0 to 1, not 2"):
        torch.ones(4, device="sim:2")


def test_memory_is_counted_apart(sim: ModuleType) -> None:
    before = [torch.accelerator.memory_allocated(i) for i in range(2)]
    x = torch.ones(1000, device="sim:1")
    assert torch.accelerator.memory_allocated(0) == before[0]
    assert torch.accelerator.memory_allocated(1) == before[1] + 4096
    del x
    assert torch.accelerator.memory_allocated(1) == before[1]
    with pytest.raises(torch.OutOfMemoryError, match="Device 1 has a total capacity"):
        torch.empty(2 << 30, dtype=torch.uint8, device="sim:1")


@pytest.mark.parametrize("executor", EXECUTORS)
def test_peer_copy(sim: ModuleType, executor: str) -> None:
    """Ordered after what both devices' current streams hold, and before what they are given next."""
    sim.configure(executor)
    x, y = torch.zeros(1000, device="sim:0"), torch.zeros(1000, device="sim:1")
    for _ in range(3):
        x.add_(1)
        y.copy_(x)
        y.mul_(2)
        x.copy_(y)
    assert torch.equal(x.cpu(), torch.full((1000,), 14.0))
    assert torch.equal(y.t().to("sim:0").cpu(), x.cpu())
    assert sim.races() == []


def test_missing_wait_between_devices(sim: ModuleType) -> None:
    x = torch.zeros(1000, device="sim:1")
    side = torch.Stream("sim:1")
    with side:
        x.add_(1)
    (report,) = sim.races()
    assert "writes on stream 1 of sim:1" in report or "of sim:1" in report
    assert "of a block of 4000 on sim:1" in report


def test_streams_and_events_across_devices(sim: ModuleType) -> None:
    sim.configure("lazy")
    x = torch.zeros(1000, device="sim:0")
    host = torch.empty(1000, pin_memory=True)
    down = torch.Stream("sim:0")
    down.wait_stream(torch.accelerator.current_stream(torch.device("sim", 0)))
    with down:
        host.copy_(x.add_(1), non_blocking=True)
    other = torch.accelerator.current_stream(torch.device("sim", 1))
    other.wait_event(down.record_event())
    y = torch.empty(1000, device="sim:1")
    y.copy_(host, non_blocking=True)
    assert torch.equal(y.cpu(), torch.ones(1000))
    x.record_stream(down)
    assert sim.races() == []


def test_random_numbers(sim: ModuleType) -> None:
    torch.manual_seed(3)
    first = [torch.rand(8, device=f"sim:{i}").cpu() for i in range(2)]
    assert torch.equal(*first)  # both devices were given the seed
    state = torch.sim.get_rng_state(1)
    second = torch.rand(8, device="sim:1").cpu()
    torch.rand(8, device="sim:0")
    torch.sim.set_rng_state(state, 1)
    assert torch.equal(torch.rand(8, device="sim:1").cpu(), second)


def test_backward_on_both(sim: ModuleType) -> None:
    x = torch.ones(8, device="sim:0", requires_grad=True)
    y = torch.ones(8, device="sim:1", requires_grad=True)
    ((x * 2).to("sim:1") * y).sum().backward()
    assert x.grad.device == x.device
    assert torch.equal(x.grad.cpu(), torch.full((8,), 2.0))
    assert torch.equal(y.grad.cpu(), torch.full((8,), 2.0))
    assert sim.races() == []


def test_rates_of_their_own(sim: ModuleType) -> None:
    host = torch.empty(NUM_BYTES, dtype=torch.uint8, pin_memory=True)
    tensors = [torch.zeros(NUM_BYTES, dtype=torch.uint8, device=f"sim:{i}") for i in range(2)]
    sim.set_profile(latency_s=0, launch_s=0, peer_bytes_per_s=4e9)
    sim.set_profile(device=0, h2d_bytes_per_s=1e9)
    sim.set_profile(device=1, h2d_bytes_per_s=2e9, peer_bytes_per_s=8e9)
    sim.configure("lazy")
    for tensor in tensors:
        tensor.copy_(host, non_blocking=True)
    up, up_1 = sim.trace()
    assert (up.device, up.end_s) == (0, pytest.approx(NUM_BYTES / 1e9))
    assert (up_1.device, up_1.start_s, up_1.end_s) == (1, 0, pytest.approx(NUM_BYTES / 2e9))
    torch.accelerator.synchronize(0)
    torch.accelerator.synchronize(1)
    sim.configure("lazy")
    tensors[1].copy_(tensors[0])
    tensors[0].copy_(tensors[1])
    there, back = sim.trace()
    assert (there.engine, there.device, there.end_s) == ("peer", 0, pytest.approx(NUM_BYTES / 4e9))
    assert (back.engine, back.device, back.end_s - back.start_s) == ("peer", 1, pytest.approx(NUM_BYTES / 8e9))
    assert back.start_s == there.end_s  # the same tensors
    with pytest.raises(ValueError, match="device must be from 0 to 1, not 2"):
        sim.set_profile(device=2, h2d_bytes_per_s=1e9)
