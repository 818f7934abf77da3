"""Operations of the emulated device in the Chrome trace format."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from offload.testing import spans, write_trace


def test_trace_has_a_row_for_each_engine(sim: ModuleType, tmp_path: Path) -> None:
    host = torch.ones(1 << 20, pin_memory=True)
    sim.set_profile(h2d_bytes_per_s=4e9, latency_s=0, launch_s=0)
    sim.configure("lazy")
    for device in ("sim:0", "sim:1"):
        torch.empty(1 << 20, device=device).copy_(host, non_blocking=True)
    sim.host_charge(0.5, "host update")
    assert [(span.lane, span.name) for span in spans()] == [
        ("h2d", "h2d"), ("sim:1 h2d", "h2d"), ("host", "host update"),
    ]  # fmt: skip
    write_trace(tmp_path / "trace.json")
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    assert [(e["cat"], e["ts"]) for e in events] == [("h2d", 0), ("sim:1 h2d", 0), ("host", 0)]
    assert [e["dur"] for e in events] == [pytest.approx(4 * 2**20 / 4e9 * 1e6)] * 2 + [pytest.approx(0.5e6)]
