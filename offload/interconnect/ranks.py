"""Copies and CPU updates of each rank alone and of all ranks together: what processes of one host take from each other.

A rank is a process of its own with a device of its own, or a share of one where there are fewer devices.
"""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from offload.accelerators import accelerator_for
from offload.interconnect.buffers import Pair
from offload.interconnect.harness import Activity, Harness
from offload.interconnect.overlap import cpu_update
from offload.interconnect.results import Result
from offload.interconnect.settings import Settings
from offload.testing import sim

_START_TIMEOUT_S = 300.0  # of a process: it imports torch, and may compile a kernel

_CASES = (("pinned", "device", "bytes/s"), ("device", "pinned", "bytes/s"), ("host", "host", "parameters/s"))


@dataclass(frozen=True, slots=True)
class _Order:
    """What a rank is told: which case, and whether all others do the same now."""

    case: int
    together: bool


def by_rank(device: torch.device, settings: Settings) -> Iterator[Result]:
    """Each case for every rank alone, then for all at once; nothing for one rank.

    Raises:
        RuntimeError: if a rank fails, with what it said.
    """
    if settings.num_ranks < 2:
        return
    context = mp.get_context("spawn")  # a forked process cannot use CUDA
    barrier = context.Barrier(settings.num_ranks)
    pipes: list[Connection[Any, Any]] = []
    processes = []
    for rank in range(settings.num_ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, barrier, device.type, rank, settings), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        for pipe in pipes:
            _answer(pipe)  # ready
        for index, (source, target, unit) in enumerate(_CASES):
            alone = []
            for pipe in pipes:
                pipe.send(_Order(index, together=False))
                alone.append(_answer(pipe))
            for pipe in pipes:
                pipe.send(_Order(index, together=True))
            together = [_answer(pipe) for pipe in pipes]
            for rank, (by_itself, beside) in enumerate(zip(alone, together, strict=True)):
                yield _result(source, target, f"rank {rank} alone", by_itself, unit, {})
                details = {"rate_kept": beside / by_itself, "sum_of_ranks": sum(together)}
                yield _result(source, target, f"rank {rank} of {len(pipes)} together", beside, unit, details)
    finally:
        for pipe in pipes:
            pipe.close()  # a rank that waits for an order ends
        for process in processes:
            process.join(10)
            process.kill()


def _result(source: str, target: str, mode: str, rate: float, unit: str, details: dict[str, float]) -> Result:
    return Result("ranks", source, target, mode, rate, unit, rate, rate, details=details)


def _answer(pipe: Connection[Any, Any]) -> float:
    try:
        if not pipe.poll(_START_TIMEOUT_S):
            raise RuntimeError(f"a rank has not answered for {_START_TIMEOUT_S:.0f} s")
        answer = pipe.recv()
    except EOFError as error:
        raise RuntimeError("a rank ended before it answered; its own message is above") from error
    if isinstance(answer, str):
        raise RuntimeError(f"a rank failed: {answer}")
    return float(answer)


def _serve(pipe: Connection[Any, Any], barrier: Any, device_type: str, rank: int, settings: Settings) -> None:
    """A rank: measures what it is told to until the pipe closes."""
    try:
        if device_type == "sim":
            sim.load()
            sim.configure("threads", races=False)
        index = rank % torch.accelerator.device_count()
        torch.accelerator.set_device_index(index)
        accelerator = accelerator_for(torch.device(device_type, index))
        harness = Harness(accelerator, settings.repeats)
        small = replace(settings, copy_bytes=min(settings.copy_bytes, 16 << 20))
        pairs = [make(accelerator, small.copy_bytes) for make in (Pair.up, Pair.down)]
        update = Activity(
            "CPU update", cpu_update(small.update_numel), small.update_numel, "parameters/s", on_host=True
        )
        activities = [*(pair.copy("copy") for pair in pairs), update]
        counts = [harness.pieces(activity, settings.piece_s) for activity in activities]
        pipe.send(0.0)
        while True:
            order = pipe.recv()
            activity, count = activities[order.case], counts[order.case]
            if order.together:
                barrier.wait(_START_TIMEOUT_S)
            pipe.send(count * activity.amount / harness.alone_s(activity, count))
    except EOFError:
        return  # no more orders
    except Exception as error:  # noqa: BLE001  whatever it is, the caller shall know
        pipe.send(f"{type(error).__name__}: {error}")
