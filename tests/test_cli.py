"""The command line: what it prints, what it writes, and what it says to mistakes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import offload
from offload.beliefs import Measurement
from offload.cli import main
from offload.controller import Controller
from offload.hardware import HardwareProfile
from offload.homes import Homes
from offload.perf_model import Rates, predict
from offload.plan import Plan
from offload.subgroup import Subgroup
from offload.timeline import elapsed_s
from offload.timing import work_of

PLAN = ["plan", "--model", "llama-7b", "--hardware", "h100-sxm-node", "--ranks", "8", "--device-budget", "3GiB"]


def output(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main(arguments) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


# ---- plan


def test_plan_prints_bill_step_plan_alternatives_and_levers(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, *PLAN)
    for part in (
        "6,738,415,616 parameters, 842,301,952 updated by each of 8 ranks on h100-sxm-node",
        "memory of one rank", "peaks   forward", "for the 8 ranks of a node", "predicted step", "backward",
        "binds (seconds each resource needs at least", "stride 2", "all host", "1.00x", "what would help most",
        "state_format int8", "how the update hides", "states in backward, update under the next forward",
        "hidden: states in backward, update under the next forward, 1 more slot in freed activations "
        "(overlap='next_forward')",
    ):  # fmt: skip
        assert part in text, part
    assert "WARNING" not in text


def test_plan_warns_of_a_budget_that_the_device_does_not_hold(capsys: pytest.CaptureFixture[str]) -> None:
    shape = "num_layers=24,hidden=2048,ffn=5632,num_heads=16,num_kv_heads=16,vocab=32000"
    arguments = ["plan", "--model", shape, "--hardware", "rtx4090-desktop", "--device-budget", "20GiB"]
    text = output(capsys, *arguments)
    assert re.search(r"WARNING: the plan does not fit rtx4090-desktop: .* the most that fits is device_budget", text)
    assert "the plan does not fit" in json.loads(output(capsys, *arguments, "--json"))["warning"]


@pytest.mark.parametrize(
    "options",
    [
        ["--hardware", "rtx4090-desktop"],
        ["--hardware", "rtx4090-desktop", "--state-format", "split16", "--device-budget", "1GiB"],
        ["--hardware", "rtx3090-desktop", "--device-budget", "400MiB"],
        ["--hardware", "h100-sxm-node", "--device-budget", "0"],
    ],
    ids=" ".join,
)
def test_plan_says_how_to_run_it(sim: ModuleType, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    """What it says makes an optimizer, here of a layer, whose states may live in the places that the plan has."""
    shape = "num_layers=8,hidden=1024,ffn=4096,num_heads=16,num_kv_heads=16,vocab=32000"
    text = output(capsys, "plan", "--model", shape, *options)
    call = re.search(r"^to run it: (offload\.AdamW\(.*\))$", text, re.MULTILINE)
    assert call is not None, text
    sim.configure(capacity="4GiB")
    model = nn.Linear(64, 64, device="sim", dtype=torch.bfloat16)
    monitor = offload.MemoryMonitor("sim")
    optimizer = eval(call[1], {"offload": offload, "model": model, "monitor": monitor})
    assert optimizer.runtime.subgroups
    assert ("resident" in re.search(r"^plan: (.*);", text, re.MULTILINE)[1]) == ("device_budget" in call[1])
    early = "hidden: gradients and states in backward, update under the next forward" in text
    assert early == ("early_gradients=True" in call[1]) == optimizer.runtime.options.early_gradients


def test_plan_of_several_ranks_is_run_by_deepspeed(capsys: pytest.CaptureFixture[str]) -> None:
    said = re.search(r'^to run it: ("interleaved_offload": \{.*\}) (.*)$', output(capsys, *PLAN), re.MULTILINE)
    assert said is not None
    keys = json.loads(f"{{{said[1]}}}")["interleaved_offload"].keys()
    assert keys <= {"plan", "device_budget", "num_slots", "overlap"}
    assert said[2] == "(without slots in freed activations)"


def test_plan_without_clipping_updates_in_backward(capsys: pytest.CaptureFixture[str]) -> None:
    planned = json.loads(output(capsys, *PLAN, "--no-clipping", "--grad-dtype", "fp32", "--json"))
    assert planned["step"]["in_backward"]
    assert planned["overlaps"][0]["step_s"] == planned["step"]["step_s"]
    assert not any(way["in_backward"] for way in json.loads(output(capsys, *PLAN, "--json"))["overlaps"])


def test_plan_as_json_is_timed_the_same_by_simulate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = output(capsys, *PLAN, "--json")
    (tmp_path / "plan.json").write_text(text)
    planned = json.loads(text)
    simulated = json.loads(
        output(capsys, "simulate", str(tmp_path / "plan.json"), "--hardware", "h100-sxm-node", "--json")
    )
    assert simulated["update_s"] == planned["plan"]["update_s"]
    assert simulated["binds"] == planned["plan"]["binds"]
    elsewhere = output(capsys, "simulate", str(tmp_path / "plan.json"), "--hardware", "gh200")
    assert elsewhere.startswith("update on gh200: ")


def test_plan_writes_trace_and_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output(capsys, *PLAN, "--trace", str(tmp_path / "t.json"), "--plot", str(tmp_path / "t.png"))
    names = {event["name"] for event in json.loads((tmp_path / "t.json").read_text())["traceEvents"]}
    assert {"forward", "backward"} <= names
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def make() -> nn.Module:
    return nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64), nn.Linear(64, 100))


def make_with_arguments() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return nn.Linear(64, 64), (torch.zeros(3, 64),)


def no_module() -> int:
    return 3


@pytest.mark.parametrize(("function", "numel"), [("make", 17060), ("make_with_arguments", 4160)])
def test_plan_of_a_module(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, function: str, numel: int
) -> None:
    monkeypatch.setitem(sys.modules, "my_models", sys.modules[__name__])
    text = output(capsys, "plan", "--model", f"my_models:{function}", "--hardware", "gh200", "--seq", "16")
    assert f"{numel:,} parameters" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "h200"], "no hardware profile 'h200': .* dos-a100, dos-h100, gh200"),
        (["--model", "llama-8b"], "no model shape 'llama-8b'"),
        (["--model", "nowhere:make"], "no function 'nowhere:make': No module named 'nowhere'"),
        (["--model", "my_models:missing"], "no function 'my_models:missing'"),
        (["--model", "my_models:no_module"], "returned a int; return a module"),
        (["--model", "my_models:make", "--no-recompute"], "--no-recompute is for shapes"),
        (["--host-budget", "1GiB"], "the least that would do is .* host_budget"),
        (["--device-budget", "much"], "--device-budget='much' is no size"),
        (["--ranks", "0"], "num_ranks=0 is no number of ranks"),
        (["--state-format", "fp8"], "state_format='fp8' is unknown"),
        (["--zero-stage", "5"], "zero_stage=5 is unknown"),
        (["--seq", "0"], "seq=0 is not possible"),
        (["--subgroup-numel", "0"], "subgroup_numel=0 is out of range"),
    ],
)
def test_mistakes_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "my_models", sys.modules[__name__])
    assert main([*PLAN, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("offload plan: ")
    assert re.search(message, error), error


# ---- simulate


def test_simulate_a_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["simulate", "P0@0 G0@0 F0@0 D1@0 C1@0 U1@0", "--hardware", "gh200", "--subgroup-numel", "100000000"]
    text = output(capsys, *arguments, "--trace", str(tmp_path / "t.json"))
    rates = Rates.from_profile(HardwareProfile.load("gh200"))
    subgroups = [Subgroup(i, 10**8, 2 * 10**8, 12 * 10**8) for i in range(2)]
    expected_s = predict(Plan.parse(arguments[1]), subgroups, rates).update_s
    assert f"update on gh200: {expected_s:.4g} s" in text
    assert "lane" in text
    assert (tmp_path / "t.json").exists()


@pytest.mark.parametrize(
    ("plan", "arguments", "message"),
    [
        ("P0@0 G0@0 F0@0", [], "a plan given as text needs --subgroup-numel"),
        ("P0@0 G0@0", ["--subgroup-numel", "100"], "never leaves slot 0"),
        ("hello", ["--subgroup-numel", "100"], "word 0 of the plan, 'hello', is no operation"),
        ("missing.json", [], "No such file"),
    ],
)
def test_simulate_tells_mistakes(
    capsys: pytest.CaptureFixture[str], plan: str, arguments: list[str], message: str
) -> None:
    error = output(capsys, "simulate", plan, "--hardware", "gh200", *arguments, status=2)
    assert message in error


def test_simulate_refuses_other_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"plan": {}}')
    error = output(capsys, "simulate", str(tmp_path / "other.json"), "--hardware", "gh200", status=2)
    assert "is not what `offload plan --json` writes" in error


# ---- explain


def test_explain_a_log(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    subgroups = [Subgroup(i, 10**6, 2 * 10**6, 12 * 10**6) for i in range(8)]
    controller = Controller(subgroups, Homes(visitors=frozenset(range(8)), num_slots=2, num_staging=2))
    plan = controller.first_plan
    for step in range(1, 13):
        spans = predict(plan, subgroups, Rates(20e9, 20e9, 1e9, 1e11)).spans
        decision = controller.observe(Measurement(step, work_of(spans, subgroups), elapsed_s(spans)), plan)
        assert decision is not None
        plan = decision.plan
    controller.save(tmp_path / "log")
    text = output(capsys, "explain", str(tmp_path / "log"))
    assert text.startswith("12 decisions, the same when taken again\n4 decisions before these\nstep 5: update ")
    assert "kept the plan" in text
    assert "prediction against measurement: " in text
    assert len(json.loads(output(capsys, "explain", str(tmp_path / "log"), "--json"))) == 12


def test_explain_tells_what_is_no_log(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "log").write_text("{}")
    assert "is no log of decisions" in output(capsys, "explain", str(tmp_path / "log"), status=2)


# ---- calibrate


def test_calibrate_writes_a_profile(sim: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    text = output(
        capsys, "calibrate", "--emulated", "--numel", "65536", "--name", "mine", "--output", str(path)
    )  # fmt: skip
    assert text.startswith("mine: sim device, measured by offload calibrate")
    assert HardwareProfile.load(path).name == "mine"
