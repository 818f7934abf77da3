"""Measured spans: what ran when, and what was done in that time."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from offload.lanes import Lanes, Work
from offload.lanes.accelerator import accelerator_lanes
from offload.lanes.inline import inline_lanes
from offload.subgroup import Subgroup
from offload.timeline import Span
from offload.timing import StepTimer, work_of

SUBGROUPS = [Subgroup(0, 100, 200, 1200), Subgroup(1, 300, 600, 3600)]


# ---- work


def test_work_by_lane() -> None:
    """Bytes of the state, of the gradient or of the parameters where something is copied; parameters where updated."""
    found = work_of(
        [
            Span("d2h", "D0@0", 0.0, 0.5), Span("d2h", "F1@0", 4.0, 8.0), Span("host", "C0@0", 0.5, 0.75),
            Span("h2d", "U0@0", 2.0, 2.125), Span("h2d", "P1@0", 0.0, 2.0), Span("compute", "G1@0", 2.0, 2.5),
            Span("compute", "R1", 2.5, 10.5),
        ],
        SUBGROUPS,
    )  # fmt: skip
    assert found == {
        "host": (100, 0.25), "compute": (600, 8.5), "h2d": (200 + 3600, 2.125), "d2h": (200 + 3600, 4.5),
    }  # fmt: skip


def test_no_work_in_nothing() -> None:
    assert work_of([], SUBGROUPS) == {}


# ---- the timer


def run_once(lanes: Lanes, device: torch.device) -> None:
    """One piece of work on each lane, each after the one before."""
    on_device, on_host = torch.zeros(4096, device=device), torch.zeros(4096).pin_memory()
    down = lanes.d2h.submit(
        Work("F0@0", lambda: on_host.copy_(on_device, non_blocking=True)), after=(lanes.compute.mark(),)
    )
    updated = lanes.host.submit(Work("C0@0", lambda: None), after=(down,))
    up = lanes.h2d.submit(Work("P0@0", lambda: on_device.copy_(on_host, non_blocking=True)), after=(updated,))
    lanes.compute.submit(Work("G0@0", lambda: on_device.add_(1)), after=(up,))


def test_timer_records_every_lane(sim: ModuleType) -> None:
    sim.set_profile(launch_s=0)  # what lies between enqueueing a stamp and the work after it
    device = torch.device("sim", 0)
    lanes = accelerator_lanes(device)
    timer = StepTimer(lanes, device)
    run_once(lanes, device)
    timer.stop()
    lanes.synchronize()
    found = {span.name: span for span in timer.spans()}
    assert {name: span.lane for name, span in found.items()} == {
        "F0@0": "d2h", "C0@0": "host", "P0@0": "h2d", "G0@0": "compute",
    }  # fmt: skip
    assert all(span.start_s >= 0 for span in found.values())
    copy_s = 4096 * 4 / 12e9 + 5e-6  # at the device's default rates, in its own time
    for name in ("F0@0", "P0@0"):
        assert found[name].duration_s == pytest.approx(copy_s, rel=1e-6)
    assert found["F0@0"].end_s <= found["P0@0"].start_s <= found["G0@0"].start_s


def test_timer_records_nothing_after_it_stopped(sim: ModuleType) -> None:
    device = torch.device("sim", 0)
    lanes = accelerator_lanes(device)
    timer = StepTimer(lanes, device)
    run_once(lanes, device)
    timer.stop()
    run_once(lanes, device)
    lanes.synchronize()
    assert len(timer.spans()) == 4


def test_untimed_lanes_are_left_alone(sim: ModuleType) -> None:
    """Inline lanes have no clock."""
    timer = StepTimer(inline_lanes(), torch.device("sim", 0))
    timer.stop()
    assert timer.spans() == []


# ---- names in profilers


@pytest.mark.parametrize("all_threads", [False, True])
def test_operations_have_their_names_in_torch_profiler(sim: ModuleType, all_threads: bool) -> None:
    """Each operation by lane and word; CPU updates run on a worker, which the profiler sees if told to."""
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity, profile

    device = torch.device("sim", 0)
    lanes = accelerator_lanes(device)
    run_once(lanes, device)  # the worker is there before the profiler starts
    config = _ExperimentalConfig(profile_all_threads=True) if all_threads else None
    with profile(activities=[ProfilerActivity.CPU], experimental_config=config) as profiler:
        run_once(lanes, device)
        lanes.synchronize()
    names = {event.key for event in profiler.key_averages()}
    expected = {"offload d2h F0@0", "offload h2d P0@0", "offload compute G0@0"}
    assert expected <= names
    assert ("offload host C0@0" in names) == all_threads
