"""Whole training steps, with gradient clipping: what is left of the update when it runs under the next forward.

    python -m bench.step_overlap [--quick] [--json FILE]

Two tables, each for two lengths of the model's own work, its *window*:

- ``paper``: one sequence of 2048 tokens a step with recomputation, as in the tables of Deep Optimizer States, at the
  profile's FLOP/s: 2 operations a parameter and token in forward, 6 in backward;
- ``suffices``: forward as long as the best update alone, so that the model says that the window suffices; backward
  twice as long.

The first table runs a model and :class:`offload.AdamW` on the emulated device, in its virtual time, with the rates of a
shipped profile. The model computes a few rows only, and is charged as if it took the window. CPU updates are charged by
the profile's rate, links and host memory as the profile says. All schedules update with the same fused kernel, on the
same model, link and memory, but for the row that says otherwise:

- ``zero-offload 2024``: each gradient's copy blocks and is converted to fp32 by the CPU, at the rate that the profile
  has from the paper's tables (``blocking_upcast_params_per_s``); all updates on the CPU after backward. New parameters
  go up as ours do;
- ``zero-offload 2024, pinned``: each gradient's copy blocks, at the rate of the link, and nothing is converted;
- ``zero-offload today``: gradients go down while backward runs, all updates on the CPU after it;
- ``zero-offload today, its kernel``: the same with 46 bytes of host memory a parameter instead of 28, as DeepSpeed's
  CPUAdam and the passes around it touch;
- ``paper``: gradients while backward runs, every second subgroup visits the device through one slot, after backward;
- ``in order``: our best split, after backward;
- ``next forward``: the split that the planner takes under the next forward;
- ``next forward, early gradients``: the same, and gradients of CPU updates go down while backward runs;
- ``next forward, early gradients, split16``: the same with ``state_format="split16"``, whose masters are the parameters
  and 16-bit remainders: 10 bytes a parameter cross each way where fp32 state has 12, and every result has the same
  bits. CPU updates are charged at the profile's rate for it. The baselines keep fp32 state, as they have no other;
- ``in backward``: our best split without clipping, begun in backward.

The figures are about the two rows with early gradients: on each machine about the shorter of them, as one takes split16
where links or host memory bind and fp32 where the cores do. Those of the fp32 row alone, with the baselines' own state,
stand beside them with ``_fp32``; ``exposed_fraction`` is the worse of the two rows. Our rows go through
:data:`NUM_SLOTS` device buffers, of a 24th of the model's state each on the emulated device and a 48th in the second
table; the paper's through one, the others through none.

The second is simulated: the same schedules for the models of the paper by :func:`offload.phases.predict_step`. A
blocking copy lengthens backward there.

Before them, :mod:`bench.step_wall_clock` compares steps in wall-clock with the same steps in virtual time.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import offload
from bench import step_wall_clock
from bench.step_overlap_report import OURS_FP32, OURS_SPLIT16, Row, show, summary
from offload.hardware import HardwareProfile
from offload.homes import Homes
from offload.jobs import equal_subgroups
from offload.layer_costs import Layer
from offload.overlaps import hide
from offload.perf_model import Rates
from offload.phases import Hiding, predict_step
from offload.plan import Placement, Plan, lower
from offload.planner import Search, stride_plan
from offload.policy import Overlap
from offload.state_layout import StateKind

PROFILES = ("h100-sxm-16-cores", "rtx4090-desktop")
MODELS = {"7B": 6.74e9, "13B": 13.0e9, "20B": 20.6e9}
TOKENS = 2048
FORWARD_OPERATIONS, BACKWARD_OPERATIONS = 2, 6  # per parameter and token, with recomputation
NUM_SLOTS, NUM_STAGING = 4, 4
NUM_SUBGROUPS = 48
ROWS = 8  # that the model on the emulated device really computes
WARM_UP, MEASURED = 2, 2  # steps
FUSED_BYTES, CPU_ADAM_BYTES = 28, 46  # of host memory a parameter


@dataclass(frozen=True)
class Schedule:
    """How a step's update runs. ``plan`` makes its plan.

    Attributes:
        blocks: backward waits for each gradient's copy.
        converts: and for its conversion by the CPU.
        host_bytes: of host memory that a CPU update touches, a parameter.
        in_backward: the update begins there, and nothing is clipped.
        early_gradients, state_format: as in :class:`offload.AdamW`.
    """

    name: str
    overlap: Overlap
    plan: Callable[[Search, Sequence[Layer]], Plan]
    blocks: bool = False
    converts: bool = False
    host_bytes: int = FUSED_BYTES
    in_backward: bool = False
    early_gradients: bool = False
    state_format: str = "fp32"

    @property
    def hiding(self) -> Hiding:
        return Hiding(self.overlap, self.in_backward, early_gradients=self.early_gradients)

    def host_rate(self, profile: HardwareProfile) -> float:
        """Parameters/s of its CPU updates."""
        return profile.host_update_rate(self.state_format) * FUSED_BYTES / self.host_bytes

    def blocked_s(self, numel: int, profile: HardwareProfile) -> float:
        """What backward waits beside the copy itself."""
        if not self.converts:
            return 0.0
        return max(0.0, numel / profile.blocking_upcast_params_per_s - 2 * numel / profile.d2h_bytes_per_s)


@dataclass(frozen=True)
class Window:
    """Seconds of the model's own forward and backward."""

    name: str
    forward_s: float
    backward_s: float


def searches(profile: HardwareProfile, numel: int, subgroup_numel: int) -> dict[str, Search]:
    """Of the same subgroups in each format of the state."""
    return {
        state_format: Search(
            equal_subgroups(numel, subgroup_numel, 2, StateKind(state_format)),
            Rates.from_profile(profile, state_format=state_format),
        )
        for state_format in {schedule.state_format for schedule in SCHEDULES}
    }


def windows(profile: HardwareProfile, search: Search) -> list[Window]:
    """Of a model whose update ``search`` is about."""
    numel = sum(subgroup.numel for subgroup in search.subgroups)
    token_s = numel * TOKENS / profile.device_flops
    update_s = search.best_share(_homes(search, NUM_SLOTS, NUM_STAGING)).update_s
    return [
        Window("paper", FORWARD_OPERATIONS * token_s, BACKWARD_OPERATIONS * token_s),
        Window("suffices", update_s, 2 * update_s),
    ]


def _homes(search: Search, num_slots: int, num_staging: int) -> Homes:
    return Homes(frozenset(), frozenset(range(len(search.subgroups))), num_slots, num_staging)


def _all_host(search: Search, _: Sequence[Layer]) -> Plan:
    num = len(search.subgroups)
    return lower([Placement.HOST] * num, num_slots=0, num_staging=num)


def _paper(search: Search, _: Sequence[Layer]) -> Plan:
    num = len(search.subgroups)
    return stride_plan(_homes(search, 1, num), num, 2)


def _best_split(search: Search, _: Sequence[Layer]) -> Plan:
    return search.best_share(_homes(search, NUM_SLOTS, NUM_STAGING)).plan


def _best_under_forward(search: Search, layers: Sequence[Layer], *, early_gradients: bool = False) -> Plan:
    best, num, hiding = (
        _best_split(search, layers),
        len(search.subgroups),
        Hiding("next_forward", early_gradients=early_gradients),
    )
    ((_, step),) = hide(best, search.subgroups, search.rates, layers, [hiding], range(num), most_staging=num)
    return step.plan


_best_with_early_gradients = partial(_best_under_forward, early_gradients=True)


SCHEDULES = (
    Schedule("zero-offload 2024", "backward", _all_host, blocks=True, converts=True),
    Schedule("zero-offload 2024, pinned", "backward", _all_host, blocks=True),
    Schedule("zero-offload today", "backward", _all_host),
    Schedule("zero-offload today, its kernel", "backward", _all_host, host_bytes=CPU_ADAM_BYTES),
    Schedule("paper", "backward", _paper),
    Schedule("in order", "none", _best_split),
    Schedule("next forward", "next_forward", _best_under_forward),
    Schedule(OURS_FP32, "next_forward", _best_with_early_gradients, early_gradients=True),
    Schedule(OURS_SPLIT16, "next_forward", _best_with_early_gradients, early_gradients=True, state_format="split16"),
    Schedule("in backward", "next_forward", _best_split, in_backward=True),
)


# ---- on the emulated device


def build(width: int, num_layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(num_layers) for layer in (nn.Linear(width, width, bias=False), nn.Tanh())]
    return nn.Sequential(*layers).to("sim", torch.bfloat16)


def steps_s(
    model: nn.Sequential, optimizer: offload.AdamW | None, window: Window, *, in_backward: bool = False
) -> float:
    """Virtual seconds of a step, once steps follow each other."""
    from offload.testing import sim

    x = torch.ones(ROWS, model[0].in_features, dtype=torch.bfloat16, device="sim")  # type: ignore[arg-type]
    flops = 2 * ROWS * sum(param.numel() for param in model.parameters())
    stamps = []
    for _ in range(WARM_UP + MEASURED + 1):
        sim.set_profile(flops=flops / window.forward_s)
        loss = model(x).square().mean()
        sim.set_profile(flops=2 * flops / window.backward_s)
        with optimizer.update_in_backward() if optimizer is not None and in_backward else nullcontext():
            loss.backward()
        if optimizer is None:
            torch.accelerator.synchronize()
        stamps.append(sim.host_mark())  # whose time is known once the update beside it is
        if optimizer is not None:
            if not in_backward:
                optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        model.zero_grad()
    if optimizer is not None:
        optimizer.synchronize()
    return (sim.host_time_s(stamps[-1]) - sim.host_time_s(stamps[WARM_UP])) / MEASURED


def emulated(profile: HardwareProfile, width: int, num_layers: int) -> Iterator[Row]:
    """Every schedule in the emulated device's virtual time."""
    from offload.testing import sim

    sim.reset()
    sim.emulate(profile)
    model = build(width, num_layers)
    numel = sum(param.numel() for param in model.parameters())
    search_of = searches(profile, numel, width * width)
    for window in windows(profile, search_of["fp32"]):
        layers = [Layer(window.forward_s / num_layers, window.backward_s / num_layers)] * num_layers
        sim.configure("sync", races=False, poison=False)
        alone_s = steps_s(model, None, window)
        for schedule in SCHEDULES:
            sim.configure("sync", races=False, poison=False)
            sim.set_profile(host_update_params_per_s=schedule.host_rate(profile))
            optimizer = offload.AdamW(
                model.parameters(),
                plan=schedule.plan(search_of[schedule.state_format], layers),
                overlap=schedule.overlap,
                early_gradients=schedule.early_gradients,
                state_format=schedule.state_format,
                subgroup_numel=width**2,
            )
            hooks = [*_blocking(model, optimizer, schedule, profile)] if schedule.blocks else []
            step_s = steps_s(model, optimizer, window, in_backward=schedule.in_backward)
            for hook in hooks:
                hook.remove()
            name = f"{numel / 1e6:.0f}M, {num_layers} layers"
            yield Row(profile.name, name, window.name, schedule.name, step_s, alone_s)
            del optimizer
            gc.collect()


def _blocking(
    model: nn.Module, optimizer: offload.AdamW, schedule: Schedule, profile: HardwareProfile
) -> Iterator[RemovableHandle]:
    """Let backward wait for each gradient's copy."""
    from offload.testing import sim

    copies = optimizer.runtime.lanes.d2h

    def wait(param: Tensor) -> None:
        copies.mark().synchronize()
        sim.host_charge(schedule.blocked_s(param.numel(), profile), "conversion")

    for param in model.parameters():
        yield param.register_post_accumulate_grad_hook(wait)  # type: ignore[no-untyped-call]


# ---- simulated


def simulated(profile: HardwareProfile, name: str, model_numel: float) -> Iterator[Row]:
    """Every schedule on virtual lanes, for one rank's share of a model; a blocking copy lengthens backward."""
    numel = int(model_numel) // profile.num_ranks_per_node
    search_of = searches(profile, numel, -(-numel // NUM_SUBGROUPS))
    for window in windows(profile, search_of["fp32"]):
        for schedule in SCHEDULES:
            search = search_of[schedule.state_format]
            blocked_s = 2 * numel / profile.d2h_bytes_per_s if schedule.blocks else 0.0
            blocked_s += schedule.blocked_s(numel, profile)
            layer = Layer(window.forward_s / NUM_SUBGROUPS, (window.backward_s + blocked_s) / NUM_SUBGROUPS)
            step = predict_step(
                schedule.plan(search, [layer] * NUM_SUBGROUPS),
                search.subgroups,
                replace(search.rates, host_update_params_per_s=schedule.host_rate(profile)),
                [layer] * NUM_SUBGROUPS,
                schedule.hiding,
            )
            alone_s = window.forward_s + window.backward_s
            yield Row(profile.name, name, window.name, schedule.name, step.step_s, alone_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model on the emulated device")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows and the figures that goals are about")
    options = parser.parse_args()
    from offload.testing import sim

    wall_clock = step_wall_clock.wall_vs_virtual()
    print("wall-clock and virtual time")
    step_wall_clock.show(wall_clock)
    sim.reset()
    width, num_layers = (1024, 24) if options.quick else (2048, 24)
    profiles = [HardwareProfile.load(name) for name in PROFILES]
    on_device = [row for profile in profiles for row in emulated(profile, width, num_layers)]
    show("emulated device, virtual time, clipping on", on_device)
    on_lanes = [row for p in profiles for name, numel in MODELS.items() for row in simulated(p, name, numel)]
    show("simulated", on_lanes)
    figures = {**summary(on_device), "wall_vs_virtual": wall_clock.ratio, "simulated": summary(on_lanes)}
    print("\n" + json.dumps(figures, indent=2))
    if options.json:
        clocks = [asdict(row) for row in wall_clock.comparisons]
        rows = {
            "wall-clock": clocks,
            "emulated": [asdict(row) for row in on_device],
            "simulated": [asdict(row) for row in on_lanes],
        }
        options.json.write_text(json.dumps({**figures, "rows": rows}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
