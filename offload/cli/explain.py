"""Explain a measured step (`optimizer.save_trace`), or the decisions of a run (`optimizer.save_decisions`)."""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path

from offload.controller import Controller, replay
from offload.explain import explain_decisions
from offload.hardware import HardwareProfile
from offload.perf_model import Rates
from offload.record import StepRecord
from offload.verdict import diagnose
from offload.verdict import report as report_step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help_file = "file of optimizer.save_trace or of optimizer.save_decisions"
    parser.add_argument("file", type=Path, metavar="FILE", help=help_file)
    parser.add_argument("--hardware", metavar="NAME_OR_FILE", help="what the machine should do, for a trace")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(options: argparse.Namespace) -> None:
    if _is_trace(options.file):
        _explain_step(options)
        return
    if options.hardware:
        raise ValueError("--hardware is for traces; a log of decisions has the rates that were measured in it")
    controller = replay(options.file)
    if options.json:
        print(json.dumps([decision.as_dict() for decision in controller.decisions], indent=1))
    else:
        print(report(controller))


def _is_trace(path: Path) -> bool:
    """A trace is one JSON object with events; a log of decisions has a line for each."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and "traceEvents" in content


def _explain_step(options: argparse.Namespace) -> None:
    expected = Rates.from_profile(HardwareProfile.load(options.hardware)) if options.hardware else None
    diagnosis = diagnose(StepRecord.load(options.file), expected)
    if options.json:
        content = {
            "update_s": diagnosis.update_s, "predicted_s": diagnosis.predicted_s,
            "binds": diagnosis.bound.binds, "bound_s": diagnosis.bound.seconds_of,
            "verdicts": [asdict(verdict) for verdict in diagnosis.verdicts],
        }  # fmt: skip
        print(json.dumps(content, indent=1))
    else:
        print(report_step(diagnosis))


def report(controller: Controller) -> str:
    decisions = controller.decisions
    lines = [f"{len(decisions)} decisions, the same when taken again", *explain_decisions(decisions)]
    errors = [abs(decision.error) for decision in decisions if decision.error is not None]
    if errors:
        lines.append(f"prediction against measurement: {statistics.median(errors):.1%} off in the median")
    if decisions:
        lines.append(f"plan: {decisions[-1].plan}")
    return "\n".join(lines)
