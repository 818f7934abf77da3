"""From a wrong profile, how near the best plan is ``plan="auto"`` after 20 steps? Run: python -m bench.online

Each rate of the start profile is twice or half what the machine does, in every combination; with and without neighbours
that slow one side down now and then. On the emulated device in virtual time, so the figures are the same on every run.
Small subgroups on a machine that is as much slower stand for large ones, its host memory included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import offload
from offload.hardware import HardwareProfile
from offload.jobs import equal_subgroups
from offload.perf_model import Rates
from offload.plan import Plan
from offload.planner import Search
from offload.testing import sim
from offload.timeline import elapsed_s

NUM_SUBGROUPS, NUMEL = 24, 1 << 14
TYPICAL_NUMEL = 10**8  # of a subgroup, which NUMEL stands for
NUM_STEPS = 20
PROFILES = ("rtx4090-desktop", "dos-h100")
SEEDS = (None, 0, 1)  # of neighbours; None for none
WRONG = tuple(itertools.product((0.5, 2.0), repeat=4))  # factors of link up, link down, cores, device


@dataclass(frozen=True)
class Reached:
    """The update after 20 steps, and before the first, over that of the best plan; and what was decided."""

    first_over_best: float
    reached_over_best: float
    actions: list[str]


class Machine:
    """The machine of a profile, played by the emulated device, and the best update there."""

    def __init__(self, profile: HardwareProfile) -> None:
        rates, slower = Rates.from_profile(profile), NUMEL / TYPICAL_NUMEL
        self.rates = replace(
            rates,
            h2d_bytes_per_s=rates.h2d_bytes_per_s * slower,
            d2h_bytes_per_s=rates.d2h_bytes_per_s * slower,
            both_bytes_per_s=rates.both_bytes_per_s * slower,
            host_update_params_per_s=rates.host_update_params_per_s * slower,
            device_update_params_per_s=rates.device_update_params_per_s * slower,
            host_dram_bytes_per_s=rates.host_dram_bytes_per_s * slower,
        )
        sim.load()
        sim.reset()
        sim.configure("sync", races=False, poison=False)
        self._disturb()
        optimizer = _optimizer()
        search = Search(equal_subgroups(NUM_SUBGROUPS * NUMEL, NUMEL, 2), self.rates)
        plans = [search.spread(optimizer.runtime.homes, num) for num in range(NUM_SUBGROUPS + 1)]
        self.best_s = min(_update_s(optimizer, plan) for plan in plans)

    def _disturb(self, links: float = 1.0, cores: float = 1.0) -> None:
        sim.set_profile(
            h2d_bytes_per_s=self.rates.h2d_bytes_per_s * links,
            d2h_bytes_per_s=self.rates.d2h_bytes_per_s * links,
            both_bytes_per_s=self.rates.both_bytes_per_s * links,
            host_dram_bytes_per_s=self.rates.host_dram_bytes_per_s,
            host_bytes_per_h2d_byte=self.rates.host_bytes_per_h2d_byte,
            host_bytes_per_d2h_byte=self.rates.host_bytes_per_d2h_byte,
            host_update_params_per_s=self.rates.host_update_params_per_s * cores,
            device_update_params_per_s=self.rates.device_update_params_per_s,
            latency_s=self.rates.copy_latency_s,
            launch_s=self.rates.launch_latency_s,
        )

    def wrong(self, factors: Sequence[float]) -> Rates:
        """What a start profile says that is wrong by ``factors``."""
        names = ("h2d_bytes_per_s", "d2h_bytes_per_s", "host_update_params_per_s", "device_update_params_per_s")
        pairs = zip(names, factors, strict=True)
        return replace(self.rates, **{name: getattr(self.rates, name) * factor for name, factor in pairs})

    def run(self, factors: Sequence[float], seed: int | None = None) -> Reached:
        """Twenty steps of ``plan="auto"`` from a profile that is wrong by ``factors``.

        With a ``seed`` rates vary by 4 % from step to step, and one side is halved in every seventh step.
        """
        optimizer = _optimizer(profile=self.wrong(factors))
        first = optimizer.plan
        for step in range(NUM_STEPS):
            if seed is not None:
                rng = random.Random(seed * 1000 + step)
                links, cores = rng.uniform(0.96, 1.04), rng.uniform(0.96, 1.04)
                if step % 7 == 3:
                    links, cores = (links / 2, cores) if rng.random() < 0.5 else (links, cores / 2)
                self._disturb(links, cores)
            optimizer.step()
        optimizer.synchronize()
        self._disturb()
        actions = [decision.action for decision in optimizer.runtime.in_force.decisions]
        reached_s, first_s = (_update_s(optimizer, plan) for plan in (optimizer.plan, first))
        return Reached(first_s / self.best_s, reached_s / self.best_s, actions)


def _optimizer(**arguments: Any) -> offload.AdamW:
    params = [torch.nn.Parameter(torch.zeros(NUMEL, dtype=torch.bfloat16, device="sim")) for _ in range(NUM_SUBGROUPS)]
    for param in params:
        param.grad = torch.ones_like(param)
    return offload.AdamW(params, subgroup_numel=NUMEL, overlap="none", **arguments)


def _update_s(optimizer: offload.AdamW, plan: Plan) -> float:
    optimizer.set_plan(plan)
    optimizer.time_next_step()
    optimizer.step()
    optimizer.synchronize()
    return elapsed_s(optimizer.timeline())


def online(profiles: Sequence[str] = PROFILES, show: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Every wrong profile on each machine: the worst and the median over the best plan's update."""
    found: dict[str, Any] = {}
    for name in profiles:
        machine = Machine(HardwareProfile.load(name))
        for seed in SEEDS:
            runs = [machine.run(factors, seed) for factors in WRONG]
            ratios = sorted(run.reached_over_best for run in runs)
            key = f"{name}, {'quiet' if seed is None else f'neighbours {seed}'}"
            found[key] = {
                "worst_first_over_best": max(run.first_over_best for run in runs),
                "worst_reached_over_best": ratios[-1],
                "median_reached_over_best": ratios[len(ratios) // 2],
            }
            show(f"{key}: {json.dumps({figure: round(value, 4) for figure, value in found[key].items()})}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--profile", nargs="+", default=PROFILES, metavar="NAME", help=f"default: {' '.join(PROFILES)}")
    options = parser.parse_args()
    found = online(options.profile, partial(print, flush=True))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
