"""The kernel's benchmark: fair turns, paired ratios, and a report of what was and wasn't measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cpu_adam, cpu_adam_cases
from bench.interleaved import Times, take_turns


def test_cases_take_turns_and_each_begins_once() -> None:
    ran: list[str] = []
    times = take_turns({name: lambda name=name: ran.append(name) for name in "abc"}, num_turns=3)
    turns = ["".join(ran[i : i + 3]) for i in range(0, len(ran), 3)]
    assert turns == ["cab", "abc", "bca", "cab"], "one untimed turn, then three that begin with another case each"
    assert {name: len(each.turns_s) for name, each in times.items()} == dict.fromkeys("abc", 3)


def test_a_slow_spell_cancels_out_of_a_ratio() -> None:
    ours, theirs = Times((1.0, 10.0, 1.0, 1.0)), Times((2.0, 20.0, 2.0, 30.0))
    assert theirs.over(ours) == 2.0
    assert ours.median_s == 1.0
    assert ours.quartiles_s == (1.0, 3.25)
    assert Times((5.0,)).quartiles_s == (5.0, 5.0)


@pytest.fixture
def run_bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    num_threads = torch.get_num_threads()
    # Empty: DeepSpeed would build its operator here, for minutes, so that a quick run leaves it out.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    def run(*arguments: str) -> dict[str, Any]:
        file = tmp_path / "results.json"
        monkeypatch.setattr(sys, "argv", ["bench.cpu_adam", *arguments, "--json", str(file)])
        cpu_adam.main()
        return json.loads(file.read_text())

    yield run
    torch.set_num_threads(num_threads)


def test_a_build_that_was_killed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    jobs = cpu_adam_cases.make_jobs(cpu_adam_cases.Buffers(64), torch.get_num_threads(), quick=True)
    assert f"delete {lock}" in jobs.missing[cpu_adam_cases.DEEPSPEED]


def test_report(run_bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    sizes = ("--numel", "4096", "65536", "--threads", "1", "2", "--turns", "2")
    results = run_bench("--quick", *sizes, "--plot", str(picture))
    assert picture.stat().st_size > 10_000
    assert (results["numel"], results["threads"]) == (65536, 2), "the size nearest the goals', with all threads"
    for name in ("stream_fraction", "vs_torch_fused", "vs_torch_fused_path", "call_overhead_us", "unprepared_call_us"):
        assert results[name] > 0, name
    for name in ("vs_zero3_path", "vs_deepspeed_cpuadam", "split16_vs_fp32", "bf16_vs_fp32", "int8_vs_fp32"):
        assert results[name] is None or results[name] > 0, name
    measured = {(row["numel"], row["threads"], row["job"], row["case"]) for row in results["rows"]}
    for numel in (4096, 65536):
        for threads in (1, 2):
            assert (numel, threads, "step", cpu_adam_cases.OURS) in measured
            assert (numel, threads, "offload", cpu_adam_cases.OURS_OFFLOAD) in measured
    assert all(len(row["turns_s"]) == 2 for row in results["rows"])
    assert len(results["by_size"]) == 4
    printed = capsys.readouterr().out
    assert "torch compiled" in printed, "what is left out is said, with the reason"
    assert "left out of a quick run" in printed


def test_a_peer_that_is_not_there_has_a_row_that_says_so(
    run_bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_adam_cases.importlib.util, "find_spec", lambda _name: None)
    results = run_bench("--quick", "--numel", "4096", "--turns", "1", "--threads", "1")
    assert results["vs_zero3_path"] is results["vs_deepspeed_cpuadam"] is None
    assert results["missing"][cpu_adam_cases.ZERO3] == "not installed"
    printed = capsys.readouterr().out
    for name in (cpu_adam_cases.ZERO3, cpu_adam_cases.DEEPSPEED):
        assert [line for line in printed.splitlines() if line.split("  ")[-1] == "not installed" and name in line]


def test_a_size_that_memory_cannot_hold_is_left_out(run_bench: Any) -> None:
    with pytest.raises(SystemExit, match="no size fits into the memory that is free"):
        run_bench("--numel", str(1 << 50))


def test_wrong_results_are_not_timed(run_bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = cpu_adam_cases.Buffers.ours

    def ours(self: Any, *arguments: Any) -> None:
        honest(self, *arguments)
        self.exp_avg.view(torch.int32)[5] ^= 1

    monkeypatch.setattr(cpu_adam_cases.Buffers, "ours", ours)
    with pytest.raises(SystemExit, match="disagree: nothing was timed"):
        run_bench("--numel", "4096")


def test_arguments_are_checked(run_bench: Any) -> None:
    with pytest.raises(SystemExit):
        run_bench("--numel", "0")
