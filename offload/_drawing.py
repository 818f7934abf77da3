"""The picture of :func:`offload.timeline.draw`. Imports matplotlib, so it is imported only when something is drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from offload.plan import OpKind
from offload.timeline import Span, elapsed_s, lanes_of

if TYPE_CHECKING:
    from offload.monitor import MemorySample

# Okabe and Ito's palette, whose colours readers with any colour vision can tell apart; greys for the model itself.
# Kind of operation -> (name in the legend, colour of the bar, colour of the text on it).
_KINDS = {
    "forward": ("forward", "#d5d5d5", "black"),
    "backward": ("backward", "#8a8a8a", "white"),
    OpKind.UPDATE_CPU.value: ("update on host", "#d55e00", "white"),
    OpKind.UPDATE_GPU.value: ("update on device", "#009e73", "white"),
    OpKind.UPDATE_RESIDENT.value: ("update of resident", "#e69f00", "black"),
    OpKind.PREFETCH.value: ("state up (prefetch)", "#0072b2", "white"),
    OpKind.FLUSH.value: ("state down (flush)", "#56b4e9", "black"),
    OpKind.GRAD_DOWN.value: ("gradient down", "#f0e442", "black"),
    OpKind.UPLOAD.value: ("parameters up", "#cc79a7", "black"),
    "other": ("other", "black", "white"),
}
_PHASES = {"forward": "#d5d5d5", "backward": "#8a8a8a", "update": "#009e73", "idle": "white"}
_OP = re.compile(r"([A-Z])(\d+)(@\d+)?")

_WIDTH_IN = 12.0
_ROW_IN = 0.42
_MEMORY_IN = 1.9
_LABEL_PT = 8.0
_CHARACTER_PT = 0.65 * _LABEL_PT  # about the width of one character of a label


def draw_panels(panels: Sequence[tuple[str, Sequence[Span]]], path: str | Path, memory: Sequence[MemorySample]) -> None:
    """What :func:`offload.timeline.draw` says; ``panels`` and the spans in each are not empty."""
    heights = [_ROW_IN * len(lanes_of(spans)) for _, spans in panels] + ([_MEMORY_IN] if memory else [])
    figure = Figure(figsize=(_WIDTH_IN, sum(heights) + 0.6 * len(heights) + 0.8), layout="constrained")
    axes: list[Axes] = list(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    longest_s = max(elapsed_s(spans) for _, spans in panels)
    factor, unit = _time_unit(longest_s)
    for axis, (title, spans) in zip(axes, panels, strict=False):
        _draw_lanes(axis, spans, factor)
        _dress(axis, f"{title}: {elapsed_s(spans) * factor:.4g} {unit}")
        axis.set_xlim(0, longest_s * factor or 1.0)
    axes[len(panels) - 1].set_xlabel(f"time [{unit}]")
    if memory:
        _draw_memory(axes[-1], memory)
    kinds = {_kind(span.name) for _, spans in panels for span in spans}
    patches = [Patch(color=color, label=label) for kind, (label, color, _) in _KINDS.items() if kind in kinds]
    figure.legend(handles=patches, loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    figure.draw_without_rendering()  # lays out, so that the bars' widths on paper are known
    for axis, (_, spans) in zip(axes, panels, strict=False):
        _label_bars(axis, spans, factor)
    figure.savefig(path, dpi=150)


def _draw_lanes(axis: Axes, spans: Sequence[Span], factor: float) -> None:
    lanes = lanes_of(spans)
    origin_s = min(span.start_s for span in spans)
    axis.barh(
        y=[lanes.index(span.lane) for span in spans],
        width=[span.duration_s * factor for span in spans],
        left=[(span.start_s - origin_s) * factor for span in spans],
        color=[_KINDS[_kind(span.name)][1] for span in spans],
        height=0.8,
        edgecolor="white",
        linewidth=0.4,
    )
    axis.set_yticks(range(len(lanes)), lanes)
    axis.set_ylim(len(lanes) - 0.4, -0.6)  # the first lane on top


def _label_bars(axis: Axes, spans: Sequence[Span], factor: float) -> None:
    """Write each operation's subgroup, or the name of other work, on the bars that are wide enough for it."""
    lanes = lanes_of(spans)
    origin_s = min(span.start_s for span in spans)
    left_in, right_in = axis.get_window_extent().transformed(axis.figure.dpi_scale_trans.inverted()).intervalx
    limits = axis.get_xlim()
    points_per_unit = 72 * (right_in - left_in) / (limits[1] - limits[0])
    for span in spans:
        match = _OP.fullmatch(span.name)
        text = match[2] if match else span.name
        if len(text) * _CHARACTER_PT < span.duration_s * factor * points_per_unit:
            middle = ((span.start_s + span.end_s) / 2 - origin_s) * factor
            color = _KINDS[_kind(span.name)][2]
            axis.text(middle, lanes.index(span.lane), text, color=color, size=_LABEL_PT, ha="center", va="center")


def _draw_memory(axis: Axes, memory: Sequence[MemorySample]) -> None:
    """Phases as shades; each one's peak as a step over its time, what is there at its end as a point."""
    edges_s = [memory[0].t_s - memory[0].duration_s, *(sample.t_s for sample in memory)]
    factor, time_unit = _time_unit(edges_s[-1] - edges_s[0])
    edges = [(edge_s - edges_s[0]) * factor for edge_s in edges_s]
    for sample, left, right in zip(memory, edges, edges[1:], strict=False):
        axis.axvspan(left, right, color=_PHASES[sample.phase.value], alpha=0.3, linewidth=0)

    peaks = [sample.peak_allocated_bytes for sample in memory]
    at_ends = {
        "device, end of phase": ([sample.allocated_bytes for sample in memory], "#0072b2", ".-"),
        "host, pinned": ([sample.pinned_bytes or None for sample in memory], "black", ":"),
    }
    if peaks[0] is None:  # no accelerator: the process is all there is
        at_ends["host, resident"] = ([sample.rss_bytes for sample in memory], "#0072b2", ".-")
    every_value = [value for values in (peaks, *(values for values, _, _ in at_ends.values())) for value in values]
    scale, unit = (2**30, "GiB") if max(value or 0 for value in every_value) >= 2**30 else (2**20, "MiB")

    phases = {sample.phase.value for sample in memory} - {"idle"}
    handles: list[Artist] = [
        Patch(color=_PHASES[phase], alpha=0.3, label=phase) for phase in _PHASES if phase in phases
    ]
    if peaks[0] is not None:
        heights = [math.nan if peak is None else peak / scale for peak in peaks]
        handles.append(
            axis.stairs(heights, edges, baseline=None, color="#d55e00", lw=1.6, label="device, peak of phase")
        )
    for label, (values, color, style) in at_ends.items():
        points = [(edge, value / scale) for edge, value in zip(edges[1:], values, strict=True) if value is not None]
        if points:
            handles += axis.plot(*zip(*points, strict=True), style, color=color, lw=1.6, label=label)
    axis.set_xlim(edges[0], edges[-1])
    axis.set_ylim(bottom=0)
    axis.set_ylabel(unit)
    axis.set_xlabel(f"time of the training loop [{time_unit}]")
    _dress(axis, "memory over the phases")
    axis.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles), frameon=False, fontsize=8
    )


def _dress(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9, length=3)


def _kind(name: str) -> str:
    """The key of a span's name in ``_KINDS``."""
    match = _OP.fullmatch(name)
    kind = match[1] if match else name
    return kind if kind in _KINDS else "other"


def _time_unit(longest_s: float) -> tuple[float, str]:
    """(units per second, name) for times up to ``longest_s``."""
    return (1.0, "s") if longest_s >= 2 else (1e3, "ms") if longest_s >= 0.01 else (1e6, "µs")
