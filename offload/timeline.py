"""What ran when, on which lane: as a table, a Chrome/Perfetto trace or a picture.

Spans come from executor events or from a simulated clock; nothing here needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload._table import format_table

if TYPE_CHECKING:
    from offload.monitor import MemorySample

LANES = ("host", "compute", "h2d", "d2h")  # the order of rows, top to bottom
MODEL_WORK = frozenset({"forward", "backward"})


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work. ``name`` is an operation of a plan ("P3@1"), "forward" or "backward"; times in seconds."""

    lane: str
    name: str
    start_s: float
    end_s: float

    def __post_init__(self) -> None:
        if not self.start_s <= self.end_s:
            raise ValueError(f"span {self.name!r} on lane {self.lane!r} ends at {self.end_s} before {self.start_s}")

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


def lanes_of(spans: Iterable[Span]) -> list[str]:
    """The lanes that occur: the four known ones in the order of :data:`LANES`, then others by name."""
    seen = {span.lane for span in spans}
    return [lane for lane in LANES if lane in seen] + sorted(seen.difference(LANES))


def elapsed_s(spans: Iterable[Span]) -> float:
    """Seconds from the first start to the last end; 0 for no spans."""
    spans = list(spans)
    return max(span.end_s for span in spans) - min(span.start_s for span in spans) if spans else 0.0


def busy_s(spans: Iterable[Span]) -> dict[str, float]:
    """Seconds in which each lane works, lanes in order. Work of one lane that overlaps in time counts once."""
    spans = list(spans)
    return {lane: _length_s(_union(span for span in spans if span.lane == lane)) for lane in lanes_of(spans)}


def busy_fraction(spans: Iterable[Span]) -> dict[str, float]:
    """:func:`busy_s` over :func:`elapsed_s`, from 0 to 1 (0 where nothing takes time)."""
    spans = list(spans)
    total_s = elapsed_s(spans)
    return {lane: seconds / total_s if total_s else 0.0 for lane, seconds in busy_s(spans).items()}


def exposed_s(spans: Iterable[Span], lane: str | None = None) -> float:
    """Seconds of transfer or update that no forward or backward hides: of one lane, or with None of any.

    This is what offloading adds to a step: time in which such work runs and the model computes nothing.
    """
    spans = list(spans)
    model = _union(span for span in spans if span.name in MODEL_WORK)
    work = _union(span for span in spans if lane in (None, span.lane))  # the model's own is hidden by itself
    hidden_s = sum(
        max(0.0, min(end, model_end) - max(start, model_start))
        for start, end in work
        for model_start, model_end in model
    )
    return _length_s(work) - hidden_s


def describe(spans: Iterable[Span]) -> str:
    """A table of the lanes: number of operations, busy and exposed time in ms, busy share of the whole."""
    spans = list(spans)
    if not spans:
        return "no spans"
    fractions = busy_fraction(spans)
    rows = [("lane", "ops", "busy ms", "busy", "exposed ms")]
    for lane, seconds in busy_s(spans).items():
        num_ops = sum(span.lane == lane for span in spans)
        exposed_ms = exposed_s(spans, lane) * 1e3
        rows.append((lane, str(num_ops), f"{seconds * 1e3:.2f}", f"{fractions[lane]:.0%}", f"{exposed_ms:.2f}"))
    total = f"{elapsed_s(spans) * 1e3:.2f} ms in all, {exposed_s(spans) * 1e3:.2f} ms of it not hidden by the model"
    return format_table(rows) + "\n" + total


def chrome_trace(spans: Iterable[Span], memory: Sequence[MemorySample] = ()) -> dict[str, Any]:
    """The Trace Event Format that https://ui.perfetto.dev and chrome://tracing open; times in microseconds.

    One row per lane, in order. ``memory``, on the same clock as the spans, adds a row of phases and one counter per
    figure. The earliest time of all becomes 0.
    """
    spans = list(spans)
    starts = [span.start_s for span in spans] + [sample.t_s - sample.duration_s for sample in memory]
    origin_s = min(starts, default=0.0)
    rows = lanes_of(spans) + (["phase"] if memory else [])
    events = [{"name": "process_name", "ph": "M", "pid": 0, "args": {"name": "offload"}}]
    for tid, row in enumerate(rows):
        events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": tid, "args": {"name": row}})
        events.append({"name": "thread_sort_index", "ph": "M", "pid": 0, "tid": tid, "args": {"sort_index": tid}})

    def complete(name: str, row: str, start_s: float, duration_s: float) -> dict[str, Any]:
        times = {"ts": (start_s - origin_s) * 1e6, "dur": duration_s * 1e6}
        return {"name": name, "cat": row, "ph": "X", "pid": 0, "tid": rows.index(row), **times}

    events += [complete(span.name, span.lane, span.start_s, span.duration_s) for span in spans]
    for sample in memory:
        start_s = sample.t_s - sample.duration_s
        events.append(complete(sample.phase.value, "phase", start_s, sample.duration_s))
        events += [
            {"name": name, "ph": "C", "pid": 0, "ts": (at_s - origin_s) * 1e6, "args": {"bytes": num_bytes}}
            for name, at_s, num_bytes in _counters(sample, start_s)
            if num_bytes is not None
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_chrome_trace(path: str | Path, spans: Iterable[Span], memory: Sequence[MemorySample] = ()) -> None:
    """Write :func:`chrome_trace` to ``path`` as JSON."""
    Path(path).write_text(json.dumps(chrome_trace(spans, memory)), encoding="utf-8")


def draw(
    panels: Sequence[tuple[str, Sequence[Span]]], path: str | Path, memory: Sequence[MemorySample] | None = None
) -> None:
    """Draw timelines, one panel ``(title, spans)`` above the other on one time axis, to the image file ``path``.

    Lanes are rows, kinds of operation are colours, and the number on a bar is its subgroup. Each panel starts at its
    own time 0. ``memory`` adds a panel of its own below, over the phases and on the clock of the samples.

    Needs matplotlib (ImportError says how to get it). Raises ValueError when there is nothing to draw.
    """
    if not panels or not all(spans for _, spans in panels):
        raise ValueError("nothing to draw: give at least one panel, each with at least one span")
    try:
        from offload._drawing import draw_panels
    except ModuleNotFoundError as error:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from error
    draw_panels(panels, path, memory or ())


def _counters(sample: MemorySample, start_s: float) -> list[tuple[str, float, int | None]]:
    """(counter, time, bytes). The peak holds from the start of its phase, the others are read at its end."""
    return [
        ("device peak of phase", start_s, sample.peak_allocated_bytes),
        ("device allocated", sample.t_s, sample.allocated_bytes),
        ("device reserved", sample.t_s, sample.reserved_bytes),
        ("device used, all processes", sample.t_s, sample.device_used_bytes),
        ("host RSS", sample.t_s, sample.rss_bytes),
        ("host pinned", sample.t_s, sample.pinned_bytes),
    ]


def _union(spans: Iterable[Span]) -> list[tuple[float, float]]:
    """The time covered by ``spans``, as disjoint intervals in order."""
    covered: list[tuple[float, float]] = []
    for start_s, end_s in sorted((span.start_s, span.end_s) for span in spans):
        if covered and start_s <= covered[-1][1]:
            covered[-1] = (covered[-1][0], max(covered[-1][1], end_s))
        else:
            covered.append((start_s, end_s))
    return covered


def _length_s(intervals: Iterable[tuple[float, float]]) -> float:
    return sum(end_s - start_s for start_s, end_s in intervals)
