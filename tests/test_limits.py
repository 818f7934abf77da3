"""What bounds host memory is found where the system keeps it, and holds before anything is allocated."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import offload
from offload import limits, memory
from offload.limits import MemoryLimit, host_limits, lockable_bytes
from offload.pool import BudgetError, MemoryBill, Pool
from tests.training import mlp, train

GIB = 1 << 30
STATUS = "VmSize:\t 1000 kB\nVmData:\t 500 kB\nVmLck:\t 8 kB\nCapEff:\t0000000000000000\n"
MEMINFO = "MemTotal:       8388608 kB\nMemFree:          11 kB\nMemAvailable:   4194304 kB\n"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A process file system without control groups."""
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text(MEMINFO)
    (tmp_path / "self/status").write_text(STATUS)
    return tmp_path


def put_group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_the_machine(proc: Path) -> None:
    (machine,) = (limit for limit in host_limits(proc) if "machine" in limit.name)
    assert (machine.total_bytes, machine.free_bytes, machine.shared) == (8 * GIB, 4 * GIB, True)


def test_control_group_v2_and_those_above_it(proc: Path) -> None:
    mount = proc / "cgroup"
    (proc / "self/cgroup").write_text("0::/job/step\n")
    (proc / "self/mountinfo").write_text(f"30 23 0:26 / {mount} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n")
    cache = "anon 5\ninactive_file 700\nactive_file 300\nfile_mapped 100\n"
    put_group(mount / "job/step", {"memory.max": "max\n", "memory.current": "9000\n", "memory.stat": cache})
    (mount / "job/memory.max").write_text("20000\n")
    (mount / "job/memory.current").write_text("9000\n")
    (mount / "job/memory.stat").write_text(cache)
    (group,) = (limit for limit in host_limits(proc) if "control group" in limit.name)
    assert group.name.endswith("cgroup/job")
    assert (group.total_bytes, group.free_bytes) == (20000, 20000 - (9000 - 900)), "page cache can be had back"


def test_control_group_v1(proc: Path) -> None:
    mount = proc / "memory"
    (proc / "self/cgroup").write_text("5:cpu:/x\n4:memory:/docker/abc\n0::/\n")
    (proc / "self/mountinfo").write_text(f"35 31 0:31 /docker/abc {mount} ro - cgroup cgroup rw,memory\n")
    stat = "cache 1\ntotal_inactive_file 40\ntotal_active_file 5\ntotal_mapped_file 3\n"
    files = {"memory.limit_in_bytes": "1000\n", "memory.usage_in_bytes": "500\n", "memory.stat": stat}
    put_group(mount, files)  # a container shows its own group as the root
    (group,) = (limit for limit in host_limits(proc) if "control group" in limit.name)
    assert (group.total_bytes, group.free_bytes) == (1000, 542)
    (mount / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert not [limit for limit in host_limits(proc) if "control group" in limit.name], "no limit"


def test_resource_limits(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to = {resource.RLIMIT_AS: 3000 << 10, resource.RLIMIT_DATA: 700 << 10, resource.RLIMIT_MEMLOCK: 64 << 10}
    monkeypatch.setattr(limits.resource, "getrlimit", lambda which: (set_to[which], resource.RLIM_INFINITY))
    found = {limit.name[-11:-1]: limit for limit in host_limits(proc) if "RLIMIT" in limit.name}
    assert {name.strip("("): limit.free_bytes for name, limit in found.items()} == {
        "RLIMIT_AS": 2000 << 10,
        "LIMIT_DATA": 200 << 10,
    }
    assert not any(limit.shared for limit in found.values())
    assert lockable_bytes(proc) == 56 << 10
    (proc / "self/status").write_text("VmLck:\t 8 kB\nCapEff:\t0000000000004000\n")
    assert lockable_bytes(proc) is None, "CAP_IPC_LOCK: the limit does not bind"


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    assert [limit for limit in host_limits(tmp_path) if "RLIMIT" not in limit.name] == []


# ---- what is refused

LIMIT = MemoryLimit("this machine's memory", 1000, 600, True, "end other programs")
BILL = MemoryBill(host_state_bytes=500, staging_bytes=50)


def test_bill_that_fits() -> None:
    BILL.check_limits(MemoryBill(), [LIMIT], num_ranks=1)
    MemoryBill(host_state_bytes=900).check_limits(MemoryBill(host_state_bytes=400), [LIMIT], num_ranks=1)


def test_bill_that_does_not_fit_what_is_free() -> None:
    with pytest.raises(BudgetError) as raised:
        MemoryBill(host_state_bytes=551, staging_bytes=50).check_limits(MemoryBill(), [LIMIT], num_ranks=1)
    assert str(raised.value) == (
        "this machine's memory leaves 600 B (600 bytes) of 1000 B, but the optimizer needs 601 B (601 bytes): "
        "host state 551 B (0 B pinned), staging 50 B pinned, device slots 0 B, resident state 0 B. Nothing was "
        "allocated. At least that much must be free: end other programs; or need less: keep state on the device "
        "(device_budget), take another state_format, or more ranks"
    )


def test_all_ranks_of_the_node_must_fit() -> None:
    with pytest.raises(BudgetError, match=r"needs 550 B \(550 bytes\), 2 ranks of this node 1.1 KiB: "):
        BILL.check_limits(MemoryBill(), [LIMIT], num_ranks=2)
    own = MemoryLimit("the limit on data (RLIMIT_DATA)", 1000, 600, False, "raise it")
    BILL.check_limits(MemoryBill(), [own], num_ranks=2)


@pytest.mark.parametrize(("value", "num_ranks"), [(None, 1), ("4", 4), ("0", 1), ("many", 1)])
def test_ranks_of_this_node(monkeypatch: pytest.MonkeyPatch, value: str | None, num_ranks: int) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if value is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    assert limits.local_ranks() == num_ranks


def test_memory_on_the_cpu_is_all_host_memory() -> None:
    bill = MemoryBill(host_state_bytes=5, slot_bytes=7, resident_bytes=11, is_pinned=False)
    assert (bill.bytes_of_host_memory, bill.pinned_bytes) == (23, 0)


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_nothing_is_allocated_where_the_system_does_not_hold_it(
    sim: ModuleType, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    for name in ("host_state", "device_state", "set_slots", "set_stagings"):
        monkeypatch.setattr(Pool, name, lambda *_args, **_kwargs: pytest.fail("allocated"))
    model = mlp().to(device)
    needed = offload.AdamW.bill_of(model.parameters()).host_bytes
    tight = MemoryLimit("a limit", 1 << 40, needed - 1, True, "raise it")
    monkeypatch.setattr(memory, "host_limits", lambda: [tight])
    with pytest.raises(offload.BudgetError, match=r"a limit leaves .* Nothing was allocated\. .* raise it; or"):
        offload.AdamW(model.parameters())


@pytest.mark.parametrize("options", [{}, {"plan": "host"}, {"plan": offload.Static(0.5)}, {"device_budget": 9000}])
def test_bill_is_known_before(sim: ModuleType, options: dict[str, object]) -> None:
    model = mlp(device="sim")
    before = torch.accelerator.memory_allocated()
    bill = offload.AdamW.bill_of(model.parameters(), subgroup_numel=600, **options)
    assert torch.accelerator.memory_allocated() == before
    assert bill == offload.AdamW(model.parameters(), subgroup_numel=600, **options).bill


def test_data_limit_of_a_real_process() -> None:
    """In a process of its own: what it has cannot be given back to the others."""
    program = (
        "import resource, torch, offload\n"
        "params = [torch.nn.Parameter(torch.zeros(1 << 20)) for _ in range(8)]\n"
        "offload.AdamW(params[:1])\n"  # all that is loaded once
        "used = next(int(l.split()[1]) << 10 for l in open('/proc/self/status') if l.startswith('VmData'))\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (used + (64 << 20), -1))\n"
        "try:\n    offload.AdamW(params)\n"
        "except offload.BudgetError as error:\n    print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "the limit on data (RLIMIT_DATA) leaves 64.0 MiB" in ran.stdout
    assert "ulimit -d" in ran.stdout


# ---- pinning


def test_emulated_device_locks_pages_when_asked(sim: ModuleType) -> None:
    def locked() -> int:
        return limits._kib_fields(Path("/proc/self/status"))["VmLck"]

    before = locked()
    plain = torch.empty(1 << 16, pin_memory=True)
    assert locked() == before
    sim.lock_pages(True)
    pinned = torch.empty(1 << 16, dtype=torch.uint8, pin_memory=True)
    assert locked() - before == 1 << 16
    del pinned, plain
    assert locked() == before


def test_early_gradients_lock_no_more_than_they_may(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A staging buffer locks four pages, and twelve may be locked."""
    monkeypatch.setattr("offload.accelerators.sim.SimAccelerator.pinnable_bytes", lambda _: 12 << 12)
    optimizer = offload.AdamW(mlp(device="sim").parameters(), plan="host", subgroup_numel=600, early_gradients=True)
    assert optimizer.runtime.homes.num_staging == 3
    assert optimizer.bill.pinned_bytes == 12 << 12


@pytest.mark.parametrize("plan", ["device", offload.Stride(2), "auto"], ids=str)
@pytest.mark.usefixtures("one_torch_thread")
def test_limit_on_locked_memory(
    sim: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, plan: str | offload.Stride
) -> None:
    """What cannot be pinned is known before, and passes through the ring; "auto" keeps it on the CPU."""
    monkeypatch.setattr("offload.accelerators.sim.SimAccelerator.pinnable_bytes", lambda _: 12 << 12)
    monkeypatch.setattr("offload.homes.RING_BYTES", 3 << 12)
    monkeypatch.setattr("offload.pool.PIECE_BYTES", 1 << 12)
    model = mlp(device="sim")
    optimizer = offload.AdamW(model.parameters(), plan=plan, subgroup_numel=600, overlap="none")
    assert 0 < optimizer.bill.pinned_bytes <= 12 << 12
    ringed = optimizer.runtime.homes.ringed
    assert bool(ringed) == (plan != "auto")
    assert ("passes through a pinned ring of" in caplog.text) == bool(ringed)
    reference = mlp(device="sim")
    expected = train(reference, offload.AdamW(reference.parameters(), plan="host", subgroup_numel=600))
    assert all(torch.equal(a, b) for a, b in zip(train(model, optimizer).losses, expected.losses, strict=True))
    assert sim.races() == []
