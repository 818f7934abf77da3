"""Which processors the threads of an update are bound to: what the user wrote, as a list of processors."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

NODES = Path("/sys/devices/system/node")

_chosen: tuple[int, ...] | None = None


def cpu_affinity() -> tuple[int, ...] | None:
    """Processors that the threads of an update are bound to, in the order of the threads; None: they aren't bound.

    What :func:`offload.kernels.set_cpu_affinity` set, else the environment's OFFLOAD_CPU_AFFINITY.
    """
    if _chosen is not None:
        return _chosen
    text = os.environ.get("OFFLOAD_CPU_AFFINITY")
    return None if not text else _parse(text, "OFFLOAD_CPU_AFFINITY")


def choose(cpus: str | Iterable[int] | None) -> None:
    """Sets :func:`cpu_affinity` for this process; None goes back to the environment's."""
    global _chosen
    if cpus is None:
        _chosen = None
    elif isinstance(cpus, str):
        _chosen = _parse(cpus, "cpus")
    else:
        _chosen = _check(tuple(cpus), "cpus", list(cpus))


@functools.lru_cache(maxsize=16)
def _parse(text: str, name: str) -> tuple[int, ...]:
    """Processors of a list like ``"0-3,8"``, or of a NUMA node: ``"node:1"``."""
    if text.startswith("node:"):
        return _check(_cpus_of_node(text.removeprefix("node:"), name), name, text)
    cpus = _parse_list(text)
    if cpus is None:
        raise ValueError(
            f'{name} must be a list of processors like "0-3,8", or a NUMA node like "node:0", not {text!r}'
        )
    return _check(cpus, name, text)


def _parse_list(text: str) -> tuple[int, ...] | None:
    cpus: list[int] = []
    for part in text.strip().split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            return None
        cpus.extend(range(int(first), int(last if dash else first) + 1))
    return tuple(cpus)


def _cpus_of_node(number: str, name: str) -> tuple[int, ...]:
    """Those of its processors that this process may use."""
    nodes = {path.name.removeprefix("node"): path for path in NODES.glob("node[0-9]*")}
    if number not in nodes:
        raise ValueError(
            f"{name}: there is no NUMA node {number!r}; this machine has {', '.join(sorted(nodes)) or 'none'}"
        )
    if len(nodes) == 1:
        logger.warning("%s: this machine has one NUMA node, so binding to it doesn't bring memory any nearer.", name)
    cpus = _parse_list((nodes[number] / "cpulist").read_text()) or ()
    usable = _usable()
    return tuple(cpu for cpu in cpus if cpu in usable)


def _check(cpus: tuple[int, ...], name: str, given: object) -> tuple[int, ...]:
    usable = _usable()
    refused = [cpu for cpu in cpus if cpu not in usable]
    if refused or not cpus:
        what = f"processor {refused[0]} is none of those" if refused else "there is none among those"
        raise ValueError(f"{name}={given!r}: {what} this process may run on, {sorted(usable)}")
    return cpus


def _usable() -> set[int]:
    """Processors of the process, whatever the calling thread is bound to."""
    if not hasattr(os, "sched_getaffinity"):
        raise ValueError("threads can't be bound to processors on this system; leave OFFLOAD_CPU_AFFINITY unset")
    return os.sched_getaffinity(os.getpid())
