"""State that is not pinned crosses in pieces, in order, with nothing unordered."""

from __future__ import annotations

import logging
from types import ModuleType

import pytest
import torch

import offload
from offload import host_memory
from offload.accelerators import accelerator_for
from offload.ring import PinnedRing
from offload.testing import faults
from tests.training import assert_same_bits, mlp, state_snapshot, train


def ring_of(num_bytes: int) -> PinnedRing:
    accelerator = accelerator_for(torch.device("sim", 0))
    return PinnedRing([torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(3)], accelerator)


@pytest.mark.sim(executors="all")
@pytest.mark.parametrize("numel", [1, 1024, 1025, 9000])
def test_there_and_back(sim: ModuleType, numel: int) -> None:
    ring, source = ring_of(4096), torch.arange(numel, dtype=torch.float32)
    expected, on_device = source.clone(), torch.empty(numel, device="sim")
    ring.up(source, on_device)
    source.zero_()  # it was read
    on_device += 1
    back = torch.empty(numel)
    ring.down(on_device, back)
    assert torch.equal(back, expected + 1)


@pytest.mark.parametrize("wait", ["_next", "_land"])
def test_without_its_waits_it_is_found_out(sim: ModuleType, monkeypatch: pytest.MonkeyPatch, wait: str) -> None:
    """A buffer that is refilled before the link has emptied it, and one that is read before the link has filled it."""
    sim.configure("lazy")
    ring = ring_of(4096)
    for buffer in ring._buffers:
        buffer.free = torch.Event("sim")

    class NoWait(torch.Event):
        def synchronize(self) -> None:
            pass

    def record() -> torch.Event:
        event = NoWait("sim")
        event.record(torch.accelerator.current_stream())
        return event

    monkeypatch.setattr(ring, "_record", record)
    host, device = torch.zeros(9000), torch.zeros(9000, device="sim")
    (ring.up(host, device) if wait == "_next" else ring.down(device, host))
    torch.accelerator.synchronize()
    assert any("ring" in race for race in sim.races())
    sim.clear_races()


@pytest.mark.parametrize("rows_apart", [False, True])
@pytest.mark.parametrize("overlap", ["none", "next_forward"])
@pytest.mark.usefixtures("one_torch_thread")
def test_pinning_that_is_refused(
    sim: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, overlap: str, rows_apart: bool
) -> None:
    """From the third state on: those visit through the ring, which is said once, and bits stay."""
    if rows_apart:
        monkeypatch.setattr(host_memory, "_COLLIDING_BYTES", 64)
        monkeypatch.setattr(host_memory, "_SKEW_BYTES", 4096)
    options = {"plan": offload.Stride(2), "subgroup_numel": 600, "overlap": overlap}
    reference = mlp(device="sim")
    plain = offload.AdamW(reference.parameters(), **options)
    expected = train(reference, plain), state_snapshot(plain)

    model = mlp(device="sim")
    num_staging = 4  # pinned buffers, before any state
    with faults.fail("pin", nth=num_staging + 2), caplog.at_level(logging.WARNING, "offload"):
        optimizer = offload.AdamW(model.parameters(), **options)
    homes = optimizer.runtime.homes
    assert homes.ringed
    assert homes.ringed < homes.visitors
    assert caplog.text.count("passes through a pinned ring of 24.0 MiB") == 1
    assert "injected failure of pinning" in caplog.text
    assert optimizer.bill.ring_bytes == 3 << 23
    assert_same_bits((train(model, optimizer), state_snapshot(optimizer)), expected)
    assert sim.races() == []


@pytest.mark.usefixtures("one_torch_thread")
def test_nothing_at_all_can_be_pinned(sim: ModuleType) -> None:
    """Every copy blocks, and all is right."""
    reference = mlp(device="sim")
    expected = train(reference, offload.AdamW(reference.parameters(), plan=offload.Stride(2), subgroup_numel=600))
    model = mlp(device="sim")
    with faults.fail("pin", count=faults.FOREVER):
        optimizer = offload.AdamW(model.parameters(), plan=offload.Stride(2), subgroup_numel=600)
        assert_same_bits(train(model, optimizer), expected)
