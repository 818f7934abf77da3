"""The status of a running optimizer as a view for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from offload.pool import format_bytes

STALE_S = 30.0  # a file that is older belongs to a run that waits, or has ended
_BAR_WIDTH = 30
_MAX_PLAN = 60  # characters of a plan's text
_TIGHT = 0.9  # of a budget: from here on it is shown in red


def status_view(status: Mapping[str, Any], now_unix_s: float) -> RenderableType:
    """Everything on one screen. ``now_unix_s`` tells how old the status is."""
    age_s = now_unix_s - status["written_unix_s"]
    head = Text(f"step {status['num_steps']} on {status['device']}, process {status['pid']}", style="bold")
    if age_s > STALE_S:
        head.append(f"  written {age_s:.0f} s ago: the run waits or has ended", style="red")
    parts: list[RenderableType] = [head, _phases(status), _budgets(status)]
    parts.append(_lanes(status) if status["lanes"] else Text("no step was measured yet", style="dim"))
    parts += [Text(f"step {each['step']}: plan {_short(each['plan'])}", style="cyan") for each in status["changes"]]
    parts += [Text(_decision(each), style="dim") for each in status["decisions"]]
    return Group(*parts)


def _phases(status: Mapping[str, Any]) -> Table:
    table = Table(title="Memory by phase", title_justify="left")
    table.add_column("phase")
    for header in ("device peak", "of device", "host RSS", "pinned", "mean ms"):
        table.add_column(header, justify="right")
    total = status["device_bytes"]
    for phase, seen in status["phases"].items():
        peak = seen["peak_allocated_bytes"]
        share = f"{peak / total:.0%}" if peak is not None and total else "-"
        table.add_row(
            phase, _bytes(peak), share, _bytes(seen["rss_bytes"]), _bytes(seen["pinned_bytes"]),
            f"{seen['mean_duration_s'] * 1e3:.1f}",
        )  # fmt: skip
    return table


def _budgets(status: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    for kind, taken in status["bill"].items():
        budget = status["budgets"][kind]
        limit = "no limit" if budget is None else f"of {format_bytes(budget)}"
        bar = _bar(taken / budget) if budget else Text("")
        table.add_row(f"{kind} memory of the optimizer", f"{format_bytes(taken)} {limit}", bar)
    return table


def _lanes(status: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("update", f"{status['update_s'] * 1e3:.2f} ms", "")
    for lane, share in status["lanes"].items():
        table.add_row(lane, f"{share:.0%} busy", _bar(share, warn=False))
    return table


def _bar(share: float, *, warn: bool = True) -> ProgressBar:
    style = "red" if warn and share > _TIGHT else "green"
    return ProgressBar(
        total=1.0, completed=min(1.0, share), width=_BAR_WIDTH, complete_style=style, finished_style=style
    )


def _decision(each: Mapping[str, Any]) -> str:
    predicted = "" if each["predicted_s"] is None else f", predicted {each['predicted_s'] * 1e3:.2f} ms"
    return f"step {each['step']}: {each['action']}, update {each['update_s'] * 1e3:.2f} ms{predicted}"


def _short(plan: str) -> str:
    return plan if len(plan) <= _MAX_PLAN else f"{plan[:_MAX_PLAN]}..."


def _bytes(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else format_bytes(num_bytes)
