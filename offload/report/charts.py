"""The plots of a report as SVG text. Imports matplotlib, so it is imported only when a report is drawn.

Figures are as wide as a phone, so that their text is readable there; on a wider screen they grow with the page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from offload.bounds import Update, bound_of
from offload.interconnect import Report, Result, rates_of
from offload.interconnect.overlap import ACTIVITIES
from offload.timeline import LANES, Span

_WIDTH_IN = 4.6
# Okabe and Ito's palette, whose colours readers with any colour vision can tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#56b4e9", "#e69f00", "#009e73", "#cc79a7")
_KIND_COLOURS = {
    "P": "#0072b2", "F": "#56b4e9", "D": "#f0e442", "U": "#cc79a7", "C": "#d55e00", "G": "#009e73", "R": "#e69f00",
}  # fmt: skip
_KIND_NAMES = {
    "P": "state up", "F": "state down", "D": "gradient down", "U": "parameters up", "C": "update on host",
    "G": "update on device", "R": "update of resident",
}  # fmt: skip
_DARK_BELOW = 0.6  # of the heat map's scale: white text is readable there
_SHARES = tuple(i / 50 for i in range(51))


def bandwidth_chart(report: Report) -> str:
    """Bytes/s over the size of one copy, each direction and kind of host memory a line."""
    figure, axis = _figure(3.2)
    lines: dict[str, list[Result]] = {}
    for result in report.group("copy"):
        lines.setdefault(f"{result.source} to {result.target}", []).append(result)
    for (name, results), colour in zip(lines.items(), _COLOURS, strict=False):
        sizes = [result.num_bytes or 0 for result in results]
        axis.plot(sizes, [result.value / 1e9 for result in results], marker="o", ms=3, label=name, color=colour)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda size, _: _size(size))
    axis.set(xlabel="bytes of one copy", ylabel="GB/s", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, frameon=False)
    return _svg(figure, "bandwidth")


def overlap_chart(report: Report) -> str:
    """What each kind of work (rows) keeps of its rate beside each other kind (columns)."""
    found = [result for result in report.group("overlap") if "rate_kept" in result.details]
    kept = {result.mode: result.details["rate_kept"] for result in found}
    values = [[kept.get(f"{row} under {column}", float("nan")) for column in ACTIVITIES] for row in ACTIVITIES]
    figure, axis = _figure(3.6)
    axis.imshow(values, vmin=0, vmax=1, cmap="viridis")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if not math.isnan(value):  # this pair was measured
                colour = "white" if value < _DARK_BELOW else "black"
                axis.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(ACTIVITIES)), ACTIVITIES, rotation=30, ha="right")
    axis.set_yticks(range(len(ACTIVITIES)), ACTIVITIES)
    axis.set(xlabel="while this outlasts it", ylabel="rate kept by")
    return _svg(figure, "overlap")


def roofline_chart(report: Report) -> str | None:
    """Parameters updated per second over the device's share: a roof for each resource, and the steps that were run."""
    rates = rates_of(report)
    if rates is None or not report.step:
        return None
    figure, axis = _figure(3.4)
    bounds = [bound_of(Update(numel=1.0).load(share), rates).seconds_of for share in _SHARES]
    for resource, colour in zip(bounds[0], _COLOURS, strict=False):
        line = [(x, 1e-9 / bound[resource]) for x, bound in zip(_SHARES, bounds, strict=True) if bound[resource]]
        if line:
            axis.plot(*zip(*line, strict=True), color=colour, lw=1, label=resource)
    roof = [1e-9 / max(bound.values()) for bound in bounds]
    axis.fill_between(_SHARES, roof, color="#999999", alpha=0.25, label="possible")
    numel, points = report.step["numel"], report.step["points"]
    measured = [(point["device_share"], numel / point["update_s"] / 1e9) for point in points]
    axis.plot(*zip(*measured, strict=True), "k*", ms=9, label="this machine's steps")
    axis.set(xlabel="share of parameters updated on the device", ylabel="billion parameters/s", yscale="log")
    axis.set_ylim(min(y for _, y in measured) / 3, max(roof) * 5)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, frameon=False, ncol=2)
    return _svg(figure, "roofline")


def timeline_chart(report: Report) -> str | None:
    """What ran when in the measured step, a row a lane."""
    spans = [Span(**span) for span in report.step.get("spans", ())]
    if not spans:
        return None
    figure, axis = _figure(2.4)
    start_s = min(span.start_s for span in spans)
    for kind in _KIND_COLOURS:
        for row, lane in enumerate(LANES):
            bars = [
                ((span.start_s - start_s) * 1e3, span.duration_s * 1e3)
                for span in spans
                if span.lane == lane and span.name[0] == kind
            ]
            if bars:
                label = None if kind in _labels(axis) else _KIND_NAMES[kind]
                colour = _KIND_COLOURS[kind]
                axis.broken_barh(bars, (row - 0.4, 0.8), color=colour, edgecolor="white", lw=0.3, label=label)
    axis.set_yticks(range(len(LANES)), LANES)
    axis.invert_yaxis()
    axis.set_xlabel("ms")
    handles = dict(zip(_labels(axis), axis.get_legend_handles_labels()[0], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncol=3, fontsize=7, frameon=False)
    return _svg(figure, "timeline")


def _labels(axis: Axes) -> Sequence[str]:
    labels: Sequence[str] = axis.get_legend_handles_labels()[1]
    return labels


def _figure(height_in: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    axis: Axes = figure.subplots()
    axis.tick_params(labelsize=8)
    return figure, axis


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.0f} GiB"


def _svg(figure: Figure, name: str) -> str:
    """The ``svg`` element alone, with text as text; ids differ from those of other figures on the page."""
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    # The size in points goes, so that the page's style decides; viewBox keeps the shape.
    return re.sub(r' (width|height)="[0-9.]+pt"', "", svg, count=2).replace(
        "<svg ", f'<svg role="img" aria-label="{name}" ', 1
    )
