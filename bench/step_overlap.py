"""Whole training steps, with gradient clipping: what is left of the update when it runs under the next forward.

    python -m bench.step_overlap [--quick] [--json FILE]

Two tables. The first runs a model and :class:`offload.AdamW` on the emulated device, in its virtual time, with the
rates of a shipped profile. The model's own FLOPs are charged at a rate that makes its forward pass as long as the best
update there (``WINDOW``): as a batch of so many tokens would, without computing it here. CPU updates are charged by the
profile's rate, links and host memory as the profile says. All schedules run the same kernels on the same model:

- ``zero-offload 2024``: each gradient's copy blocks, all updates on the CPU after backward;
- ``zero-offload today``: gradients go down while backward runs, all updates on the CPU after it;
- ``paper``: gradients likewise, every second subgroup visits the device through one slot, after backward;
- ``in order``: our best split, after backward;
- ``next forward``: our best split, under the next forward.

The second is simulated: the same schedules for the models of the paper by :func:`offload.phases.predict_step`.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import offload
from offload._table import format_table
from offload.hardware import HardwareProfile
from offload.homes import Homes
from offload.jobs import equal_subgroups
from offload.layer_costs import Layer
from offload.perf_model import Rates
from offload.phases import Hiding, predict_step
from offload.plan import Placement, Plan, lower
from offload.planner import Search, stride_plan
from offload.policy import Overlap

PROFILES = ("h100-sxm-16-cores", "rtx4090-desktop")
MODELS = {"7B": 6.74e9, "13B": 13.0e9, "20B": 20.6e9}
WINDOW = 1.0  # forward of the model, in updates of the best split
NUM_SLOTS, NUM_STAGING = 3, 4
NUM_SUBGROUPS = 48
WARM_UP, MEASURED = 3, 3  # steps
OURS = "next forward"


@dataclass(frozen=True)
class Schedule:
    """How a step's update runs. ``plan`` makes its plan."""

    name: str
    overlap: Overlap
    plan: Callable[[Search], Plan]
    blocks: bool = False  # backward waits for each gradient's copy


def _homes(search: Search, num_slots: int, num_staging: int) -> Homes:
    return Homes(frozenset(), frozenset(range(len(search.subgroups))), num_slots, num_staging)


def _all_host(search: Search) -> Plan:
    num = len(search.subgroups)
    return lower([Placement.HOST] * num, num_slots=0, num_staging=num)


def _paper(search: Search) -> Plan:
    num = len(search.subgroups)
    return stride_plan(_homes(search, 1, num), num, 2)


def _best_split(search: Search) -> Plan:
    return search.best_share(_homes(search, NUM_SLOTS, NUM_STAGING)).plan


SCHEDULES = (
    Schedule("zero-offload 2024", "backward", _all_host, blocks=True),
    Schedule("zero-offload today", "backward", _all_host),
    Schedule("paper", "backward", _paper),
    Schedule("in order", "none", _best_split),
    Schedule(OURS, "next_forward", _best_split),
)


@dataclass(frozen=True)
class Row:
    """Seconds of one step, and of its forward and backward alone."""

    profile: str
    model: str
    schedule: str
    step_s: float
    alone_s: float

    @property
    def exposed_fraction(self) -> float:
        return 1 - self.alone_s / self.step_s


# ---- on the emulated device


def build(width: int, num_layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(num_layers) for layer in (nn.Linear(width, width, bias=False), nn.Tanh())]
    return nn.Sequential(*layers).to("sim", torch.bfloat16)


def steps_s(model: nn.Sequential, optimizer: offload.AdamW | None) -> float:
    """Virtual seconds of a step, once steps follow each other."""
    from offload.testing import sim

    x = torch.ones(8, model[0].in_features, dtype=torch.bfloat16, device="sim")  # type: ignore[arg-type]
    stamps = []
    for _ in range(WARM_UP + MEASURED + 1):
        model(x).square().mean().backward()
        if optimizer is None:
            torch.accelerator.synchronize()
        stamps.append(sim.host_time_s())
        if optimizer is not None:
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        model.zero_grad()
    if optimizer is not None:
        optimizer.synchronize()
    return (stamps[-1] - stamps[WARM_UP]) / MEASURED


def emulated(profile: HardwareProfile, width: int, num_layers: int) -> Iterator[Row]:
    """Every schedule in the emulated device's virtual time."""
    from offload.testing import sim

    sim.reset()
    sim.emulate(profile)
    model = build(width, num_layers)
    numel = sum(param.numel() for param in model.parameters())
    search = Search(equal_subgroups(numel, width * width, 2, 12), Rates.from_profile(profile))
    window_s = WINDOW * search.best_share(_homes(search, NUM_SLOTS, NUM_STAGING)).update_s
    sim.configure("sync", races=False, poison=False)
    sim.set_profile(flops=2 * 8 * numel / window_s)
    alone_s = steps_s(model, None)
    for schedule in SCHEDULES:
        sim.configure("sync", races=False, poison=False)
        optimizer = offload.AdamW(
            model.parameters(), plan=schedule.plan(search), overlap=schedule.overlap, subgroup_numel=width**2
        )
        hooks = []
        if schedule.blocks:
            copies = optimizer.runtime.lanes.d2h
            hooks = [
                param.register_post_accumulate_grad_hook(lambda _, copies=copies: copies.mark().synchronize())  # type: ignore[misc]
                for param in model.parameters()
            ]
        step_s = steps_s(model, optimizer)
        for hook in hooks:
            hook.remove()
        yield Row(profile.name, f"{numel / 1e6:.0f}M, {num_layers} layers", schedule.name, step_s, alone_s)
        del optimizer
        gc.collect()


# ---- simulated


def simulated(profile: HardwareProfile, name: str, model_numel: float) -> Iterator[Row]:
    """Every schedule on virtual lanes, for one rank's share of a model; a blocking copy lengthens backward."""
    rates = Rates.from_profile(profile)
    numel = int(model_numel) // profile.num_ranks_per_node
    search = Search(equal_subgroups(numel, -(-numel // NUM_SUBGROUPS), 2, 12), rates)
    window_s = WINDOW * search.best_share(_homes(search, NUM_SLOTS, NUM_STAGING)).update_s
    for schedule in SCHEDULES:
        copy_s = 2 * numel / rates.d2h_bytes_per_s if schedule.blocks else 0.0
        layers = [Layer(window_s / NUM_SUBGROUPS, (2 * window_s + copy_s) / NUM_SUBGROUPS)] * NUM_SUBGROUPS
        step = predict_step(schedule.plan(search), search.subgroups, rates, layers, Hiding(schedule.overlap))
        yield Row(profile.name, name, schedule.name, step.step_s, 3 * window_s)


# ---- what is shown


def ratio(rows: Sequence[Row], baseline: str) -> float:
    """Least speed-up over ``baseline`` of the machines and models in ``rows``."""
    ratios = []
    for ours in rows:
        if ours.schedule == OURS:
            (theirs,) = [
                row for row in rows if (row.profile, row.model, row.schedule) == (ours.profile, ours.model, baseline)
            ]
            ratios.append(theirs.step_s / ours.step_s)
    return min(ratios)


def show(title: str, rows: Sequence[Row]) -> None:
    print(f"\n{title}")
    cells = [["profile", "model", "schedule", "step", "update exposed"]]
    for row in rows:
        times = [f"{row.step_s * 1e3:.1f} ms", f"{row.exposed_fraction:.1%}"]
        cells.append([row.profile, row.model, row.schedule, *times])
    print(format_table(cells))


def summary(rows: Sequence[Row]) -> dict[str, object]:
    """The figures that are held against goals: the least speed-ups and the largest exposed share."""
    return {
        "vs_zero_offload": ratio(rows, "zero-offload 2024"),
        "vs_zero_offload_today": ratio(rows, "zero-offload today"),
        "vs_paper": ratio(rows, "paper"),
        "vs_in_order": ratio(rows, "in order"),
        "exposed_fraction": max(row.exposed_fraction for row in rows if row.schedule == OURS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model on the emulated device")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows and the figures that goals are about")
    options = parser.parse_args()
    from offload.testing import sim

    sim.load()
    width, num_layers = (768, 16) if options.quick else (1536, 24)
    profiles = [HardwareProfile.load(name) for name in PROFILES]
    on_device = [row for profile in profiles for row in emulated(profile, width, num_layers)]
    show(f"emulated device, virtual time, forward as long as {WINDOW:g} updates, clipping on", on_device)
    on_lanes = [row for p in profiles for name, numel in MODELS.items() for row in simulated(p, name, numel)]
    show(f"simulated, forward as long as {WINDOW:g} updates", on_lanes)
    figures = {**summary(on_device), "simulated": summary(on_lanes)}
    print("\n" + json.dumps(figures, indent=2))
    if options.json:
        rows = {"emulated": [asdict(row) for row in on_device], "simulated": [asdict(row) for row in on_lanes]}
        options.json.write_text(json.dumps({**figures, "rows": rows}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
