"""What ran when on the emulated device, for the timeline and for trace viewers."""

from __future__ import annotations

from pathlib import Path

from offload.accelerators import sim
from offload.timeline import Span, write_chrome_trace


def spans() -> tuple[Span, ...]:
    """All operations since ``sim.configure()`` in virtual time, in the order of enqueueing.

    A lane is an engine: "compute", "h2d", "d2h", "peer" or "host" for ``sim:0``, "sim:1 compute" and so on for others.
    """
    return tuple(
        Span(f"sim:{span.device} {span.engine}" if span.device else span.engine, span.name, span.start_s, span.end_s)
        for span in sim.trace()
    )


def write_trace(path: str | Path) -> None:
    """Write :func:`spans` as a file for https://ui.perfetto.dev or chrome://tracing."""
    write_chrome_trace(path, spans())
