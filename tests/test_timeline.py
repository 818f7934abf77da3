"""Times per lane, the Chrome trace and the picture, on spans small enough to check by hand::

time     0     1     2     3     4     5     6     7     8
compute  [forward][  backward     ]     [G1 ]
host                                    [C0         ]
h2d                       [P1@0         ]           [U0]
d2h                             [D0 ]
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.monitor import MemorySample, Phase
from offload.timeline import (
    Span,
    busy_fraction,
    busy_s,
    chrome_trace,
    describe,
    draw,
    elapsed_s,
    exposed_s,
    lanes_of,
    write_chrome_trace,
)

SPANS = [
    Span("d2h", "D0@0", 4.0, 5.0),
    Span("compute", "forward", 0.0, 1.5),
    Span("compute", "backward", 1.5, 4.5),
    Span("h2d", "P1@0", 3.0, 5.5),
    Span("compute", "G1@0", 5.5, 6.0),
    Span("host", "C0@0", 5.0, 7.0),
    Span("h2d", "U0@0", 7.0, 8.0),
]


def sample(t_s: float, duration_s: float, phase: Phase, peak: int | None = 2**30) -> MemorySample:
    end = None if peak is None else peak // 2
    return MemorySample(t_s, duration_s, 0, phase, end, peak, peak, None, 3 * 2**30, 2**20)


MEMORY = [
    sample(1.0, 1.5, Phase.FORWARD),
    sample(4.5, 3.5, Phase.BACKWARD, 2**31),
    sample(8.0, 3.5, Phase.UPDATE),
    sample(8.5, 0.5, Phase.IDLE),
]


def test_lanes_come_in_order_and_unknown_ones_last() -> None:
    assert lanes_of(SPANS) == ["host", "compute", "h2d", "d2h"]
    assert lanes_of([Span("nvme", "x", 0, 1), Span("d2h", "x", 0, 1), Span("disk", "x", 0, 1)]) == [
        "d2h",
        "disk",
        "nvme",
    ]


def test_busy_times() -> None:
    assert elapsed_s(SPANS) == 8.0
    assert busy_s(SPANS) == {"host": 2.0, "compute": 5.0, "h2d": 3.5, "d2h": 1.0}
    assert busy_fraction(SPANS) == {"host": 0.25, "compute": 0.625, "h2d": 0.4375, "d2h": 0.125}


def test_overlapping_work_of_one_lane_counts_once() -> None:
    assert busy_s([Span("host", "C0@0", 0, 3), Span("host", "C1@1", 1, 2), Span("host", "C2@0", 2, 4)]) == {"host": 4.0}


def test_exposed_time_is_what_the_model_does_not_hide() -> None:
    assert exposed_s(SPANS, "h2d") == 2.0  # P1 from 4.5 to 5.5, all of U0
    assert exposed_s(SPANS, "d2h") == 0.5
    assert exposed_s(SPANS, "host") == 2.0
    assert exposed_s(SPANS, "compute") == 0.5  # G1: the model itself is not exposed
    assert exposed_s(SPANS) == 3.5  # from 4.5 to 8 without a gap, lanes beside each other counted once


def test_no_spans() -> None:
    assert elapsed_s([]) == exposed_s([]) == 0.0
    assert busy_s([]) == busy_fraction([]) == {}
    assert describe([]) == "no spans"
    assert busy_fraction([Span("host", "C0@0", 1.0, 1.0)]) == {"host": 0.0}


@given(
    st.lists(
        st.builds(
            lambda lane, name, start, length: Span(lane, name, start, start + length),
            st.sampled_from(["host", "compute", "h2d"]),
            st.sampled_from(["forward", "backward", "P0@0", "C0@0"]),
            st.integers(0, 30),
            st.integers(0, 10),
        ),
        max_size=12,
    )
)
def test_times_equal_counting_whole_seconds(spans: list[Span]) -> None:
    def seconds(chosen: list[Span]) -> set[int]:
        return {second for span in chosen for second in range(int(span.start_s), int(span.end_s))}

    model = seconds([span for span in spans if span.name in ("forward", "backward")])
    for lane, busy in busy_s(spans).items():
        assert busy == len(seconds([span for span in spans if span.lane == lane]))
        added = seconds([span for span in spans if span.lane == lane and span.name in ("P0@0", "C0@0")])
        assert exposed_s(spans, lane) == len(added - model)
    assert exposed_s(spans) == len(seconds([span for span in spans if span.name in ("P0@0", "C0@0")]) - model)


@pytest.mark.parametrize(("start", "end"), [(2.0, 1.0), (math.nan, 1.0), (0.0, math.nan)])
def test_span_must_not_end_before_it_starts(start: float, end: float) -> None:
    with pytest.raises(ValueError, match=r"'P0@1' on lane 'h2d'"):
        Span("h2d", "P0@1", start, end)


def test_describe_has_a_row_per_lane_and_the_sum() -> None:
    lines = [line.split() for line in describe(SPANS).splitlines()]
    assert lines[1:5] == [
        ["host", "1", "2000.00", "25%", "2000.00"],
        ["compute", "3", "5000.00", "62%", "500.00"],
        ["h2d", "2", "3500.00", "44%", "2000.00"],
        ["d2h", "1", "1000.00", "12%", "500.00"],
    ]
    assert lines[5][:4] == ["8000.00", "ms", "in", "all,"]


def test_trace_has_a_row_per_lane_in_order() -> None:
    events = chrome_trace(SPANS)["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    order = {event["tid"]: event["args"]["sort_index"] for event in events if event["name"] == "thread_sort_index"}
    assert [names[tid] for tid in sorted(names, key=order.__getitem__)] == ["host", "compute", "h2d", "d2h"]
    prefetch = next(event for event in events if event["name"] == "P1@0")
    assert (prefetch["ph"], names[prefetch["tid"]]) == ("X", "h2d")
    assert (prefetch["ts"], prefetch["dur"]) == (3.0e6, 2.5e6)


def test_trace_starts_at_zero_whatever_the_clock() -> None:
    late = [Span(span.lane, span.name, span.start_s + 64.0, span.end_s + 64.0) for span in SPANS]
    assert chrome_trace(late) == chrome_trace(SPANS)


def test_trace_has_memory_as_phases_and_counters() -> None:
    events = chrome_trace(SPANS, MEMORY)["traceEvents"]
    phases = [(event["name"], event["ts"], event["dur"]) for event in events if event.get("cat") == "phase"]
    assert phases[:2] == [("forward", 0.0, 1.5e6), ("backward", 1.5e6, 3.5e6)]  # 0 is the start of forward, -0.5 s
    counters = {event["name"] for event in events if event["ph"] == "C"}
    assert "device used, all processes" not in counters  # None in every sample
    peaks = [(event["ts"], event["args"]) for event in events if event["name"] == "device peak of phase"]
    assert peaks[1] == (1.5e6, {"bytes": 2**31})


def test_written_trace_is_json(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_chrome_trace(path, SPANS, MEMORY)
    assert json.loads(path.read_text()) == chrome_trace(SPANS, MEMORY)


def picture_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def test_picture_grows_with_panels_and_memory(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "timeline.png"
    draw([("one", SPANS)], path)
    width, height = picture_size(path)
    draw([("one", SPANS), ("other", SPANS[1:3])], path)
    assert picture_size(path)[0] == width
    assert picture_size(path)[1] > height
    draw([("one", SPANS)], path, MEMORY)
    assert picture_size(path)[1] > height


@pytest.mark.parametrize(
    "spans",
    [[Span("host", "C0@0", 0, 0)], [Span("nvme", "anything", 0, 1e-7), Span("compute", "R7", 0, 50.0)]],
    ids=["no time", "unknown work"],
)
@pytest.mark.filterwarnings("error")
def test_unusual_spans_can_be_drawn(tmp_path: Path, spans: list[Span]) -> None:
    pytest.importorskip("matplotlib")
    draw([("unusual", spans)], tmp_path / "unusual.png", [sample(1.0, 1.0, Phase.FORWARD, None)])


def test_each_bar_is_labelled_with_its_subgroup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    labels: list[str] = []
    monkeypatch.setattr(Axes, "text", lambda axis, x, y, text, **style: labels.append(text))
    narrow = Span("d2h", "D1234@0", 5.0, 5.001)
    draw([("one", [*SPANS, narrow])], tmp_path / "timeline.png")
    assert sorted(labels) == ["0", "0", "0", "1", "1", "backward", "forward"]  # no room for 1234


@pytest.mark.parametrize("panels", [[], [("empty", [])], [("one", SPANS), ("empty", [])]])
def test_nothing_to_draw(tmp_path: Path, panels: list[tuple[str, list[Span]]]) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(panels, tmp_path / "nothing.png")


def test_matplotlib_is_needed_for_drawing_only() -> None:
    program = """
import sys
sys.modules["matplotlib"] = None
from offload.timeline import Span, describe, draw
spans = [Span("host", "C0@0", 0.0, 1.0)]
describe(spans)
try:
    draw([("one", spans)], "never.png")
except ImportError as error:
    assert "pip install matplotlib" in str(error), error
else:
    raise SystemExit("drew without matplotlib")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
