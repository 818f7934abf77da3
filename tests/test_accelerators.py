"""What differs between accelerators."""

from __future__ import annotations

import gc
import mmap
from types import ModuleType

import pytest
import torch

from offload.accelerators import Accelerator, DeviceMemory, accelerator_for
from offload.accelerators.sim import SimAccelerator

PAGE_BYTES = mmap.PAGESIZE


@pytest.fixture
def accelerator(sim: ModuleType) -> Accelerator:
    return accelerator_for(torch.device("sim"))


def test_accelerator_for(sim: ModuleType) -> None:
    accelerator = accelerator_for(torch.device("sim"))
    assert type(accelerator) is SimAccelerator
    assert accelerator.device == torch.device("sim", 0)
    with pytest.raises(ValueError, match="no accelerator for device 'cpu'; accepted is one of type 'sim'"):
        accelerator_for(torch.device("cpu"))
    with pytest.raises(TypeError, match=r"must be a torch\.device"):
        accelerator_for("sim")  # type: ignore[arg-type]


@pytest.mark.parametrize("num_bytes", [1, PAGE_BYTES, PAGE_BYTES + 1, 3 * PAGE_BYTES])
def test_pinned_empty(accelerator: Accelerator, num_bytes: int) -> None:
    pinned = accelerator.pinned_empty(num_bytes)
    assert pinned.shape == (-(-num_bytes // PAGE_BYTES) * PAGE_BYTES,)
    assert pinned.dtype == torch.uint8
    assert pinned.is_pinned()
    assert pinned.data_ptr() % PAGE_BYTES == 0


@pytest.mark.parametrize("num_bytes", [0, -1])
def test_pinned_empty_of_nothing(accelerator: Accelerator, num_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"cannot pin {num_bytes} bytes"):
        accelerator.pinned_empty(num_bytes)


def test_memory(accelerator: Accelerator, sim: ModuleType) -> None:
    before = accelerator.memory()
    accelerator.reset_peak_memory()
    x = torch.empty(1 << 20, dtype=torch.uint8, device="sim")
    del x
    y = torch.empty(1 << 10, dtype=torch.uint8, device="sim")
    after = accelerator.memory()
    assert after.allocated_bytes - before.allocated_bytes == 1 << 10
    assert after.peak_allocated_bytes - before.allocated_bytes == 1 << 20
    assert after.total_bytes == 1 << 30
    assert after.free_bytes == after.total_bytes - after.reserved_bytes
    accelerator.reset_peak_memory()
    assert accelerator.memory().peak_allocated_bytes == after.allocated_bytes
    del y


def test_host_work_is_declared_to_the_race_detector(accelerator: Accelerator, sim: ModuleType) -> None:
    sim.configure("lazy")
    pinned = accelerator.pinned_empty(PAGE_BYTES)
    torch.zeros(PAGE_BYTES, dtype=torch.uint8, device="sim").copy_(pinned, non_blocking=True)
    accelerator.declare_host_work("host update", reads=[pinned], writes=[])
    assert sim.races() == []
    accelerator.declare_host_work("host update", reads=[], writes=[pinned[: PAGE_BYTES // 2], pinned[:0]])
    (report,) = sim.races()
    assert report.startswith("host update writes on the host (")
    assert "unordered after h2d reads on stream 0" in report
    assert f"{PAGE_BYTES // 2} bytes of host memory" in report


def test_host_time_is_charged(accelerator: Accelerator, sim: ModuleType) -> None:
    start_s = sim.host_time_s()
    accelerator.charge_host_time(0.5)
    assert sim.host_time_s() - start_s == 0.5
    accelerator.host_join(accelerator.host_mark())


def test_emulated_machine_says_what_an_update_takes(accelerator: Accelerator, sim: ModuleType) -> None:
    sim.set_profile(host_update_params_per_s=1e6)
    sim.configure()
    accelerator.charge_host_time(123.0, "update", numel=2_000_000, num_bytes=56_000_000)
    assert sim.host_time_s() == 2.0
    sim.reset()
    accelerator.charge_host_time(0.25, "update", numel=2_000_000)
    assert sim.host_time_s() == 0.25


@pytest.mark.parametrize("executor", ["sync", "threads", "lazy"])
def test_host_time_is_on_the_clock_of_events(accelerator: Accelerator, sim: ModuleType, executor: str) -> None:
    """Virtual or real: two events lie between the readings around them."""
    sim.configure(executor)
    stream = torch.accelerator.current_stream()
    events = [torch.Event("sim", enable_timing=True) for _ in range(2)]
    first_s = accelerator.host_time_s()
    events[0].record(stream)
    torch.ones(1 << 16, device="sim").add_(1)
    events[1].record(stream)
    events[1].synchronize()
    between_s = events[0].elapsed_time(events[1]) / 1e3
    assert 0 < between_s <= accelerator.host_time_s() - first_s


def test_base_class_ignores_what_only_an_emulator_needs(sim: ModuleType) -> None:
    accelerator = Accelerator(torch.device("sim", 0))
    accelerator.declare_host_work("update", [torch.ones(3)], [torch.ones(3)])
    accelerator.charge_host_time(1.0)
    accelerator.own_host_clock()
    accelerator.host_join(accelerator.host_mark())
    assert sim.host_time_s() == 0
    assert isinstance(accelerator.memory(), DeviceMemory)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_bytes", [1, PAGE_BYTES + 1, 5 << 20])
def test_cuda_pins_exactly_and_unpins(num_bytes: int) -> None:
    accelerator = accelerator_for(torch.device("cuda"))
    pinned = accelerator.pinned_empty(num_bytes)
    view = pinned[:1]
    assert pinned.numel() == -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
    assert pinned.data_ptr() % PAGE_BYTES == 0
    pinned.fill_(3)
    on_device = torch.empty_like(pinned, device="cuda")
    on_device.copy_(pinned, non_blocking=True)
    torch.accelerator.synchronize()
    assert torch.equal(on_device.cpu(), pinned)
    address = pinned.data_ptr()
    del pinned
    gc.collect()
    assert view.is_pinned()
    del view
    gc.collect()
    assert int(torch.cuda.cudart().cudaHostUnregister(address)) != 0  # not registered any more


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_memory() -> None:
    accelerator = accelerator_for(torch.device("cuda"))
    before = accelerator.memory().allocated_bytes
    x = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    assert accelerator.memory().allocated_bytes - before == x.nbytes
