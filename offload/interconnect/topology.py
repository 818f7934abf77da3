"""Processors and memory of the host: rates from each NUMA node, and of the CPU update by number of cores."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from offload.interconnect.buffers import Pair
from offload.interconnect.copies import WRONG, rate_result
from offload.interconnect.harness import Activity, Harness
from offload.interconnect.overlap import cpu_update
from offload.interconnect.results import Result
from offload.interconnect.settings import Settings

_NODES = Path("/sys/devices/system/node")


def numa_nodes(directory: Path = _NODES) -> dict[int, frozenset[int]]:
    """Processors of each NUMA node that has any and that this process may use; one node 0 where nothing is known."""
    usable = allowed_processors()
    nodes = {}
    for path in directory.glob("node[0-9]*/cpulist"):
        if cpus := parse_processors(path.read_text(encoding="utf-8")) & usable:
            nodes[int(path.parent.name.removeprefix("node"))] = cpus
    return dict(sorted(nodes.items())) or {0: usable}


def allowed_processors() -> frozenset[int]:
    """Processors that the calling thread may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def parse_processors(text: str) -> frozenset[int]:
    """The numbers in a list as the kernel writes it: "0-3,8"."""
    found: set[int] = set()
    for item in filter(None, text.strip().split(",")):
        first, _, last = item.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


@contextlib.contextmanager
def on_processors(cpus: frozenset[int]) -> Iterator[None]:
    """Run the calling thread, and threads it starts, on these processors only."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def by_node(harness: Harness, settings: Settings) -> Iterator[Result]:
    """Copies from and to memory first touched by each NUMA node."""
    for node, cpus in numa_nodes().items():
        for make, source, target in ((Pair.up, "pinned", "device"), (Pair.down, "device", "pinned")):
            with on_processors(cpus):
                pair = make(harness.accelerator, settings.copy_bytes)
                copy = pair.copy("copy")
                count = harness.pieces(copy, settings.piece_s)
                pair.clear()
                timings = harness.time((copy, count))
            yield rate_result(
                "place", (source, target, f"NUMA node {node}"), timings, count * copy.amount, "bytes/s",
                num_bytes=settings.copy_bytes, details={"num_processors": float(len(cpus))},
                problem="" if pair.arrived() else WRONG,
            )  # fmt: skip


def by_cores(harness: Harness, settings: Settings) -> Iterator[Result]:
    """The CPU update by number of threads: powers of two up to the processors there are."""
    num_processors = len(allowed_processors())
    counts = sorted({1 << i for i in range(num_processors.bit_length()) if 1 << i < num_processors} | {num_processors})
    for num_threads in counts:
        run = cpu_update(settings.update_numel, num_threads=num_threads)
        update = Activity("CPU update", run, settings.update_numel, "parameters/s", on_host=True)
        count = harness.pieces(update, settings.piece_s / 4)
        timings = harness.time((update, count))
        yield rate_result(
            "place", ("host", "host", f"CPU update by {num_threads} threads"), timings, count * update.amount,
            "parameters/s", details={"num_threads": float(num_threads)},
        )  # fmt: skip
