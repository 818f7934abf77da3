"""The command line: ``offload plan | simulate | explain | calibrate | bench | doctor | watch``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from offload.cli import bench, calibrate, doctor, explain, plan, simulate, watch

COMMANDS = {
    "plan": plan,
    "simulate": simulate,
    "explain": explain,
    "calibrate": calibrate,
    "bench": bench,
    "doctor": doctor,
    "watch": watch,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for a mistake in what was asked for, or what the command says."""
    parser = argparse.ArgumentParser(
        prog="offload", description="Plan, predict and explain CPU-GPU offloading of optimizer states."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").split("\n")[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    options = parser.parse_args(arguments)
    try:
        status: int | None = COMMANDS[options.command].run(options)
    except (ValueError, TypeError, OSError) as error:
        print(f"offload {options.command}: {error}", file=sys.stderr)
        return 2
    return status or 0
