"""Microbenchmarks on the emulated device in virtual time, whose true rates the tests set."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from offload.accelerators import accelerator_for
from offload.accelerators.sim import SimAccelerator
from offload.interconnect import PARTS, Report, Result, Settings, Suite, compare, format_value, rates_of, run_suite
from offload.interconnect.copies import fit_line
from offload.interconnect.harness import Activity, Harness
from offload.interconnect.overlap import overlap_share
from offload.processors import allowed_processors

pytestmark = pytest.mark.usefixtures("one_torch_thread")  # copies are small, and processors may be busy

KIB, MIB = 2**10, 2**20
TINY = Settings(
    sizes=(4 * KIB, 64 * KIB, 512 * KIB),
    repeats=2,
    copy_bytes=64 * KIB,
    piece_s=2e-4,
    update_numel=1 << 12,
    matmul_width=64,
    num_streams=(1, 2),
    num_small=8,
    pin_bytes=64 * KIB,
    step_numel=0,
)
UPDATE_S = 1e-4  # of a CPU update, where a test sets it


@pytest.fixture
def steady_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU update takes :data:`UPDATE_S` of virtual time, however busy the machine is that runs the test."""
    charge = SimAccelerator.charge_host_time
    pieces: dict[str, int] = {}

    def time_harness(self: Harness, activity: Activity, count: int, stamp: tuple[torch.Event, torch.Event]) -> None:
        pieces["count"] = count
        run_host_work(self, activity, count, stamp)

    run_host_work = Harness._do
    monkeypatch.setattr(Harness, "_do", time_harness)
    monkeypatch.setattr(
        SimAccelerator, "charge_host_time", lambda self, _, name: charge(self, UPDATE_S * pieces["count"], name)
    )


CONFIGURATIONS = [
    # h2d, d2h, pageable, latency, launch, flops, memory
    (12e9, 12e9, 4e9, 5e-6, 4e-6, 50e12, 2e12),
    (25e9, 22e9, 6e9, 8e-6, 2e-6, 1e12, 1e11),
    (3e9, 6e9, 2e9, 2e-5, 4e-6, 1e11, 5e10),
    (55e9, 53e9, 12e9, 3e-6, 1e-6, 4e11, 3e11),
    (1e9, 1e9, 2e9, 1e-4, 0.0, 1e11, 2e10),
    (450e9, 300e9, 20e9, 1e-6, 5e-7, 8e11, 4e11),
    (7e9, 2e9, 1e9, 0.0, 1e-5, 1e11, 1e11),
]

# (h2d, d2h, each way while both are busy)
DUPLEX = [(12e9, 10e9, 7e9), (25e9, 25e9, 12.5e9), (6e9, 3e9, 2.5e9)]
# So slow that few operations take long: the emulated device really computes.
SLOW_DEVICES = [
    (12e9, 12e9, 4e9, 5e-6, 4e-6, 1e10, 1e10),
    (3e9, 6e9, 2e9, 2e-5, 4e-6, 2e10, 5e9),
    (55e9, 53e9, 12e9, 3e-6, 1e-6, 5e9, 2e10),
]
RATES = (
    "h2d_bytes_per_s", "d2h_bytes_per_s", "pageable_bytes_per_s", "latency_s", "launch_s", "flops",
    "memory_bytes_per_s",
)  # fmt: skip


def configure(sim: ModuleType, rates: tuple[float, ...], executor: str = "sync") -> None:
    sim.set_profile(**dict(zip(RATES, rates, strict=True)))
    sim.configure(executor, races=False)


@pytest.mark.parametrize("rates", CONFIGURATIONS, ids=lambda rates: f"{rates[0] / 1e9:g}GB")
def test_recovers_the_link_that_was_set(sim: ModuleType, rates: tuple[float, ...]) -> None:
    h2d, d2h, pageable, latency_s, launch_s, *_ = rates
    configure(sim, rates)
    report = run_suite("sim", TINY, only=("copy", "duplex", "streams", "batch", "cost"))
    found, within = report.figures, 0.05
    assert found["h2d_bytes_per_s"] == pytest.approx(h2d, rel=within)
    assert found["d2h_bytes_per_s"] == pytest.approx(d2h, rel=within)
    assert found["h2d_latency_s"] == pytest.approx(latency_s, rel=within, abs=1e-9)
    assert found["d2h_latency_s"] == pytest.approx(latency_s, rel=within, abs=1e-9)
    assert found["both_bytes_per_s"] == pytest.approx(min(h2d, d2h), rel=within), "full duplex"
    assert found["pageable_h2d_bytes_per_s"] == pytest.approx(min(h2d, pageable), rel=within)
    assert found["pageable_d2h_bytes_per_s"] == pytest.approx(min(d2h, pageable), rel=within)
    assert found["launch_s"] == pytest.approx(launch_s, rel=within, abs=1e-9)
    for result in report.group("duplex"):
        assert result.details["share_of_alone"] == pytest.approx(1, rel=within)
    for result in report.group("copy"):
        assert result.low == pytest.approx(result.high), "virtual time is the same from run to run"
    part_bytes = TINY.copy_bytes // TINY.num_small
    small = report.find(f"pinned_to_device.in_8_copies.{part_bytes // KIB}.0KiB")
    assert small.value == pytest.approx(part_bytes / (latency_s + part_bytes / h2d), rel=within)
    assert not report.problems()


@pytest.mark.parametrize("rates", SLOW_DEVICES, ids=lambda rates: f"{rates[0] / 1e9:g}GB")
def test_recovers_the_device_and_its_overlap(sim: ModuleType, steady_host: None, rates: tuple[float, ...]) -> None:
    """Engines of the emulated device share nothing, so everything overlaps, and keeps its rate."""
    *_, flops, memory = rates
    configure(sim, rates)
    report = run_suite("sim", TINY, only=("overlap",))
    assert report.find("device_to_device.elementwise_alone").value == pytest.approx(memory, rel=0.05)
    assert report.find("device_to_device.matmul_alone").value == pytest.approx(flops, rel=0.05)
    assert report.find("host_to_host.CPU_update_alone").value == pytest.approx(TINY.update_numel / UPDATE_S, rel=0.05)
    alone = {each.mode.removesuffix(" alone"): each.value for each in report.results if each.mode.endswith(" alone")}
    for result in report.group("overlap"):
        if "rate_kept" in result.details:
            assert result.value == pytest.approx(alone[result.mode.partition(" under ")[0]], rel=0.05)
            assert result.details["rate_kept"] == pytest.approx(1, rel=0.05), result.name
        elif result.unit == "share":
            assert result.value == pytest.approx(1, abs=0.05), result.name
    assert not report.problems()


@pytest.mark.parametrize("rates", DUPLEX, ids=lambda rates: f"{rates[2] / 1e9:g}GB")
def test_recovers_how_the_directions_share_the_link(sim: ModuleType, rates: tuple[float, float, float]) -> None:
    h2d, d2h, both = rates
    sim.set_profile(h2d_bytes_per_s=h2d, d2h_bytes_per_s=d2h, both_bytes_per_s=both, latency_s=0, launch_s=1e-6)
    sim.configure(races=False)
    report = run_suite("sim", replace(TINY, copy_bytes=512 * KIB), only=("copy", "duplex"))
    assert report.figures["both_bytes_per_s"] == pytest.approx(both, rel=0.05)
    kept = {result.source: result.details["share_of_alone"] for result in report.group("duplex")}
    assert kept == pytest.approx({"pinned": both / h2d, "device": both / d2h}, rel=0.05)


def test_one_queue_for_both_directions_shows_as_half_duplex(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(sim, CONFIGURATIONS[0])
    harness = Harness(accelerator_for(torch.device("sim")), 2)
    only = torch.Stream("sim")
    harness._streams = [only, only]
    up, down = (torch.empty(MIB, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    device = [torch.empty(MIB, dtype=torch.uint8, device="sim") for _ in range(2)]
    copies = [
        Activity("up", lambda: device[0].copy_(up, non_blocking=True), MIB, "bytes/s"),
        Activity("down", lambda: down.copy_(device[1], non_blocking=True), MIB, "bytes/s"),
    ]
    alone_s = harness.alone_s(copies[0], 4)
    (timing, *_) = harness.time((copies[0], 4), (copies[1], 4))
    assert timing.total_s == pytest.approx(2 * alone_s, rel=0.01)


# ---- the method


@pytest.mark.parametrize("executor", ["sync", "lazy", "random"])
def test_streams_start_together_when_released(sim: ModuleType, executor: str) -> None:
    configure(sim, CONFIGURATIONS[0], executor)
    harness = Harness(accelerator_for(torch.device("sim")), 1)
    x, y = (torch.zeros(1024, device="sim") for _ in range(2))
    work = [
        (Activity("one", lambda: x.add_(1), 1, "bytes/s"), 3),
        (Activity("two", lambda: y.add_(1), 1, "bytes/s"), 200),
    ]
    (timing,) = harness.time(*work)
    assert timing.was_held
    assert timing.begins_s == pytest.approx((0, 0), abs=1e-9)


def test_gate_grows_until_all_is_enqueued(sim: ModuleType) -> None:
    """50 launches of 0.1 ms each outlast the first gate by far; what is measured has no launch in it."""
    configure(sim, (12e9, 12e9, 4e9, 0.0, 1e-4, 1e12, 1e12))
    harness = Harness(accelerator_for(torch.device("sim")), 1)
    x = torch.zeros(25_000, device="sim")
    (timing,) = harness.time((Activity("add", lambda: x.add_(1), 1, "bytes/s"), 50))
    assert harness._num_gate_copies > 1
    assert timing.was_held
    assert timing.duration_s(0) < 50 * 1e-4 / 10, "else launches were measured"


def test_a_gate_that_opens_too_early_is_told(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.interconnect.harness._MAX_GATE_COPIES", 1)
    configure(sim, (12e9, 12e9, 4e9, 0.0, 1e-2, 1e12, 1e12))
    report = run_suite("sim", replace(TINY, sizes=(4096,)), only=("copy",))
    assert "before all was enqueued" in report.find("pinned_to_device.alone.4.0KiB").problem
    assert report.find("pageable_to_device.alone.4.0KiB").problem == "", "has no gate"


def test_interfering_work_outlasts_the_measured(sim: ModuleType) -> None:
    configure(sim, CONFIGURATIONS[0])
    harness = Harness(accelerator_for(torch.device("sim")), 2)
    x, y = (torch.zeros(1 << 20, device="sim") for _ in range(2))
    host = torch.empty(1 << 22, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(1 << 22, dtype=torch.uint8, device="sim")
    copy = Activity("copy", lambda: device.copy_(host, non_blocking=True), 1 << 22, "bytes/s")
    for timing in harness.outlasted((copy, 4), (Activity("add", lambda: x.add_(y), 1, "bytes/s"), 1)):
        assert timing.ends_s[1] >= timing.ends_s[0]


def test_work_of_the_host_begins_with_the_release(sim: ModuleType) -> None:
    configure(sim, CONFIGURATIONS[0])
    harness = Harness(accelerator_for(torch.device("sim")), 1)
    x = torch.zeros(1024, device="sim")
    add = Activity("add", lambda: x.add_(1), 1, "bytes/s")
    (timing,) = harness.time((add, 100), (Activity("host", lambda: None, 1, "bytes/s", on_host=True), 1))
    assert timing.begins_s[1] == pytest.approx(0, abs=1e-9)


def test_what_an_earlier_case_copied_does_not_count(sim: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from offload.interconnect.buffers import Pair

    copy = Pair.copy

    def large_only(self: Pair, name: str) -> Activity:
        return copy(self, name) if self.source.numel() > 4096 else Activity(name, lambda: None, 4096, "bytes/s")

    monkeypatch.setattr(Pair, "copy", large_only)
    report = run_suite("sim", replace(TINY, sizes=(64 * KIB, 4 * KIB)), only=("copy",))
    assert [result.num_bytes for result in report.results if result.problem] == [4 * KIB] * 4


@pytest.mark.parametrize("part", ["copy", "duplex", "streams", "batch", "overlap", "node"])
def test_wrong_contents_are_told(
    sim: ModuleType, steady_host: None, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Copies that leave out the last byte are as fast, and wrong."""
    from offload.interconnect.buffers import Pair

    def copy(self: Pair, name: str) -> Activity:
        target, source = self.target[:-1], self.source[:-1]
        return Activity(name, lambda: target.copy_(source, non_blocking=True), source.numel(), "bytes/s")

    monkeypatch.setattr(Pair, "copy", copy)
    if part == "batch":  # copies parts itself
        monkeypatch.setattr(Pair, "arrived", lambda self: False)
    configure(sim, SLOW_DEVICES[1])
    report = run_suite("sim", TINY, only=(part,))
    assert any("what arrived is not what was sent" in problem for problem in report.problems())


def test_overlap_share() -> None:
    assert overlap_share(1.0, 2.0, 1.0) == 1
    assert overlap_share(2.0, 2.0, 1.0) == 0
    assert overlap_share(1.5, 2.0, 1.0) == 0.5
    assert overlap_share(0.9, 2.0, 1.0) == 1, "faster than the ideal is noise"


@pytest.mark.parametrize(("latency_s", "rate"), [(1e-5, 1e9), (0.0, 5e10), (3e-4, 2e8)])
def test_fit_finds_latency_and_rate(latency_s: float, rate: float) -> None:
    points = [(size, latency_s + size / rate) for size in (4096, 65536, 1 << 20, 1 << 26)]
    assert fit_line(points) == pytest.approx((latency_s, rate), rel=1e-6, abs=1e-12)
    assert fit_line(points[-1:])[1] == pytest.approx(points[-1][0] / points[-1][1])
    assert fit_line([(4096, 1e-5), (8192, 1e-5)])[1] == 8192 / 1e-5, "where only latency shows"


# ---- the host's parts


def test_nodes_and_cores_are_cases(sim: ModuleType) -> None:
    configure(sim, CONFIGURATIONS[2])
    report = run_suite("sim", TINY, only=("node", "cores"))
    modes = [result.mode for result in report.group("place")]
    assert any(mode.startswith("NUMA node") for mode in modes)
    assert f"CPU update by {len(allowed_processors())} threads" in modes
    up = next(result for result in report.group("place") if result.source == "pinned")
    assert up.value == pytest.approx(TINY.copy_bytes / (2e-5 + TINY.copy_bytes / 3e9), rel=0.05)


@pytest.mark.slow
def test_ranks_alone_and_together(sim: ModuleType) -> None:
    report = run_suite("sim", replace(TINY, num_ranks=2), only=("ranks",))
    modes = {result.mode for result in report.group("ranks")}
    assert modes == {f"rank {i} {how}" for i, how in itertools.product((0, 1), ("alone", "of 2 together"))}
    assert all(result.value > 0 for result in report.results)


# ---- the whole


def test_steps_give_points_spans_and_rates(sim: ModuleType) -> None:
    configure(sim, SLOW_DEVICES[0])
    report = run_suite("sim", replace(TINY, step_numel=12 * 4096), only=("copy", "overlap", "duplex", "step"))
    assert [point["device_share"] for point in report.step["points"]] == pytest.approx([0, 1 / 3, 1 / 2, 1])
    assert {span["lane"] for span in report.step["spans"]} == {"host", "compute", "h2d", "d2h"}
    rates = rates_of(report)
    assert rates is not None
    assert rates.h2d_bytes_per_s == report.figures["h2d_bytes_per_s"]
    assert rates_of(Report({}, {}, [])) is None


def test_progress_names_parts_and_results(sim: ModuleType) -> None:
    seen: list[tuple[str, Result | None]] = []
    report = run_suite("sim", TINY, only=("streams",), progress=lambda title, result: seen.append((title, result)))
    assert seen[0] == ("several streams", None)
    assert [result for _, result in seen if result is not None] == report.results


def test_mistakes_are_told(sim: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"no part of the benchmarks is called 'link'; there are copy, duplex"):
        Suite(accelerator_for(torch.device("sim")), TINY, only=("link",))
    with pytest.raises(ValueError, match="there is no accelerator to measure"):
        run_suite("cpu")
    with pytest.raises(ValueError, match="repeats=0 is not possible"):
        Settings(repeats=0)
    with pytest.raises(ValueError, match="are no sizes of copies"):
        Settings(sizes=())
    with pytest.raises(ValueError, match="copies of 4096 bytes do not fit"):
        TINY.within(100, 1 << 40)
    assert "ranks" in PARTS


def test_sizes_that_do_not_fit_are_left_out() -> None:
    fitted = Settings().within(8 * 64 * MIB, 1 << 40)
    assert max(fitted.sizes) == 64 * MIB
    assert max(fitted.copy_bytes, fitted.pin_bytes, 12 * fitted.update_numel) <= 64 * MIB


# ---- results


def result(value: float = 1e9, unit: str = "bytes/s", spread: float = 0.0, **changes: object) -> Result:
    fields = {"group": "copy", "source": "pinned", "target": "device", "mode": "alone", "num_bytes": 4096, **changes}
    return Result(value=value, unit=unit, low=value - spread, high=value + spread, **fields)


def test_report_comes_back_equal(tmp_path: Path) -> None:
    report = Report({"device": "sim"}, {"repeats": 2}, [result(details={"seconds": 1.0}), result(unit="s")], {"a": 1.0})
    report.save(tmp_path / "a.json")
    assert Report.load(tmp_path / "a.json") == report


@pytest.mark.parametrize("text", ["{}", "no json", '{"schema": 99}', '{"schema": 1, "results": [{"x": 1}]}'])
def test_other_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="is not what `offload bench --json` writes"):
        Report.load(tmp_path / "a.json")


def test_csv_has_a_line_a_case_and_a_column_a_detail() -> None:
    text = Report({}, {}, [result(details={"seconds": 2.0}), result(num_bytes=None, problem="slow, odd")]).as_csv()
    lines = text.splitlines()
    assert lines[0] == "name,group,source,target,mode,num_bytes,value,unit,low,high,problem,seconds"
    assert lines[1] == "pinned_to_device.alone.4.0KiB,copy,pinned,device,alone,4096,1000000000.0,bytes/s,1000000000.0,1000000000.0,,2.0"  # fmt: skip  # noqa: E501
    assert lines[2].endswith(',"slow, odd",')


def test_comparison_knows_better_from_worse() -> None:
    before = Report({}, {}, [result(1e9), result(1.0, "s", mode="pin"), result(5e9, mode="same"), result(mode="gone")])
    after = Report({}, {}, [result(5e8), result(0.5, "s", mode="pin"), result(5.1e9, mode="same"), result(mode="new")])
    changes = compare(before, after)
    assert [change.name.split(".")[1] for change in changes] == ["alone", "same", "pin"]
    assert [change.gain for change in changes] == pytest.approx([-0.5, 0.02, 1.0])
    assert [change.is_noticeable for change in changes] == [True, False, True]
    with pytest.raises(ValueError, match="no case in common"):
        compare(before, Report({}, {}, []))


def test_a_change_within_the_spread_is_not_noticeable() -> None:
    (change,) = compare(Report({}, {}, [result(1e9, spread=2e8)]), Report({}, {}, [result(1.1e9)]))
    assert not change.is_noticeable


def test_values_for_a_reader() -> None:
    assert format_value(12.34e9, "bytes/s") == "12.3 GB/s"
    assert format_value(5e-6, "s") == "5.0 us"
    assert format_value(0.0523, "s") == "52.3 ms"
    assert format_value(0.97, "share") == "97%"
