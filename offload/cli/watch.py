"""Watch a training run: memory by phase against the budgets, the lanes' use, changes of the plan.

The run writes a file where OFFLOAD_STATUS=FILE is set in its environment, or with offload.LiveStatus(optimizer, FILE).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from offload.live import read_status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="the one that OFFLOAD_STATUS names in the run")
    parser.add_argument("--once", action="store_true", help="print what is there and end")
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between looks (default 1)")


def run(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.live import Live

    from offload.report.status import status_view

    if not options.interval > 0:
        raise ValueError(f"--interval {options.interval} is no time; give more than 0 seconds")
    view = status_view(read_status(options.file), time.time())
    if options.once:
        Console().print(view)
        return
    try:
        with Live(view, auto_refresh=False) as live:
            while True:
                time.sleep(options.interval)
                live.update(status_view(read_status(options.file), time.time()), refresh=True)
    except KeyboardInterrupt:
        return
