"""Measure the link, what overlaps with what, and the update: a table, JSON, CSV, an HTML report; compare two runs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from offload.interconnect import PARTS, Report, Settings, compare, run_suite
from offload.testing import sim

if TYPE_CHECKING:
    from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="smaller and fewer: about a minute")
    parser.add_argument("--device", help="torch device (default: the accelerator there is)")
    parser.add_argument("--emulated", action="store_true", help="measure the emulated device, in wall-clock time")
    parser.add_argument("--only", nargs="+", default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--ranks", type=int, help="processes to measure alone and together (default: one a device)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there, for --compare")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a line for each case there")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report with plots there")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="report on this earlier run, measure nothing")
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="two earlier runs, measure nothing"
    )


def run(options: argparse.Namespace) -> int:
    """Returns 1 where a result is not to be trusted."""
    from rich.console import Console

    from offload.report.terminal import print_comparison, print_report

    console = Console()
    if options.compare:
        before, after = map(Report.load, options.compare)
        print_comparison(console, compare(before, after))
        return 0
    report = Report.load(options.from_json) if options.from_json else _measure(options, console)
    if options.json:
        report.save(options.json)
    if options.csv:
        options.csv.write_text(report.as_csv(), encoding="utf-8")
    if options.html:
        options.html.write_text(_page(report), encoding="utf-8")
    print_report(console, report)
    return 1 if report.problems() else 0


def _measure(options: argparse.Namespace, console: Console) -> Report:
    from offload.report.terminal import ProgressDisplay

    device = options.device
    if options.emulated:
        sim.load()
        sim.configure("threads", races=False)
        device = "sim"
    num_ranks = max(1, torch.accelerator.device_count()) if options.ranks is None else options.ranks
    settings = replace(Settings.quick() if options.quick else Settings(), num_ranks=num_ranks)
    with ProgressDisplay(console, len(options.only)) as progress:
        return run_suite(device, settings, only=tuple(options.only), progress=progress)


def _page(report: Report) -> str:
    try:
        from offload.report.page import html_page
    except ModuleNotFoundError as error:
        raise ValueError("--html needs matplotlib: pip install matplotlib") from error
    return html_page(report)
