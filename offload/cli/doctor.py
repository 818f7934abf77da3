"""Say what is there, test every kernel and the runtime, and end with what to change, in order of gain."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import torch

from offload.doctor import Finding, examine, exit_status, remedies
from offload.testing import sim


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--emulated", action="store_true", help="examine the emulated device as the accelerator")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.epilog = "Exit status: 0 all is well, 1 something is bad, 3 there is no accelerator and the rest is well."


def run(options: argparse.Namespace) -> int:
    if options.emulated:
        sim.load()
    device = torch.accelerator.current_accelerator(check_available=True)
    findings = examine(device, None if options.json else _tell)
    wanted, status = remedies(findings), exit_status(findings)
    if options.json:
        content = {"findings": [asdict(finding) for finding in findings], "remedies": wanted, "status": status}
        print(json.dumps(content, indent=1))
        return status
    if wanted:
        print("what to change, in order of gain:")
        for number, remedy in enumerate(wanted, start=1):
            print(f"{number}. {remedy}")
    else:
        print("nothing to change")
    return status


def _tell(finding: Finding) -> None:
    print(finding, flush=True)
