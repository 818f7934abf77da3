"""Optimizer steps on this machine: the update's time at several shares of device updates, and the timeline of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from offload.accelerators import Accelerator
from offload.optimizers import AdamW
from offload.plan import Placement, Plan
from offload.policy import Policy, Stride
from offload.timeline import elapsed_s
from offload.timing import work_of

_NUM_SUBGROUPS = 12
_POLICIES: tuple[tuple[str, Policy], ...] = (
    ("all on the CPU", "host"),
    ("every third on the device", Stride(3)),
    ("every other on the device", Stride(2)),
    ("all through the device", "device"),
)
DRAWN = "every other on the device"


def measure_steps(accelerator: Accelerator, numel: int, repeats: int) -> dict[str, Any]:
    """Update ``numel`` bfloat16 parameters by each policy; the fastest of ``repeats`` measured steps counts.

    Returns "numel", "points" (name, device share, seconds) and "spans" and "work" of the step to be drawn.
    """
    each = max(numel // _NUM_SUBGROUPS, 64)
    points, spans, work = [], [], {}
    for name, policy in _POLICIES:
        params = [
            nn.Parameter(torch.zeros(each, dtype=torch.bfloat16, device=accelerator.device))
            for _ in range(_NUM_SUBGROUPS)
        ]
        optimizer = AdamW(params, lr=1e-3, plan=policy, subgroup_numel=each)
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()  # first touch of memory and compilation of kernels
        best = None
        for _ in range(repeats):
            optimizer.time_next_step()
            optimizer.step()
            measured = optimizer.timeline()
            if best is None or elapsed_s(measured) < elapsed_s(best):
                best = measured
        assert best is not None
        share = device_share(optimizer.plan)
        points.append({"name": name, "device_share": share, "update_s": elapsed_s(best)})
        if name == DRAWN:
            spans = [asdict(span) for span in best]
            work = work_of(best, optimizer.runtime.subgroups)
    return {"numel": each * _NUM_SUBGROUPS, "points": points, "spans": spans, "work": work}


def device_share(plan: Plan) -> float:
    """The share of subgroups that ``plan`` updates on the device."""
    placements: Mapping[int, Placement] = plan.placements
    return sum(where is not Placement.HOST for where in placements.values()) / len(placements)
