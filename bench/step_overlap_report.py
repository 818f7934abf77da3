"""Rows of :mod:`bench.step_overlap`, the figures that are held against goals, and a table for a reader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload._table import format_table

OURS_FP32 = "next forward, early gradients"
OURS_SPLIT16 = f"{OURS_FP32}, split16"
OURS = (OURS_FP32, OURS_SPLIT16)


@dataclass(frozen=True)
class Row:
    """Seconds of one step, and of its forward and backward alone."""

    profile: str
    model: str
    window: str
    schedule: str
    step_s: float
    alone_s: float

    @property
    def exposed_fraction(self) -> float:
        return 1 - self.alone_s / self.step_s


def ratio(rows: Sequence[Row], baseline: str, window: str, ours: Sequence[str] = OURS) -> float:
    """Least speed-up over ``baseline`` of the machines and models in ``rows``, of the shortest of ``ours`` on each."""
    seconds = {(row.profile, row.model, row.schedule): row.step_s for row in rows if row.window == window}
    return min(
        seconds[profile, model, baseline] / min(seconds[profile, model, schedule] for schedule in ours)
        for profile, model in {(row.profile, row.model) for row in rows}
    )


def show(title: str, rows: Sequence[Row]) -> None:
    print(f"\n{title}")
    cells = [["profile", "model", "window", "schedule", "step", "update exposed"]]
    for row in rows:
        times = [f"{row.step_s * 1e3:.1f} ms", f"{row.exposed_fraction:.1%}"]
        cells.append([row.profile, row.model, row.window, row.schedule, *times])
    print(format_table(cells))


BASELINES = {
    "vs_zero_offload": "zero-offload 2024",
    "vs_zero_offload_pinned": "zero-offload 2024, pinned",
    "vs_zero_offload_today": "zero-offload today",
    "vs_zero_offload_today_its_kernel": "zero-offload today, its kernel",
    "vs_paper": "paper",
    "vs_in_order": "in order",
}


def summary(rows: Sequence[Row]) -> dict[str, object]:
    """The figures that are held against goals: speed-ups in the paper's window, the exposed share in one that suffices.

    ``where_windows_suffice`` has the speed-ups in that one. ``_fp32`` marks those of ours with fp32 state; the others
    are of ours with whichever of the two lossless formats makes the step shorter on that machine.
    """

    def speed_ups(window: str) -> dict[str, float]:
        return {
            f"{key}{suffix}": ratio(rows, name, window, ours)
            for ours, suffix in ((OURS, ""), ((OURS_FP32,), "_fp32"))
            for key, name in BASELINES.items()
        }

    exposed = [row.exposed_fraction for row in rows if row.schedule in OURS and row.window == "suffices"]
    return {
        **speed_ups("paper"),
        "exposed_fraction": max(exposed),
        "where_windows_suffice": speed_ups("suffices"),
    }
