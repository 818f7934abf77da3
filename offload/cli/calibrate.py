"""Measure this machine's link, memory and update rates, and write them as a hardware profile."""

from __future__ import annotations

import argparse
from pathlib import Path

from offload.calibration import DEFAULT_NUMEL, calibrate
from offload.testing import sim


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the profile there, for --hardware")
    parser.add_argument("--name", default="this machine", help="of the profile")
    parser.add_argument("--numel", type=int, default=DEFAULT_NUMEL, help="parameters of the updates that are timed")
    parser.add_argument("--ranks", type=int, default=1, help="ranks that share this host (calibrate them together)")
    parser.add_argument("--emulated", action="store_true", help="calibrate the emulated device instead of a real one")


def run(options: argparse.Namespace) -> None:
    if options.emulated:
        sim.load()
    profile = calibrate(
        "sim" if options.emulated else None,
        name=options.name,
        numel=options.numel,
        num_ranks_per_node=options.ranks,
    )
    if options.output:
        profile.save(options.output)
    print(profile.describe())
