"""Processors and memory of the host: rates from each NUMA node, and of the CPU update by number of cores."""

from __future__ import annotations

from collections.abc import Iterator

from offload.interconnect.buffers import Pair
from offload.interconnect.copies import WRONG, rate_result
from offload.interconnect.harness import Activity, Harness
from offload.interconnect.overlap import cpu_update
from offload.interconnect.results import Result
from offload.interconnect.settings import Settings
from offload.processors import allowed_processors, numa_nodes, on_processors


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
