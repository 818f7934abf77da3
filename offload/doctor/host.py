"""The host: processors and their memory, what may be pinned, what the control group allows, huge pages, threads."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import psutil

from offload.doctor.findings import MEMORY, OVERLAPS, RATE, Finding
from offload.kernels import num_threads
from offload.pool import format_bytes
from offload.processors import allowed_processors, numa_nodes

_CGROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # version 2, version 1
_NO_LIMIT_BYTES = 1 << 60  # version 1 writes a huge number for "none"


def examine_host(system: Path = Path("/sys")) -> list[Finding]:
    """Lines about this machine's processors and memory."""
    return [*_processors(system), *_threads(), *_pinning(), _control_group(system), _huge_pages(system)]


def _processors(system: Path) -> list[Finding]:
    usable, present = len(allowed_processors()), psutil.cpu_count() or 1
    nodes = numa_nodes(system / "devices/system/node")
    text = f"{usable} of {present} processors may be used, on {len(nodes)} NUMA nodes"
    if usable < present:
        remedy = f"let the process use more of the {present} processors (taskset, numactl, the batch system's binding)"
        return [Finding("processors", "note", text, remedy, RATE)]
    if len(nodes) > 1:
        remedy = "bind each rank to the NUMA node of its device (numactl --cpunodebind=N --membind=N)"
        return [Finding("processors", "note", text, remedy, RATE)]
    return [Finding("processors", "good", text)]


def _threads() -> list[Finding]:
    count, usable = num_threads(), len(allowed_processors())
    text = f"a CPU update uses {count} threads"
    if count > usable:
        remedy = f"lower OFFLOAD_NUM_THREADS to {usable}: more threads than processors wait for each other"
        return [Finding("threads", "bad", text, remedy, RATE)]
    return [Finding("threads", "good", text)]


def _pinning() -> list[Finding]:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    memory = psutil.virtual_memory().total
    if limit == resource.RLIM_INFINITY or limit >= memory:
        return [Finding("memlock", "good", "no limit on locked memory")]
    # CUDA's driver pins on behalf of the process and does not count it here; other drivers do.
    text = f"at most {format_bytes(limit)} may be locked"
    if torch_pins_by_driver():
        return [Finding("memlock", "note", f"{text} (CUDA's pinned memory is not counted)")]
    remedy = "raise the limit on locked memory (ulimit -l unlimited, or memlock in limits.conf)"
    return [Finding("memlock", "note", text, remedy, OVERLAPS)]


def torch_pins_by_driver() -> bool:
    return os.path.exists("/dev/nvidiactl")


def _control_group(system: Path) -> Finding:
    for name in _CGROUP_LIMITS:
        try:
            text = (system / "fs/cgroup" / name).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if text.isdecimal() and int(text) < min(_NO_LIMIT_BYTES, psutil.virtual_memory().total):
            message = f"the control group allows {format_bytes(int(text))} of host memory"
            return Finding("memory", "note", message, "raise the container's memory limit, or set host_budget", MEMORY)
    memory = psutil.virtual_memory()
    return Finding("memory", "good", f"{format_bytes(memory.available)} of {format_bytes(memory.total)} are free")


def _huge_pages(system: Path) -> Finding:
    try:
        text = (system / "kernel/mm/transparent_hugepage/enabled").read_text(encoding="utf-8")
    except OSError:
        return Finding("huge pages", "note", "transparent huge pages are unknown here")
    chosen = text[text.find("[") + 1 : text.find("]")]
    if chosen == "never":
        remedy = "allow transparent huge pages (echo madvise > /sys/kernel/mm/transparent_hugepage/enabled)"
        return Finding("huge pages", "note", "transparent huge pages are off", remedy, RATE)
    return Finding("huge pages", "good", f"transparent huge pages: {chosen}")
