"""Does the planner choose well, fast and in time? Run: python -m bench.planner [--only PART] [--json FILE]

- profiles (simulated): on every shipped profile, the chosen plan against the paper's strides, as its artifact ran them
  and on our executor, against all other fixed plans, and against the lower bound;
- links (simulated): where only links and cores bind, the chosen plan against the lower bound;
- speed: seconds to plan 70B parameters in 1,000 subgroups, and a trillion over 1,024 ranks;
- emulated: prediction against wall-clock on the emulated device, at the rates of one other plan;
- online: from profiles that are off by 2x in every rate, the update after 20 steps over the best plan's
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import offload
from bench.online import online
from bench.paper_artifact import simulate
from bench.paper_tables import Run, read_tables
from offload.beliefs import RATE_OF_LANE, Measurement
from offload.bounds import Update, best_split
from offload.candidates import STRIDES, decide
from offload.estimate import SHAPES, transformer_cost
from offload.hardware import HardwareProfile
from offload.homes import Homes
from offload.jobs import TrainingJob, equal_subgroups, plan_job
from offload.kernels import set_num_threads
from offload.perf_model import Rates, predict
from offload.plan import Placement, Plan, lower
from offload.planner import spread, stride_plan
from offload.scheduling import schedule
from offload.subgroup import Subgroup
from offload.testing import sim
from offload.timeline import elapsed_s
from offload.timing import work_of

MODEL = "20B"  # of the paper's tables: the largest, 31 subgroups a rank
REPEATS = 9
HOST, DEVICE = Placement.HOST, Placement.DEVICE


# ---- simulated


def profiles() -> dict[str, Any]:
    """Each shipped profile, with the paper's subgroup size and no device memory but slots."""
    found = {}
    tables = read_tables()
    for name in HardwareProfile.names():
        profile = HardwareProfile.load(name)
        rates = Rates.from_profile(profile)
        num_ranks = profile.num_ranks_per_node
        numels = tables.numels_of(MODEL, num_ranks)
        subgroups = [Subgroup(i, n, 2 * n, 12 * n) for i, n in enumerate(numels)]
        decision = decide(subgroups, rates)
        homes = Homes(visitors=frozenset(range(len(subgroups))), num_slots=2, num_staging=2)
        strides_s = [predict(stride_plan(homes, len(subgroups), k), subgroups, rates).update_s for k in STRIDES]
        runs = [Run(name, MODEL, "interleaved", update_stride=k, num_ranks=num_ranks) for k in STRIDES]
        artifact_s = [simulate(run, profile, tables).update for run in runs]
        fixed = [lower([where] * len(subgroups), num_slots=3, num_staging=2) for where in (HOST, DEVICE)]
        fixed_s = [*strides_s, *(predict(plan, subgroups, rates).update_s for plan in fixed)]
        _, bound = best_split(Update(sum(numels)), rates)
        found[name] = {
            "chosen": decision.best.name,
            "update_s": decision.best.update_s,
            "binds": decision.binds,
            "artifact_best_stride_s": min(artifact_s),
            "faster_than_artifact": min(artifact_s) / decision.best.update_s,
            "faster_than_stride_here": min(strides_s) / decision.best.update_s,
            "faster_than_best_fixed": min(fixed_s) / decision.best.update_s,
            "over_bound": decision.best.update_s / bound.seconds,
        }
    return found


LINKS = ((100e9, 2e9), (25e9, 2e9), (12e9, 2e9), (25e9, 1e9), (6e9, 2.9e9))  # bytes/s each way, CPU parameters/s


def links() -> dict[str, Any]:
    """Machines of a link and cores: no sharing, an instant device. 48 subgroups."""
    found = {}
    for link, cores in LINKS:
        rates = Rates(link, link, cores, 1e15)
        decision = decide(equal_subgroups(48 * 10**6, 10**6, 2), rates)
        _, bound = best_split(Update(48e6), rates)
        found[f"{link / 1e9:g} GB/s, {cores / 1e9:g} billion parameters/s"] = {
            "chosen": decision.best.name,
            "update_s": decision.best.update_s,
            "over_bound": decision.best.update_s / bound.seconds,
        }
    return found


def speed() -> dict[str, Any]:
    """Wall-clock and processor seconds of whole jobs: candidates, step, levers."""
    node = HardwareProfile.load("h100-sxm-node")
    found = {}
    for model, subgroup_numel, num_ranks in (("llama-70b", None, 1), ("gpt-1t", None, 1024)):
        cost = transformer_cost(model, SHAPES[model], micro_batch=1, seq=2048)
        profile = node
        if num_ranks == 1:  # all of its parameters in one rank's 1,000 subgroups, whatever they weigh
            subgroup_numel = -(-cost.numel // 1000)
            figures = {"device_memory_bytes": replace(node.figures["device_memory_bytes"], value=400 * 10**9)}
            profile = node.with_figures(**figures)
        job = TrainingJob(cost, profile, num_ranks, subgroup_numel=subgroup_numel)
        start_s, start_process_s = time.perf_counter(), time.process_time()
        planned = plan_job(job)
        found[f"{model}, {num_ranks} ranks"] = {
            "num_subgroups": len(job.subgroups()),
            "wall_s": time.perf_counter() - start_s,
            "process_s": time.process_time() - start_process_s,
            "chosen": planned.decision.best.name,
        }
    return found


# ---- on the emulated device

NUM_SUBGROUPS, NUMEL = 24, 1 << 21  # large enough that handing work to threads hardly counts
TYPICAL = Rates(2e9, 2e9, 4e8, 4e8)  # for the order of operations in some of the plans
LINK_BYTES_PER_S = 1.5e9  # slow enough that the copies' own work on this machine's cores hardly counts


def _optimizer(**arguments: Any) -> offload.AdamW:
    params = [torch.nn.Parameter(torch.zeros(NUMEL, dtype=torch.bfloat16, device="sim")) for _ in range(NUM_SUBGROUPS)]
    for param in params:
        param.grad = torch.ones_like(param)
    return offload.AdamW(params, subgroup_numel=NUMEL, **arguments)


def _emulate(link_bytes_per_s: float) -> None:
    sim.load()
    sim.configure("threads", capacity="3GiB", races=False, poison=False)
    sim.set_profile(h2d_bytes_per_s=link_bytes_per_s, d2h_bytes_per_s=link_bytes_per_s)
    torch.set_num_threads(1)
    set_num_threads(1)  # the other core is for the device's own updates and copies


def _plans(homes: Homes) -> dict[str, Plan]:
    """Plans of every kind that fit the memory of one optimizer, by name."""
    subgroups, residents = equal_subgroups(NUM_SUBGROUPS * NUMEL, NUMEL, 2), len(homes.residents)
    prefix = f"{residents} resident, " if residents else ""
    plans = {f"{prefix}stride {k}": stride_plan(homes, NUM_SUBGROUPS, k) for k in (1, 3, 4, 6, 99)}
    plans[f"{prefix}1 slot"] = stride_plan(replace(homes, num_slots=1), NUM_SUBGROUPS, 1)
    for num in (4, 8, 12):
        placements = spread(subgroups, homes, num)
        plans[f"{prefix}{num} visit, in order of time"] = schedule(
            placements, subgroups, TYPICAL, num_slots=homes.num_slots, num_staging=homes.num_staging
        )
    return plans


def _timed_step(optimizer: offload.AdamW, plan: Plan) -> Measurement:
    """One step of ``plan``, timed on the emulated device's streams and the host's clock, which is the wall's here."""
    optimizer.set_plan(plan)
    optimizer.time_next_step()
    optimizer.step()
    optimizer.synchronize()
    spans = optimizer.timeline()
    return Measurement(0, work_of(spans, optimizer.runtime.subgroups), elapsed_s(spans))


def emulated() -> dict[str, Any]:
    """Prediction against the wall-clock of the very plan.

    Rates are those of another plan, every other subgroup on the device. Plans take turns, so that whatever else this
    machine does meets all of them.
    """
    _emulate(LINK_BYTES_PER_S)
    cases: dict[str, tuple[offload.AdamW, Plan]] = {}
    budget = 12 * NUMEL * (NUM_SUBGROUPS // 3 + 2)
    optimizers = [_optimizer(plan="auto"), _optimizer(plan="auto", device_budget=budget)]
    for optimizer in optimizers:
        cases |= {name: (optimizer, plan) for name, plan in _plans(optimizer.runtime.homes).items()}
    probe = optimizers[0].plan
    times_s: dict[str, list[float]] = {name: [] for name in cases}
    seconds_each: dict[str, list[float]] = {lane: [] for lane in RATE_OF_LANE}  # byte or parameter
    for round_number in range(REPEATS + 1):
        measured = {name: _timed_step(*case) for name, case in cases.items()}
        probed = _timed_step(optimizers[0], probe)
        if round_number:  # the first warms up
            for name, measurement in measured.items():
                times_s[name].append(measurement.update_s)
            for lane, (amount, seconds) in probed.work.items():
                seconds_each[lane].append(seconds / amount)
    believed = Rates(**{RATE_OF_LANE[lane]: 1 / _quiet(values) for lane, values in seconds_each.items()})
    found: dict[str, Any] = {}
    for name, (optimizer, plan) in cases.items():
        measured_s, predicted_s = _quiet(times_s[name]), optimizer.simulate(believed, plan).update_s
        found[name] = {"measured_s": measured_s, "predicted_s": predicted_s, "error": predicted_s / measured_s - 1}
    errors = [abs(row["error"]) for row in found.values()]
    summary = {"num_plans": len(found), "median_error": statistics.median(errors), "worst_error": max(errors)}
    return {**found, **summary, "rates": asdict(believed)}


def _quiet(values: Sequence[float]) -> float:
    """The quarter of the values that is least disturbed by what else this machine does: its upper end."""
    return sorted(values)[(len(values) - 1) // 4]


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "profiles": profiles, "links": links, "speed": speed, "emulated": emulated, "online": online,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part instead of all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    found = {name: part() for name, part in PARTS.items() if options.only in (None, name)}
    for name, figures in found.items():
        print(f"== {name}")
        for key, value in figures.items():
            print(f"{key}: {json.dumps(value) if not isinstance(value, float) else f'{value:.4g}'}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
