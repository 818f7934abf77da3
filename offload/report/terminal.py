"""Benchmarks in the terminal: progress while they run, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from offload.interconnect import Change, Report, Result, format_value

_TITLES = {
    "copy": "Copies, alone",
    "duplex": "Copies while the other direction is busy",
    "streams": "One copy cut over several streams",
    "batch": "Many small copies",
    "update": "CPU update",
    "overlap": "Beside other work",
    "place": "Places: NUMA nodes and cores",
    "cost": "Costs",
    "ranks": "Ranks",
}
_DETAILS = {
    "share_of_alone": "of alone",
    "share_of_one_copy": "of one copy",
    "rate_kept": "rate kept",
}


class ProgressDisplay:
    """A line that says what is measured. Use it as a context, and call it with what the suite tells."""

    def __init__(self, console: Console, num_parts: int) -> None:
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task("starting", total=num_parts)
        self._has_begun = False

    def __enter__(self) -> ProgressDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, title: str, result: Result | None) -> None:
        if result is not None:
            self._progress.update(self._task, description=f"{title}: {result.name}")
            return
        if self._has_begun:
            self._progress.advance(self._task)
        self._has_begun = True
        self._progress.update(self._task, description=title)


def print_report(console: Console, report: Report) -> None:
    """Tables of all results, by group, then what is wrong with any."""
    machine = report.machine
    kind = "emulated device, nothing below is a real machine's" if machine["emulated"] else str(machine["device"])
    console.print(
        f"[bold]{machine['device_name']}[/bold] ({kind}), {machine['num_processors']} processors on "
        f"{machine['num_numa_nodes']} NUMA nodes, torch {machine['torch']}"
    )
    for group, title in _TITLES.items():
        if results := report.group(group):
            console.print(_table(title, results))
    for point in report.step.get("points", ()):
        rate = format_value(report.step["numel"] / point["update_s"], "parameters/s")
        console.print(f"optimizer step, {point['name']}: {format_value(point['update_s'], 's')}, {rate}")
    for problem in report.problems():
        console.print(f"[red]not to be trusted:[/red] {problem}")


def _table(title: str, results: Sequence[Result]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("case", overflow="fold")
    table.add_column("median", justify="right")
    table.add_column("quartiles", justify="right")
    table.add_column("", justify="right")
    for result in results:
        notes = [f"{value:.0%} {_DETAILS[key]}" for key, value in result.details.items() if key in _DETAILS]
        if "exposed_s" in result.details:
            notes.append(f"{format_value(result.details['exposed_s'], 's')} exposed")
        table.add_row(result.name, result.text, result.spread, ", ".join(notes))
    return table


def print_comparison(console: Console, changes: Sequence[Change]) -> None:
    """Every case that both runs have, the worst first; what is more than noise in colour."""
    table = Table(title="Before and after", title_justify="left")
    table.add_column("case", overflow="fold")
    for header in ("before", "after", "gain"):
        table.add_column(header, justify="right")
    for change in changes:
        colour = ("red" if change.gain < 0 else "green") if change.is_noticeable else "default"
        gain = f"[{colour}]{change.gain:+.1%}[/{colour}]"
        table.add_row(change.name, change.before.text, change.after.text, gain)
    console.print(table)
    worse = sum(change.is_noticeable and change.gain < 0 for change in changes)
    better = sum(change.is_noticeable and change.gain > 0 for change in changes)
    console.print(f"{len(changes)} cases in both: {worse} worse and {better} better by more than 5 % and their spread")
