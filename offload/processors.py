"""Processors of the host: which there are, which this process may use, and on which NUMA node each is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

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


def ranks_on_this_node() -> int | None:
    """Ranks that share this node's processors and memory, as the launcher says (torchrun, deepspeed); None: unknown."""
    text = os.environ.get("LOCAL_WORLD_SIZE")
    return int(text) if text else None


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
