"""The status of a running optimizer: what is written when, and how it is shown."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload.cli import main
from offload.live import MEASURE_INTERVAL_S, WRITE_INTERVAL_S, LiveStatus, read_status
from offload.monitor import MemoryMonitor

NUMEL = 4096


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make(device: str = "cpu", **options: Any) -> offload.AdamW:
    params = [nn.Parameter(torch.zeros(NUMEL, device=device)) for _ in range(4)]
    optimizer = offload.AdamW(params, subgroup_numel=NUMEL, **options)
    for param in params:
        param.grad = torch.zeros_like(param)
    return optimizer


def shown(content: dict[str, Any], now_unix_s: float) -> str:
    from rich.console import Console

    from offload.report.status import status_view

    text = io.StringIO()
    Console(file=text, width=120).print(status_view(content, now_unix_s))
    return text.getvalue()


# ---- the file


def test_status_tells_memory_lanes_plan_and_budgets(sim: ModuleType, tmp_path: Path) -> None:
    optimizer = make("sim", plan=offload.Stride(2), device_budget="1MiB")
    clock = Clock()
    LiveStatus(optimizer, tmp_path / "s", clock=clock)
    for _ in range(2):
        clock.now_s += WRITE_INTERVAL_S
        optimizer.step()
    status = read_status(tmp_path / "s")
    assert status["num_steps"] == 2
    assert set(status["phases"]) == {"update", "idle"}
    assert status["phases"]["update"]["peak_allocated_bytes"] > 0
    assert set(status["lanes"]) == {"host", "compute", "h2d", "d2h"}
    assert status["bill"]["device"] == optimizer.bill.device_bytes
    assert status["budgets"] == {"device": 1 << 20, "host": None, "pinned": None}
    assert status["changes"] == [{"step": 1, "plan": str(optimizer.plan)}]
    assert [path.name for path in tmp_path.iterdir()] == ["s"], "no half-written file is left"


def test_a_monitor_of_the_model_tells_forward_from_backward(sim: ModuleType, tmp_path: Path) -> None:
    model = nn.Linear(32, 32, device="sim")
    optimizer = offload.AdamW(model.parameters(), plan="host")
    monitor, clock = MemoryMonitor("sim"), Clock()
    monitor.attach(model, optimizer)
    LiveStatus(optimizer, tmp_path / "s", monitor, clock=clock)
    for _ in range(2):
        model(torch.ones(4, 32, device="sim")).sum().backward()
        clock.now_s += WRITE_INTERVAL_S
        optimizer.step()
    assert {"forward", "backward", "update"} <= set(read_status(tmp_path / "s")["phases"])


def test_changes_of_the_plan_and_decisions_are_kept(sim: ModuleType, tmp_path: Path) -> None:
    optimizer, clock = make("sim", plan="auto"), Clock()
    LiveStatus(optimizer, tmp_path / "s", clock=clock)
    for _ in range(4):
        clock.now_s += WRITE_INTERVAL_S
        optimizer.step()
    optimizer.set_plan(offload.lower([offload.Placement.HOST] * 4, num_slots=0, num_staging=2))
    clock.now_s += WRITE_INTERVAL_S
    optimizer.step()
    status = read_status(tmp_path / "s")
    assert status["changes"][-1] == {"step": 5, "plan": str(optimizer.plan)}
    assert len(status["changes"]) >= 2
    assert len(status["decisions"]) == len(optimizer.runtime.in_force.decisions) > 0


def test_it_is_written_and_measured_seldom(sim: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty steps in the time of one interval: one is written, and one is measured."""
    written: list[int] = []
    measured: list[int] = []
    real = LiveStatus._content
    optimizer, clock = make("sim", plan="host"), Clock()

    def content(self: LiveStatus, runtime: Any) -> dict[str, Any]:
        written.append(self._num_steps)
        return real(self, runtime)

    monkeypatch.setattr(LiveStatus, "_content", content)
    LiveStatus(optimizer, tmp_path / "s", clock=clock)
    optimizer.register_step_pre_hook(lambda own, *_: measured.append(1) if own.runtime.time_next_step else None)
    for _ in range(20):
        clock.now_s += WRITE_INTERVAL_S / 20
        optimizer.step()
    assert written == [0, 20]
    assert len(measured) == 1
    clock.now_s += MEASURE_INTERVAL_S
    optimizer.step()
    assert len(measured) == 2


def test_close_ends_it(tmp_path: Path) -> None:
    optimizer, clock = make(), Clock()
    status = LiveStatus(optimizer, tmp_path / "s", clock=clock)
    status.close()
    clock.now_s += WRITE_INTERVAL_S
    optimizer.step()
    assert read_status(tmp_path / "s")["num_steps"] == 0


def test_a_disk_that_fills_ends_the_status_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer, clock = make(), Clock()
    LiveStatus(optimizer, tmp_path / "s", clock=clock)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    for _ in range(2):
        clock.now_s += WRITE_INTERVAL_S
        optimizer.step()
    assert caplog.text.count("the status is no longer written to") == 1


def test_a_file_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    optimizer = make()
    with pytest.raises(ValueError, match=r"cannot write the status to .*missing/s"):
        LiveStatus(optimizer, tmp_path / "missing" / "s")
    optimizer.step()  # without the hooks of the status that failed


@pytest.mark.parametrize(("rank", "name"), [(None, "s"), ("0", "s"), ("3", "s.rank3")])
def test_the_environment_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str | None, name: str
) -> None:
    monkeypatch.setenv("OFFLOAD_STATUS", str(tmp_path / "s"))
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    make()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_nothing_is_written_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OFFLOAD_STATUS", raising=False)
    optimizer = make()
    assert not optimizer._optimizer_step_post_hooks


def test_bits_are_those_without_it(sim: ModuleType, tmp_path: Path) -> None:
    ends = []
    for watched in (False, True):
        optimizer, clock = make("sim", plan=offload.Stride(2)), Clock()
        if watched:
            LiveStatus(optimizer, tmp_path / "s", clock=clock)
        for group in optimizer.param_groups:
            for i, param in enumerate(group["params"]):
                param.grad = torch.full_like(param, i + 0.5)
        for _ in range(3):
            clock.now_s += MEASURE_INTERVAL_S
            optimizer.step()
        optimizer.synchronize()
        ends.append([param.detach().cpu() for group in optimizer.param_groups for param in group["params"]])
    assert all(map(torch.equal, *ends))


# ---- the view


def status(**changes: Any) -> dict[str, Any]:
    phase = {"peak_allocated_bytes": 1 << 29, "pinned_bytes": 1 << 20, "rss_bytes": None, "mean_duration_s": 0.25}
    return {
        "schema": 1, "pid": 7, "written_unix_s": 1000.0, "num_steps": 12, "device": "sim:0", "device_bytes": 1 << 30,
        "phases": {"forward": phase}, "bill": {"device": 95, "host": 10, "pinned": 10},
        "budgets": {"device": 100, "host": None, "pinned": None}, "lanes": {"host": 0.5, "h2d": 1.0}, "update_s": 0.02,
        "changes": [{"step": 3, "plan": "R0 " * 100}],
        "decisions": [{"step": 4, "action": "moved", "update_s": 0.01, "predicted_s": 0.02}], **changes,
    }  # fmt: skip


def test_view_shows_all_of_it() -> None:
    text = shown(status(), 1001.0)
    for part in (
        "step 12 on sim:0, process 7", "forward", "512.0 MiB", "50%", "250.0", "95 B of 100 B", "10 B no limit",
        "update", "20.00 ms", "h2d", "100% busy", "step 3: plan R0 R0", "...",
        "step 4: moved, update 10.00 ms, predicted 20.00 ms",
    ):  # fmt: skip
        assert part in text, part
    assert "ended" not in text


def test_view_says_when_it_is_old_or_nothing_was_measured() -> None:
    assert "written 60 s ago: the run waits or has ended" in shown(status(), 1060.0)
    assert "no step was measured yet" in shown(status(lanes={}), 1000.0)


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text(json.dumps(status(written_unix_s=time.time())))
    assert main(["watch", str(path), "--once"]) == 0
    assert "Memory by phase" in capsys.readouterr().out


def test_command_looks_again_until_interrupted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, looks = tmp_path / "s", []
    path.write_text(json.dumps(status()))

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        path.write_text(json.dumps(status(num_steps=12 + len(looks))))
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("offload.cli.watch.time.sleep", sleep)
    assert main(["watch", str(path), "--interval", "0.25"]) == 0
    assert looks == [0.25] * 3
    assert "step 14 on sim:0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (None, [], "is OFFLOAD_STATUS set to it in the run"),
        ("{}", [], "is no status that a running optimizer wrote"),
        ('{"schema": 9}', [], "schema 9, and this version reads 1"),
        ('{"schema": 1}', ["--interval", "0"], "more than 0 seconds"),
    ],
)
def test_mistakes_are_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str | None, arguments: list[str], message: str
) -> None:
    if text is not None:
        (tmp_path / "s").write_text(text)
    assert main(["watch", str(tmp_path / "s"), *arguments]) == 2
    assert message in capsys.readouterr().err
