"""Memory by phase: each phase's own peak, on a device, on an emulated one and without any."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import pytest
import torch
from torch import nn

from offload.accelerators import DeviceMemory
from offload.accounting import note_pinned
from offload.monitor import MemoryMonitor, Phase

MIB = 2**20


class FakeAccelerator:
    """Allocator statistics that a test drives by hand."""

    def __init__(self) -> None:
        self.device = torch.device("xpu:0")
        self.allocated = 0
        self.peak = 0

    def allocate(self, num_bytes: int) -> None:
        self.allocated += num_bytes
        self.peak = max(self.peak, self.allocated)

    def free(self, num_bytes: int) -> None:
        self.allocated -= num_bytes

    def memory(self) -> DeviceMemory:
        return DeviceMemory(self.allocated, 2 * self.peak, self.peak, 0, 0)

    def reset_peak_memory(self) -> None:
        self.peak = self.allocated


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> FakeAccelerator:
    fake = FakeAccelerator()
    monkeypatch.setattr("offload.monitor.accelerator_for", lambda device: fake)
    return fake


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def monitor(accelerator: FakeAccelerator, clock: Clock) -> MemoryMonitor:
    return MemoryMonitor("xpu", clock=clock)


def train_step(monitor: MemoryMonitor, accelerator: FakeAccelerator, activations: int, temporaries: int = 0) -> None:
    """Forward fills activations, backward peaks above and frees them, update needs ``temporaries`` for a moment."""
    with monitor.phase("forward"):
        accelerator.allocate(activations)
    with monitor.phase("backward"):
        accelerator.allocate(10)
        accelerator.free(activations + 10)
    with monitor.phase("update"):
        accelerator.allocate(temporaries)
        accelerator.free(temporaries)


# -- phases and samples


def test_one_sample_per_change_of_phase_and_no_gap(monitor: MemoryMonitor, clock: Clock) -> None:
    for phase in ("forward", "backward", "update", "update", "idle"):
        clock.now_s += 2.0
        monitor.enter(phase)
    samples = monitor.samples
    assert [sample.phase.value for sample in samples] == ["idle", "forward", "backward", "update"]
    assert [sample.t_s for sample in samples] == [102.0, 104.0, 106.0, 110.0]
    assert [sample.duration_s for sample in samples] == [2.0, 2.0, 2.0, 4.0]
    assert monitor.current_phase is Phase.IDLE


def test_phase_block_returns_to_the_phase_of_before(monitor: MemoryMonitor) -> None:
    with monitor.phase(Phase.BACKWARD):
        with monitor.phase("update"):
            assert monitor.current_phase is Phase.UPDATE
        assert monitor.current_phase is Phase.BACKWARD
    assert monitor.current_phase is Phase.IDLE


def test_phase_block_that_raises_ends(monitor: MemoryMonitor) -> None:
    with pytest.raises(RuntimeError, match="inside"), monitor.phase("update"):
        raise RuntimeError("inside")
    assert monitor.current_phase is Phase.IDLE


def test_peak_is_that_of_the_phase_alone(monitor: MemoryMonitor, accelerator: FakeAccelerator) -> None:
    accelerator.allocate(1000)
    train_step(monitor, accelerator, activations=500, temporaries=40)
    monitor.enter("forward")  # ends the idle time after the step
    peaks = [(sample.phase.value, sample.peak_allocated_bytes, sample.allocated_bytes) for sample in monitor.samples]
    in_phases = [peak for peak in peaks if peak[0] != "idle"]
    assert in_phases == [("forward", 1500, 1500), ("backward", 1510, 1000), ("update", 1040, 1000)]
    assert peaks[-1] == ("idle", 1000, 1000)


def test_peak_before_the_monitor_is_not_counted(accelerator: FakeAccelerator) -> None:
    accelerator.allocate(5000)
    accelerator.free(5000)
    monitor = MemoryMonitor("xpu")
    monitor.enter("forward")
    assert monitor.samples[0].peak_allocated_bytes == 0


def test_steps_are_counted_by_updates(monitor: MemoryMonitor, accelerator: FakeAccelerator) -> None:
    for _ in range(2):
        train_step(monitor, accelerator, activations=1)
    steps = [(sample.step, sample.phase.value) for sample in monitor.samples if sample.phase is not Phase.IDLE]
    assert steps == [(step, phase) for step in (0, 1) for phase in ("forward", "backward", "update")]


def test_history_is_bounded(accelerator: FakeAccelerator) -> None:
    monitor = MemoryMonitor("xpu", max_samples=5)
    for _ in range(20):
        train_step(monitor, accelerator, activations=1)
    assert len(monitor.samples) == 5


def test_pinned_bytes_are_those_of_the_accounting(monitor: MemoryMonitor) -> None:
    monitor.enter("forward")
    note_pinned(12345)
    monitor.enter("idle")
    note_pinned(-12345)
    before, after = monitor.samples
    assert after.pinned_bytes - before.pinned_bytes == 12345


def test_slow_meters_are_read_at_most_once_per_phase_and_interval(
    accelerator: FakeAccelerator, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.meters.HostMeter.rss_bytes", lambda meter: 7)
    monkeypatch.setattr("offload.meters.NvmlMeter.used_bytes", lambda meter: 8)
    monitor = MemoryMonitor("xpu", min_interval_s=1.0, clock=clock)
    for _ in range(8):  # 0.25 s a step
        train_step(monitor, accelerator, activations=1)
        clock.now_s += 0.25
    for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE):
        samples = [sample for sample in monitor.samples if sample.phase is phase]
        assert [sample.rss_bytes for sample in samples] == [7, None, None, None, 7, None, None, None]
        assert [sample.device_used_bytes for sample in samples] == [8, None, None, None, 8, None, None, None]


def test_samples_are_a_copy(monitor: MemoryMonitor) -> None:
    monitor.enter("forward")
    monitor.samples.clear()
    assert len(monitor.samples) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        monitor.samples[0].step = 3  # type: ignore[misc]


# -- what is made of them


def test_profile_is_the_highest_of_the_last_steps(monitor: MemoryMonitor, accelerator: FakeAccelerator) -> None:
    for activations in (900, 100, 300, 200):
        train_step(monitor, accelerator, activations)
    assert monitor.profile(num_steps=2)[Phase.FORWARD].peak_allocated_bytes == 300
    assert monitor.profile(num_steps=2)[Phase.FORWARD].num_samples == 2
    assert monitor.profile(num_steps=4)[Phase.FORWARD].peak_allocated_bytes == 900
    assert monitor.profile(num_steps=100)[Phase.BACKWARD].peak_allocated_bytes == 910


def test_profile_gives_mean_host_time(monitor: MemoryMonitor, clock: Clock) -> None:
    for seconds in (1.0, 3.0):
        with monitor.phase("update"):
            clock.now_s += seconds
    assert monitor.profile()[Phase.UPDATE].mean_duration_s == 2.0


def test_headroom_is_the_budget_less_the_peak(monitor: MemoryMonitor, accelerator: FakeAccelerator) -> None:
    train_step(monitor, accelerator, activations=500, temporaries=40)
    assert monitor.headroom("forward", 2000) == 1500
    assert monitor.headroom(Phase.BACKWARD, 2000) == 1490
    assert monitor.headroom(Phase.UPDATE, 30) == -10


def test_report_has_a_row_per_phase(monitor: MemoryMonitor, accelerator: FakeAccelerator, clock: Clock) -> None:
    with monitor.phase("forward"):
        accelerator.allocate(3 * MIB)
        clock.now_s += 0.0125
    header, forward, idle, legend = monitor.report().splitlines()
    assert header.split()[0] == "phase"
    assert forward.split()[:5] == ["forward", "12.5", "3.0", "3.0", "6.0"]
    assert idle.split()[0] == "idle"
    assert "MiB" in legend


# -- without a device


def test_without_an_accelerator_there_are_host_figures_only() -> None:
    monitor = MemoryMonitor("cpu")
    with monitor.phase("forward"):
        pass
    sample = monitor.samples[-1]
    assert sample.allocated_bytes is sample.peak_allocated_bytes is sample.reserved_bytes is None
    assert sample.device_used_bytes is None
    assert sample.rss_bytes is None or sample.rss_bytes > 0
    assert "forward" in monitor.report()
    with pytest.raises(ValueError, match="no accelerator"):
        monitor.headroom("forward", 1)


# -- mistakes


@pytest.mark.parametrize("phase", ["Forward", "step", 3, None])
def test_unknown_phase(monitor: MemoryMonitor, phase: str) -> None:
    with pytest.raises(ValueError, match=r"unknown phase .*'forward', 'backward', 'update', 'idle'"):
        monitor.enter(phase)
    assert monitor.samples == []


def test_questions_asked_too_early(monitor: MemoryMonitor) -> None:
    assert monitor.profile() == {}
    assert "no samples yet" in monitor.report()
    with pytest.raises(ValueError, match="no sample of phase 'update' yet"):
        monitor.headroom("update", 1)


@pytest.mark.parametrize("argument", [{"max_samples": 0}, {"min_interval_s": -1.0}, {"min_interval_s": float("nan")}])
def test_limits_out_of_range(argument: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(argument))):
        MemoryMonitor("cpu", **argument)  # type: ignore[arg-type]


def test_number_of_steps_out_of_range(monitor: MemoryMonitor) -> None:
    with pytest.raises(ValueError, match="num_steps"):
        monitor.profile(num_steps=0)


def test_attaching_twice(monitor: MemoryMonitor) -> None:
    monitor.attach(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"detach\(\) first"):
        monitor.attach(nn.Linear(1, 1))
    monitor.detach()
    monitor.attach(nn.Linear(1, 1))


# -- on the emulated device


def test_attached_monitor_sees_the_phases_of_training(sim: ModuleType) -> None:
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256)).to("sim")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.ones(64, 256, device="sim")
    monitor = MemoryMonitor()
    monitor.attach(model, optimizer)
    for _ in range(2):
        model(inputs).square().mean().backward()
        optimizer.step()
    monitor.detach()
    num_samples = len(monitor.samples)
    model(inputs)
    assert len(monitor.samples) == num_samples

    last = {sample.phase: sample for sample in monitor.samples if sample.step == 1}
    assert list(last)[1:] == [Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE]
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    activations = 64 * 1024 * 4  # of the ReLU, kept for backward
    forward, backward = last[Phase.FORWARD], last[Phase.BACKWARD]
    assert forward.allocated_bytes >= parameters + activations
    assert backward.allocated_bytes <= forward.allocated_bytes - activations  # gradients were there before
    assert backward.peak_allocated_bytes >= forward.allocated_bytes
    assert monitor.headroom(Phase.BACKWARD, 2**30) == 2**30 - monitor.profile()[Phase.BACKWARD].peak_allocated_bytes


@pytest.mark.parametrize("executor", ["sync", "lazy"])
def test_peaks_are_exact_and_nobody_waits_for_the_device(sim: ModuleType, executor: str) -> None:
    sim.configure(executor=executor)
    kept = torch.ones(MIB, dtype=torch.uint8, device="sim")
    monitor = MemoryMonitor("sim")
    _, waits_before = sim.counts()
    with monitor.phase("forward"):
        passing = kept + kept
        del passing
    with monitor.phase("update"):
        kept.add_(1)
    _, waits = sim.counts()
    _, forward, _, update = monitor.samples
    assert forward.peak_allocated_bytes == update.peak_allocated_bytes + MIB
    assert forward.allocated_bytes == update.allocated_bytes
    assert waits == waits_before
