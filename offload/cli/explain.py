"""Explain the decisions of a training run, from the log of `optimizer.save_decisions`, by taking them again."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from offload.controller import Controller, replay
from offload.explain import explain_decisions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("log", type=Path, metavar="LOG", help="file written by optimizer.save_decisions")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(options: argparse.Namespace) -> None:
    controller = replay(options.log)
    if options.json:
        print(json.dumps([decision.as_dict() for decision in controller.decisions], indent=1))
    else:
        print(report(controller))


def report(controller: Controller) -> str:
    decisions = controller.decisions
    lines = [f"{len(decisions)} decisions, the same when taken again", *explain_decisions(decisions)]
    errors = [abs(decision.error) for decision in decisions if decision.error is not None]
    if errors:
        lines.append(f"prediction against measurement: {statistics.median(errors):.1%} off in the median")
    if decisions:
        lines.append(f"plan: {decisions[-1].plan}")
    return "\n".join(lines)
