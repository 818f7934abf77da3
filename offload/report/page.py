"""One HTML file that holds a whole report: no scripts, no fonts, nothing to be fetched."""

from __future__ import annotations

import html
from collections.abc import Sequence

from offload.interconnect import Report, Result, format_value
from offload.report.charts import bandwidth_chart, overlap_chart, roofline_chart, timeline_chart

# The policy forbids the browser everything but the styles in the file itself and the empty icon.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 0 auto; padding: 0 1rem 3rem; color: #222; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
svg {{ width: 100%; height: auto; }}
figure {{ margin: 0; }} figcaption, .note {{ color: #555; font-size: .9rem; }}
.warning {{ background: #fff3cd; padding: .6rem .8rem; border-radius: .3rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }}
td, th {{ padding: .15rem .7rem .15rem 0; text-align: right; white-space: nowrap; }}
td:first-child, th:first-child {{ text-align: left; }}
tr + tr td {{ border-top: 1px solid #eee; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""

_EMULATED = (
    "Measured on the emulated device: rates and times show that the benchmark works, and say nothing about a machine."
)
_FIGURES = {
    "h2d_bytes_per_s": ("Host to device", "bytes/s"),
    "d2h_bytes_per_s": ("Device to host", "bytes/s"),
    "both_bytes_per_s": ("Each way while both are busy", "bytes/s"),
    "pageable_h2d_bytes_per_s": ("Host to device, pageable", "bytes/s"),
    "pageable_d2h_bytes_per_s": ("Device to host, pageable", "bytes/s"),
    "h2d_latency_s": ("Latency of a copy to the device", "s"),
    "d2h_latency_s": ("Latency of a copy from the device", "s"),
    "launch_s": ("Launch", "s"),
    "host_update_params_per_s": ("CPU update", "parameters/s"),
    "device_update_params_per_s": ("Device update", "parameters/s"),
}


def html_page(report: Report) -> str:
    """The report as one HTML document."""
    machine = report.machine
    parts = [
        _paragraph(
            f"{machine['device_name']}, {machine['num_processors']} processors on {machine['num_numa_nodes']} NUMA "
            f"nodes, torch {machine['torch']}.",
            "note",
        )
    ]
    if machine["emulated"]:
        parts.append(_paragraph(_EMULATED, "warning"))
    parts += [_paragraph(f"Not to be trusted: {problem}", "warning") for problem in report.problems()]
    rows = [
        (label, format_value(report.figures[key], unit))
        for key, (label, unit) in _FIGURES.items()
        if key in report.figures
    ]
    parts.append(_section("summary", "In short", _table(("", "measured"), rows)))
    if report.group("copy"):
        caption = "Small copies are latency, large ones the link. Pageable memory is staged by the driver."
        parts.append(_section("bandwidth", "Bandwidth over size", _figure(bandwidth_chart(report), caption)))
    if any("rate_kept" in result.details for result in report.group("overlap")):
        caption = "What each kind of work keeps of its own rate while another outlasts it; 100 % is free overlap."
        parts.append(_section("overlap", "Overlap", _figure(overlap_chart(report), caption)))
    if roofline := roofline_chart(report):
        caption = (
            "What each resource allows at a share of device updates (lines), what all of them allow (grey), and the "
            "optimizer steps that were run here. Steps are far below the roof where they are too small to overlap."
        )
        parts.append(_section("roofline", "Roofline of the update", _figure(roofline, caption)))
    if timeline := timeline_chart(report):
        caption = "One optimizer step with every other subgroup on the device. A gap in a row is a lane that waits."
        parts.append(_section("timeline", "Timeline of a step", _figure(timeline, caption)))
    parts.append(_section("all", "All cases", _all_cases(report.results)))
    return _PAGE.format(title="Interconnect and overlap", body="\n".join(parts))


def _all_cases(results: Sequence[Result]) -> str:
    rows = [(each.name, each.text, each.spread) for each in results]
    return f"<details><summary>{len(rows)} cases</summary>{_table(('case', 'median', 'quartiles'), rows)}</details>"


def _section(key: str, title: str, content: str) -> str:
    return f'<section id="{key}"><h2>{html.escape(title)}</h2>{content}</section>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _paragraph(text: str, kind: str) -> str:
    return f'<p class="{kind}">{html.escape(text)}</p>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{line(header, "th")}{body}</table></div>'
