"""Measured spans: what ran when, and the rates that follow."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from offload.lanes import Lanes, Work
from offload.lanes.accelerator import accelerator_lanes
from offload.lanes.inline import inline_lanes
from offload.perf_model import Rates
from offload.subgroup import Subgroup
from offload.timeline import Span
from offload.timing import StepTimer, measured_rates

SUBGROUPS = [Subgroup(0, 100, 200, 1200), Subgroup(1, 300, 600, 3600)]


def spans(*durations: tuple[str, float]) -> list[Span]:
    return [Span("some lane", name, 1.0, 1.0 + duration) for name, duration in durations]


# Powers of two, so that sums and quotients are exact.
BOTH_SIDES = spans(
    ("D0@0", 0.5), ("C0@0", 0.25), ("U0@0", 0.125), ("P1@0", 2.0), ("G1@0", 0.5), ("F1@0", 4.0), ("R1", 8.0)
)


# ---- rates


def test_rates() -> None:
    assert measured_rates(BOTH_SIDES, SUBGROUPS) == Rates(
        h2d_bytes_per_s=3600 / 2.0,
        d2h_bytes_per_s=3600 / 4.0,
        host_update_params_per_s=100 / 0.25,
        device_update_params_per_s=300 / 0.5,
    )


def test_rates_are_of_sums() -> None:
    rates = measured_rates([*BOTH_SIDES, *spans(("C1@1", 0.25), ("P0@1", 1.0))], SUBGROUPS)
    assert rates is not None
    assert rates.host_update_params_per_s == 400 / 0.5
    assert rates.h2d_bytes_per_s == 4800 / 3.0


@pytest.mark.parametrize("missing", ["P", "F", "C", "G"])
def test_no_rates_without_both_sides(missing: str) -> None:
    assert measured_rates([span for span in BOTH_SIDES if span.name[0] != missing], SUBGROUPS) is None


@pytest.mark.parametrize("instant", ["P1@0", "F1@0", "C0@0", "G1@0"])
def test_no_rates_from_what_took_no_time(instant: str) -> None:
    without = [span for span in BOTH_SIDES if span.name != instant]
    assert measured_rates([*without, *spans((instant, 0.0))], SUBGROUPS) is None


def test_no_rates_from_nothing() -> None:
    assert measured_rates([], SUBGROUPS) is None


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
