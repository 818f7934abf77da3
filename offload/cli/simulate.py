"""Time a plan on a machine: the file that `offload plan --json` wrote, or a plan's text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from offload.bounds import plan_bound
from offload.cli.options import add_hardware, add_output
from offload.hardware import HardwareProfile
from offload.perf_model import Rates, predict
from offload.plan import Placement, Plan
from offload.state_layout import ADAM_FP32, StateKind, StateLayout
from offload.subgroup import Subgroup
from offload.timeline import describe, draw, write_chrome_trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN", help="JSON of `offload plan --json`, or a text as 'P0@0 G0@0 F0@0'")
    add_hardware(parser)
    parser.add_argument("--ranks", type=int, help="ranks at work on the machine (default: all it has)")
    parser.add_argument("--subgroup-numel", type=int, help="for a text: parameters in each subgroup")
    add_output(parser)


def run(options: argparse.Namespace) -> None:
    profile = HardwareProfile.load(options.hardware)
    plan, subgroups, state_format = read_plan(options.plan, options.subgroup_numel)
    residents = {i for i, where in plan.placements.items() if where is Placement.RESIDENT}
    plan.validate(len(subgroups), resident=residents)
    rates = Rates.from_profile(profile, state_format=state_format, num_ranks=options.ranks)
    prediction, bound = predict(plan, subgroups, rates), plan_bound(plan, subgroups, rates)
    if options.trace:
        write_chrome_trace(options.trace, prediction.spans)
    if options.plot:
        draw([(profile.name, prediction.spans)], options.plot)
    if options.json:
        content = {
            "hardware": profile.name, "update_s": prediction.update_s, "params_ready_s": prediction.params_ready_s,
            "binds": bound.binds, "bound_s": bound.seconds_of,
        }  # fmt: skip
        print(json.dumps(content, indent=1))
        return
    print(
        f"update on {profile.name}: {prediction.update_s:.4g} s, parameters ready after "
        f"{prediction.params_ready_s:.4g} s; {bound.binds} binds and needs {bound.seconds:.4g} s at least"
    )
    print(describe(prediction.spans))


def read_plan(plan: str, subgroup_numel: int | None) -> tuple[Plan, list[Subgroup], str]:
    """The plan, its subgroups, and the format of their state.

    Raises:
        ValueError: if it is neither a file of `offload plan --json` nor a plan's text with ``subgroup_numel``.
    """
    path = Path(plan)
    if plan.endswith(".json"):
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        try:
            sizes, text = content["plan"]["subgroups"], content["plan"]["text"]
            kind = StateKind(content["state_format"])
            subgroups = [
                Subgroup(i, n, param, state, master_in_param=kind.master_in_param)
                for i, (n, param, state) in enumerate(sizes)
            ]
            return Plan.parse(text), subgroups, kind.format
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not what `offload plan --json` writes: {error!r} is missing") from error
    parsed = Plan.parse(plan)
    if subgroup_numel is None:
        raise ValueError("a plan given as text needs --subgroup-numel, the parameters of each of its subgroups")
    numel, state_bytes = subgroup_numel, StateLayout(ADAM_FP32, subgroup_numel).num_bytes
    num = max(parsed.placements, default=-1) + 1
    return parsed, [Subgroup(i, numel, 2 * numel, state_bytes) for i in range(num)], "fp32"
