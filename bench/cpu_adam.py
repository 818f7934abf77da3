"""The CPU update against the machine's memory, and against the ways torch and DeepSpeed have to do the same.

    python -m bench.cpu_adam [--quick] [--numel 16777216 67108864] [--threads 1 2] [--json FILE] [--plot FILE]

All cases of a job work on the same memory in one process, taking turns, so that a disturbance of the machine meets all
of them; ratios are medians of the ratios within each turn. The limit is a pass that reads and writes the same 28 bytes
per parameter and computes next to nothing. Before timing, torch must give the same bits as ours. Memory is what the
optimizer's state is in, huge pages where the system offers them (OFFLOAD_HUGE_PAGES=0 for ordinary ones).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from bench import cpu_adam_cases as cases
from bench.cpu_adam_report import plot, print_headline, print_job
from bench.interleaved import Case, Times, take_turns
from offload import host_memory
from offload.kernels import AdamScalars, PreparedUpdate, State, adam_step, num_threads

GOAL_NUMEL = 1 << 26  # the size that the figures are compared at
FULL_NUMELS = (1 << 24, 1 << 26, 1 << 28)
SMALL_NUMEL = 1000

# Headline figures: how many times as long the first takes as the second, so above 1 is better for the second.
RATIOS = {
    "stream_fraction": ("step", cases.STREAM, cases.OURS),
    "vs_torch_fused": ("step", cases.TORCH_FUSED, cases.OURS),
    "vs_deepspeed_cpuadam": ("step", cases.DEEPSPEED, cases.OURS),
    "vs_deepspeed_in_ordinary_pages": ("step", cases.DEEPSPEED_ORDINARY, cases.OURS),
    "huge_pages_gain": ("step", cases.ORDINARY_PAGES, cases.OURS),
    "vs_zero3_path": ("offload", cases.ZERO3, cases.OURS_OFFLOAD),
    "vs_zero3_path_in_ordinary_pages": ("offload", cases.ZERO3_ORDINARY, cases.OURS_OFFLOAD),
    "vs_torch_fused_path": ("offload", cases.TORCH_PASSES, cases.OURS_OFFLOAD),
    "split16_vs_fp32": ("offload", cases.OURS_OFFLOAD, cases.state_case("split16")),
    "bf16_vs_fp32": ("offload", cases.OURS_OFFLOAD, cases.state_case("bf16")),
    "int8_vs_fp32": ("offload", cases.OURS_OFFLOAD, cases.state_case("int8")),
}


def call_overhead_us(num_calls: int = 50, num_turns: int = 100) -> dict[str, float]:
    """Microseconds of a call over 1,000 parameters, the update itself included: the least of the turns' means.

    The least, and of short turns, as other programs only ever add to so short a time.
    """
    buffers = cases.Buffers(SMALL_NUMEL)
    scalars = AdamScalars.at_step(step=cases.STEP, decoupled=True, **cases.HYPER)
    prepared = PreparedUpdate(State("fp32", *buffers.state), buffers.grad_bf16, buffers.out)

    def calls(one: Case) -> Case:
        return lambda: [one() for _ in range(num_calls)]

    times = take_turns(
        {
            "prepared": calls(lambda: prepared(scalars)),
            "adam_step": calls(lambda: adam_step(*buffers.state, buffers.grad_bf16, buffers.out, scalars=scalars)),
        },
        num_turns,
    )
    return {name: min(each.turns_s) / num_calls * 1e6 for name, each in times.items()}


def measure(
    numel: int, threads: int, num_turns: int, *, quick: bool
) -> tuple[dict[str, dict[str, Times]], dict[str, str]]:
    """Times by job and case, and why other cases are missing."""
    jobs = cases.make_jobs(cases.Buffers(numel), threads, quick=quick)
    return {"step": take_turns(jobs.step, num_turns), "offload": take_turns(jobs.offload, num_turns)}, jobs.missing


def ratios(times: dict[str, dict[str, Times]]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, (job, slower, faster) in RATIOS.items():
        both = times[job].get(slower), times[job].get(faster)
        found[name] = both[0].over(both[1]) if both[0] and both[1] else None
    return found


def rows_of(numel: int, threads: int, times: dict[str, dict[str, Times]]) -> list[dict[str, Any]]:
    return [
        {
            "numel": numel,
            "threads": threads,
            "job": job,
            "case": name,
            "median_s": each.median_s,
            "quartiles_s": each.quartiles_s,
            "turns_s": each.turns_s,
        }
        for job, by_case in times.items()
        for name, each in by_case.items()
    ]


def setting() -> dict[str, Any]:
    """What the figures depend on."""
    packages = {package: _version(package) for package in ("torch", "deepspeed", "numba")}
    return {
        "processor": _processor(),
        "instruction_set": cases.fastest(),
        "huge_pages": host_memory.uses_huge_pages(),
        "versions": packages,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    arguments = parse_arguments()
    start_s = time.perf_counter()
    cases.check_bits()
    results: dict[str, Any] = {"setting": setting(), "rows": [], "by_size": []}
    print(", ".join(f"{name} {value}" for name, value in results["setting"].items()))
    for numel in arguments.numel:
        needed_bytes, free_bytes = numel * cases.BYTES_PER_PARAM, psutil.virtual_memory().available
        if needed_bytes > free_bytes:
            print(f"\n{numel:,} parameters: left out, {needed_bytes:,} bytes are needed and {free_bytes:,} are free")
            continue
        for threads in arguments.threads:
            times, missing = measure(numel, threads, arguments.turns, quick=arguments.quick)
            print(f"\n{numel:,} parameters, {threads} threads, median of {arguments.turns} turns [quartiles]")
            print_job("step", times["step"], numel, cases.OURS, missing)
            print_job("offload", times["offload"], numel, cases.OURS_OFFLOAD, missing)
            results["rows"] += rows_of(numel, threads, times)
            results["by_size"].append({"numel": numel, "threads": threads, **ratios(times)})
            results["missing"] = missing
    if not results["by_size"]:
        raise SystemExit("no size fits into the memory that is free; give a smaller --numel")
    # The figures of the goals, at their size if it was measured, with all threads.
    headline = min(results["by_size"], key=lambda each: (abs(each["numel"] - GOAL_NUMEL), -each["threads"]))
    results |= headline
    overhead_us = call_overhead_us()
    results["call_overhead_us"], results["unprepared_call_us"] = overhead_us["prepared"], overhead_us["adam_step"]
    print_headline(results, list(RATIOS))
    print(f"took {time.perf_counter() - start_s:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, nargs="+", help="parameters per update; default: 16M, 64M and 256M")
    parser.add_argument("--threads", type=int, nargs="+", help="for ours and for the peers; default: 1 and all")
    parser.add_argument("--turns", type=int, help="timed turns, of which medians are printed; default: 15, quick 5")
    parser.add_argument(
        "--quick", action="store_true", help="under a minute: 64M, all threads, what is compiled already"
    )
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--plot", type=Path, help="draw them into this file (needs matplotlib)")
    arguments = parser.parse_args()
    arguments.numel = arguments.numel or ([GOAL_NUMEL] if arguments.quick else FULL_NUMELS)
    arguments.threads = arguments.threads or ([num_threads()] if arguments.quick else sorted({1, num_threads()}))
    arguments.turns = arguments.turns or (5 if arguments.quick else 15)
    if min(*arguments.numel, *arguments.threads, arguments.turns) < 1:
        parser.error("--numel, --threads and --turns are at least 1")
    return arguments


if __name__ == "__main__":
    main()
