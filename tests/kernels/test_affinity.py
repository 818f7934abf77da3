"""Threads bound to processors: what may be written, and where the threads then are."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import offload.kernels
from offload.kernels import affinity, cpu_affinity, native, set_cpu_affinity, threads
from offload.kernels.first_touch import zero_rows_

needs_two = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two processors"
)


@pytest.fixture(autouse=True)
def unbound(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OFFLOAD_CPU_AFFINITY", "OFFLOAD_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    yield
    set_cpu_affinity(None)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Sixteen processors on two nodes, of which this process may use those below 14."""
    for node, cpus in enumerate(("0-3,8-11", "4-7,12-15")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus + "\n")
    monkeypatch.setattr(affinity, "NODES", tmp_path)
    monkeypatch.setattr(affinity, "_usable", lambda: set(range(14)))
    affinity._parse.cache_clear()
    yield tmp_path
    affinity._parse.cache_clear()


# ---- what may be written


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("3", (3,)),
        ("0-2", (0, 1, 2)),
        ("8,0-2,12", (8, 0, 1, 2, 12)),
        ("node:0", (0, 1, 2, 3, 8, 9, 10, 11)),
        ("node:1", (4, 5, 6, 7, 12, 13)),
    ],
)
def test_texts(machine: Path, monkeypatch: pytest.MonkeyPatch, text: str, cpus: tuple[int, ...]) -> None:
    set_cpu_affinity(text)
    assert cpu_affinity() == cpus
    assert offload.kernels.num_threads() == len(cpus)
    set_cpu_affinity(None)
    assert cpu_affinity() is None
    monkeypatch.setenv("OFFLOAD_CPU_AFFINITY", text)
    assert cpu_affinity() == cpus
    set_cpu_affinity([5, 4])
    assert cpu_affinity() == (5, 4), "what the program says goes before the environment"
    monkeypatch.setenv("OFFLOAD_NUM_THREADS", "3")
    assert offload.kernels.num_threads() == 3


@pytest.mark.parametrize("text", ["some", "1-", "-1", "1,,2", "3-1", "node:", "node:2", "14", "0-15"])
def test_errors_name_the_variable_and_the_value(machine: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("OFFLOAD_CPU_AFFINITY", text)
    with pytest.raises(ValueError, match="OFFLOAD_CPU_AFFINITY") as raised:
        cpu_affinity()
    assert text.removeprefix("node:") in str(raised.value)
    with pytest.raises(ValueError, match="cpus"):
        set_cpu_affinity(text)


def test_remedies(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, message in (
        ("some", r"a list of processors like \"0-3,8\", or a NUMA node like \"node:0\", not 'some'"),
        ("node:7", r"no NUMA node '7'; this machine has 0, 1"),
        ([2, 14], r"processor 14 is none of those this process may run on, \[0, 1, .*13\]"),
        ([], "there is none among those this process may run on"),
    ):
        with pytest.raises(ValueError, match=message):
            set_cpu_affinity(cpus)
    monkeypatch.setattr(native, "load", lambda: None)
    with pytest.raises(RuntimeError, match="binds the threads of the compiled kernel, which isn't there: install"):
        set_cpu_affinity([0])


def test_one_node_says_so(machine: Path, caplog: pytest.LogCaptureFixture) -> None:
    (machine / "node1" / "cpulist").unlink()
    (machine / "node1").rmdir()
    with caplog.at_level(logging.WARNING, logger="offload.kernels"):
        set_cpu_affinity("node:0")
    assert cpu_affinity() == (0, 1, 2, 3, 8, 9, 10, 11)
    assert "one NUMA node, so binding to it doesn't bring memory any nearer" in caplog.text


# ---- where the threads are


@pytest.fixture
def update(buffers: Any, make_scalars: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """An update shared by two threads, long enough to be seen at work."""
    monkeypatch.setattr(threads, "MIN_PARALLEL_NUMEL", 64)
    state = buffers.ordinary(1 << 20)
    return lambda: state.step(*make_scalars([1]), num_threads=2)


def cpus_of(thread: Path | str) -> set[int]:
    text = (Path("/proc/self/task") / thread / "status").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("Cpus_allowed_list")]
    return set(affinity._parse_list(line.split()[1]) or ())


def worker_cpus() -> list[set[int]]:
    tasks = [task for task in Path("/proc/self/task").iterdir() if (task / "comm").read_text() == "offload-update\n"]
    return [cpus_of(task.name) for task in tasks]


def repeat_until(update: Callable[[], None], condition: Callable[[], bool]) -> bool:
    """A worker that wakes late takes no part in an update, so one update may not be enough."""
    for _ in range(2000):
        update()
        if condition():
            return True
    return False


@needs_two
def test_workers_move_to_their_processor_and_back(update: Callable[[], None]) -> None:
    allowed = os.sched_getaffinity(0)
    first, second, *_ = sorted(allowed)
    for cpus in ([first, second], [second, first]):
        set_cpu_affinity(cpus)
        assert repeat_until(update, lambda cpus=cpus: {cpus[1]} in worker_cpus())
    set_cpu_affinity(None)
    assert repeat_until(update, lambda: {first} not in worker_cpus())
    assert allowed in worker_cpus(), "a worker was started by a bound thread and never got free"


@needs_two
def test_the_caller_is_bound_for_the_length_of_a_call(update: Callable[[], None]) -> None:
    allowed = os.sched_getaffinity(0)
    caller, seen, stop = str(threading.get_native_id()), threading.Event(), threading.Event()
    last = max(allowed)

    def watch() -> None:
        while not (seen.is_set() or stop.is_set()):
            if cpus_of(caller) == {last}:
                seen.set()

    set_cpu_affinity([last, min(allowed)])
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert repeat_until(update, seen.is_set)
    finally:
        stop.set()
        watcher.join()
    assert os.sched_getaffinity(0) == allowed


@needs_two
def test_a_call_that_nobody_shares_binds_nothing(
    buffers: Any, make_scalars: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = native.load()
    assert kernel is not None
    monkeypatch.setattr(kernel, "_bind_threads", lambda *_: pytest.fail("bound"))
    set_cpu_affinity([0])
    buffers.ordinary(100).step(*make_scalars([1]))


def test_numbers_beyond_the_systems_range(monkeypatch: pytest.MonkeyPatch, update: Callable[[], None]) -> None:
    monkeypatch.setattr(affinity, "_usable", lambda: {1 << 20})
    set_cpu_affinity([1 << 20])
    with pytest.raises(ValueError, match=r"1048576.*beyond the system's range"):
        update()


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_zeros(monkeypatch: pytest.MonkeyPatch, numel: int, num_threads: int) -> None:
    monkeypatch.setattr(threads, "MIN_PARALLEL_NUMEL", 1)
    monkeypatch.setattr(native, "CHUNK_NUMEL", 64)
    monkeypatch.setenv("OFFLOAD_NUM_THREADS", str(num_threads))
    memory = torch.ones(5, numel)
    assert zero_rows_(memory[1:4]) is not None
    assert not memory[1:4].any()
    assert memory[[0, 4]].all(), "wrote beyond the rows"
