"""How much host memory this process may still take: the machine, control groups (v1 and v2) and resource limits."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_NO_LIMIT_BYTES = 1 << 60  # control groups (v1) write "no limit" as a number near 2**63


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """One bound on host memory, at one moment.

    Attributes:
        name: what bounds, for a reader.
        total_bytes: what it allows.
        free_bytes: what of it can still be taken: page cache that the system would give back counts as free.
        shared: whether all ranks of this node draw on it, not this process alone.
        remedy: how to raise it.
    """

    name: str
    total_bytes: int
    free_bytes: int
    shared: bool
    remedy: str


def host_limits(proc: Path = Path("/proc")) -> list[MemoryLimit]:
    """All bounds on this process's host memory; empty where the system tells none (not Linux).

    Args:
        proc: where the process file system is mounted.
    """
    return [*_machine(proc), *_control_groups(proc), *_resource_limits(proc)]


def local_ranks() -> int:
    """Processes of this node that do the same as this one: LOCAL_WORLD_SIZE, as torchrun and others set it, else 1."""
    value = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return int(value) if value.isdecimal() and int(value) > 0 else 1


def lockable_bytes(proc: Path = Path("/proc")) -> int | None:
    """What this process may still lock in memory (RLIMIT_MEMLOCK); None: no limit, or it may ignore it."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    status = _kib_fields(proc / "self/status")
    if limit == resource.RLIM_INFINITY or _has_capability(proc, _CAP_IPC_LOCK):
        return None
    return max(0, limit - status.get("VmLck", 0))


_CAP_IPC_LOCK = 14


def _has_capability(proc: Path, number: int) -> bool:
    for line in _lines(proc / "self/status"):
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def _machine(proc: Path) -> Iterator[MemoryLimit]:
    meminfo = _kib_fields(proc / "meminfo")
    if "MemAvailable" in meminfo:
        remedy = "end other programs, or use a machine with more memory"
        yield MemoryLimit("this machine's memory", meminfo["MemTotal"], meminfo["MemAvailable"], True, remedy)


def _resource_limits(proc: Path) -> Iterator[MemoryLimit]:
    used = _kib_fields(proc / "self/status")
    for name, which, counter, option in (
        ("the limit on address space (RLIMIT_AS)", resource.RLIMIT_AS, "VmSize", "-v"),
        ("the limit on data (RLIMIT_DATA)", resource.RLIMIT_DATA, "VmData", "-d"),
    ):
        limit, _ = resource.getrlimit(which)
        if limit != resource.RLIM_INFINITY:
            yield MemoryLimit(name, limit, max(0, limit - used.get(counter, 0)), False, f"raise it (ulimit {option})")


def _control_groups(proc: Path) -> Iterator[MemoryLimit]:
    """The process's memory control group and all above it: each may be the tightest."""
    mounts = dict(_memory_mounts(proc))
    for line in _lines(proc / "self/cgroup"):
        _, controllers, path = line.split(":", 2)
        version = "v2" if not controllers else "v1" if "memory" in controllers.split(",") else None
        if version not in mounts:
            continue
        seen = set()
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            folder = mounts[version] / str(group).lstrip("/")
            if folder not in seen:
                seen.add(folder)
                yield from (_group_v2(folder) if version == "v2" else _group_v1(folder))


def _memory_mounts(proc: Path) -> Iterator[tuple[str, Path]]:
    """Where the file systems of memory control groups are mounted. A container may show its group as their root."""
    for line in _lines(proc / "self/mountinfo"):
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup2":
            yield "v2", Path(before.split()[4])
        elif kind == "cgroup" and "memory" in options.split(","):
            yield "v1", Path(before.split()[4])


def _group_v2(folder: Path) -> Iterator[MemoryLimit]:
    yield from _group(folder, "memory.max", "memory.current", ("inactive_file", "active_file", "file_mapped"))


def _group_v1(folder: Path) -> Iterator[MemoryLimit]:
    cache = ("total_inactive_file", "total_active_file", "total_mapped_file")
    yield from _group(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", cache)


def _group(folder: Path, limit_file: str, usage_file: str, cache: tuple[str, str, str]) -> Iterator[MemoryLimit]:
    """Page cache can be had back, but for what of it is mapped: the code of the libraries that run."""
    limit_text, usage_text = _text(folder / limit_file).strip(), _text(folder / usage_file).strip()
    if not limit_text.isdecimal() or not usage_text.isdecimal() or int(limit_text) >= _NO_LIMIT_BYTES:
        return  # "max", the root group, or a group that this mount does not show
    stat = dict(line.split()[:2] for line in _lines(folder / "memory.stat") if len(line.split()) == 2)
    inactive, active, mapped = (int(stat.get(name, 0)) for name in cache)
    used_bytes = int(usage_text) - max(0, inactive + active - mapped)
    name = f"the memory limit of control group {folder}"
    free_bytes = max(0, int(limit_text) - used_bytes)
    yield MemoryLimit(name, int(limit_text), free_bytes, True, "raise it (docker run --memory, systemd MemoryMax)")


def _kib_fields(path: Path) -> dict[str, int]:
    """Fields of a file with lines as "VmSize:  3060 kB", in bytes."""
    found = {}
    for line in _lines(path):
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = int(value[:-3]) * 1024
    return found


def _lines(path: Path) -> list[str]:
    return _text(path).splitlines()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
