"""Memory of the emulated device: capacity, statistics, poison, pinned host memory, and no access by the host."""

from __future__ import annotations

import gc
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from offload.accelerators import sim_device


def test_out_of_memory(sim: ModuleType) -> None:
    sim.configure(capacity="8MiB")
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 16777216 bytes.*capacity of 8388608 bytes"):
        torch.empty(16 << 20, dtype=torch.uint8, device="sim")
    torch.empty(7 << 20, dtype=torch.uint8, device="sim")


def test_out_of_memory_gives_cache_back_first(sim: ModuleType) -> None:
    sim.configure("lazy", capacity="8MiB")
    for mebibytes in (3, 4, 5, 6, 7):
        x = torch.zeros(mebibytes << 20, dtype=torch.uint8, device="sim")
        del x
    assert torch.accelerator.memory_stats()["num_ooms"] == 0


def test_capacity_cannot_change_under_tensors(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim_device, "RELEASE_TIMEOUT_S", 0.0)
    x = torch.ones(1000, device="sim")
    with pytest.raises(RuntimeError, match="4096 bytes of device memory are in use"):
        sim.configure(capacity="2GiB")
    sim.configure("lazy", capacity="1GiB")  # unchanged
    assert x.sum().item() == 1000


def test_capacity_waits_for_tensors_that_other_threads_let_go_of(
    sim: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd's threads drop the last of a backward that failed only after the error is out."""
    held = [torch.ones(1000, device="sim")]
    monkeypatch.setattr(sim_device.time, "sleep", lambda seconds: held.clear())
    sim.configure(capacity="2GiB")
    assert torch.accelerator.get_memory_info() == (2 << 30, 2 << 30)


@pytest.mark.parametrize("capacity", [0, -1, "1 parsec", "GiB", "0GiB"])
def test_bad_capacity(sim: ModuleType, capacity: int | str) -> None:
    with pytest.raises(ValueError, match="capacity must be a positive"):
        sim.configure(capacity=capacity)


def test_untouched_capacity_costs_nothing(sim: ModuleType) -> None:
    sim.configure(capacity="80GiB", poison=False)
    x = torch.empty(60 << 30, dtype=torch.uint8, device="sim")
    x[1 << 30 : (1 << 30) + 8] = 7
    assert x[(1 << 30) + 7].item() == 7


def test_statistics(sim: ModuleType) -> None:
    before = torch.accelerator.memory_allocated()
    torch.accelerator.reset_peak_memory_stats()
    x = torch.empty(1000, device="sim")  # 4000 bytes, rounded up to 4096
    y = torch.empty(1 << 20, dtype=torch.uint8, device="sim")
    assert torch.accelerator.memory_allocated() - before == 4096 + (1 << 20)
    del y
    assert torch.accelerator.memory_allocated() - before == 4096
    assert torch.accelerator.max_memory_allocated() - before == 4096 + (1 << 20)
    assert torch.accelerator.memory_reserved() >= 4096 + (1 << 20)
    free, total = torch.accelerator.get_memory_info()
    assert total == 1 << 30
    assert free == total - torch.accelerator.memory_reserved()
    del x
    torch.accelerator.empty_cache()
    assert torch.accelerator.memory_reserved() == before


def test_freed_block_is_reused_by_its_stream_only(sim: ModuleType) -> None:
    x = torch.empty(1000, device="sim")
    address = x.data_ptr()
    del x
    with torch.Stream("sim"):
        other = torch.empty(1000, device="sim")
    same = torch.empty(1000, device="sim")
    assert other.data_ptr() != address
    assert same.data_ptr() == address


@pytest.mark.parametrize("executor", ["sync", "lazy"])
def test_fresh_and_freed_memory_reads_nan(sim: ModuleType, executor: str) -> None:
    sim.configure(executor)
    assert torch.empty(1000, device="sim").isnan().all().item()
    x = torch.zeros(1000, device="sim")
    storage_view = torch.empty(0, device="sim")
    storage_view.set_(x.untyped_storage(), 0, (1000,))
    assert not storage_view.isnan().any().item()
    del x, storage_view
    assert torch.empty(1000, device="sim").isnan().all().item()


def test_no_poison(sim: ModuleType) -> None:
    sim.configure(poison=False)
    torch.full((1000,), 3.0, device="sim")
    assert torch.equal(torch.empty(1000, device="sim").cpu(), torch.full((1000,), 3.0))


@pytest.mark.parametrize("executor", ["sync", "lazy", "eager"])
def test_recycled_memory_is_full_of_nan_for_its_first_use_only(sim: ModuleType, executor: str) -> None:
    sim.configure(executor)
    x = torch.zeros(1000, device="sim")
    del x
    y = torch.empty(1000, device="sim")
    y[:10] = 1.0
    y[20:30] = 2.0
    assert y[:30].nansum().item() == 30
    assert y.isnan().sum().item() == 980


def test_written_memory_stays_when_poison_comes_back(sim: ModuleType) -> None:
    torch.zeros(1000, device="sim")
    x = torch.empty(1000, device="sim")
    sim.configure(poison=False)
    x.fill_(3)
    sim.configure(poison=True)
    assert x.sum().item() == 3000


@pytest.mark.parametrize(
    "access",
    ["ctypes.memset(x.data_ptr(), 0, 4)", "ctypes.string_at(x.data_ptr(), 4)"],
)
def test_host_access_to_device_pointer_dies(sim: ModuleType, access: str) -> None:
    program = (
        "import ctypes, torch\nfrom offload.testing import sim\nsim.load()\nx = torch.ones(4, device='sim')\n"
        f"print('before', flush=True)\n{access}\nprint('after')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -11, done.stderr
    assert done.stdout == "before\n"


def test_pinned_memory(sim: ModuleType) -> None:
    x = torch.empty(5000, dtype=torch.uint8, pin_memory=True)
    assert x.is_pinned()
    assert x[100:].is_pinned()
    assert not torch.empty(5000).is_pinned()
    assert torch.arange(10).pin_memory().is_pinned()
    with pytest.raises(RuntimeError, match="can be pinned"):
        torch.empty(5, device="sim", pin_memory=True)


def test_pinned_block_outlives_its_tensor_while_a_copy_is_in_flight(sim: ModuleType) -> None:
    """Pitfall: the copy reads host bytes when it runs; torch keeps pinned blocks alive until then, and so must we."""
    sim.configure("lazy")
    x = torch.empty(1 << 20, device="sim")
    host = torch.full((1 << 20,), 5.0).pin_memory()
    x.copy_(host, non_blocking=True)
    del host
    gc.collect()
    others = [torch.zeros(1 << 20).pin_memory() for _ in range(4)]
    assert torch.equal(x.cpu(), torch.full((1 << 20,), 5.0))
    del others


def test_storage_resize_and_set(sim: ModuleType) -> None:
    x = torch.arange(10.0, device="sim")
    x.untyped_storage().resize_(0)
    assert x.untyped_storage().nbytes() == 0
    x.untyped_storage().resize_(40)
    x.copy_(torch.arange(10.0))
    assert torch.equal(x.cpu(), torch.arange(10.0))
    x.resize_(20)
    assert torch.equal(x[:10].cpu(), torch.arange(10.0))


def test_save_load_deepcopy(sim: ModuleType, tmp_path: object) -> None:
    import copy

    x = torch.randn(10, device="sim")
    torch.save({"x": x}, f"{tmp_path}/x.pt")
    loaded = torch.load(f"{tmp_path}/x.pt")["x"]
    assert loaded.device.type == "sim"
    assert torch.equal(loaded.cpu(), x.cpu())
    assert torch.equal(torch.load(f"{tmp_path}/x.pt", map_location="cpu")["x"], x.cpu())
    assert torch.equal(copy.deepcopy(x).cpu(), x.cpu())
