"""Host memory that copies and the CPU use by turns."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import torch

from tests.known_bugs.catalogue import known_bug

NUMEL = 1024


@known_bug("staging buffers of ZeRO-Offload and block swappers", says="cast to bf16 writes on the host")
def staging_buffer_refilled_before_its_copy_ended(sim: ModuleType, has_bug: bool) -> None:
    staging = torch.empty(NUMEL, pin_memory=True)
    params = torch.empty(2, NUMEL, device="sim")
    for i in range(2):
        sim.host_access(staging, True, "cast to bf16")
        staging.fill_(float(i))
        params[i].copy_(staging, non_blocking=True)
        if not has_bug:
            torch.accelerator.current_stream().synchronize()


@known_bug('the same mistake for every .to("cpu", non_blocking=True)', says="log the loss reads on the host")
def result_read_before_it_arrived(sim: ModuleType, has_bug: bool) -> None:
    host = torch.empty(NUMEL, pin_memory=True)
    host.copy_(torch.ones(NUMEL, device="sim"), non_blocking=True)
    if not has_bug:
        torch.accelerator.current_stream().synchronize()
    sim.host_access(host, False, "log the loss")


@known_bug("checkpoints taken while states are in flight", says="state_dict reads on the host")
def checkpoint_before_the_flush(sim: ModuleType, has_bug: bool) -> None:
    """The host waits for the stream that computes, not for the one that copies."""
    state, host = torch.ones(NUMEL, device="sim"), torch.empty(NUMEL, pin_memory=True)
    compute, d2h = torch.accelerator.current_stream(), torch.Stream("sim")
    d2h.wait_stream(compute)
    with d2h:
        host.copy_(state, non_blocking=True)
    (compute if has_bug else d2h).synchronize()
    sim.host_access(host, False, "state_dict")


@known_bug("CPU updates in a worker thread", says="unordered after CPU update writes on the host")
def upload_before_the_worker_has_updated(sim: ModuleType, has_bug: bool) -> None:
    """The main thread enqueues the upload without a look at the worker's future."""
    state, device = torch.zeros(NUMEL, pin_memory=True), torch.empty(NUMEL, device="sim")

    def update(after: object) -> object:
        sim.own_host_clock()
        sim.host_join(after)
        sim.host_access(state, True, "CPU update")
        return sim.host_mark()

    with ThreadPoolExecutor(1) as worker:
        updated = worker.submit(update, sim.host_mark())
        mark = updated.result()
    if not has_bug:
        sim.host_join(mark)
    device.copy_(state, non_blocking=True)
