"""Memory that is given back, or shared, too early; and streams that are not what they seem."""

from __future__ import annotations

from types import ModuleType

import torch

from tests.known_bugs.catalogue import known_bug

NUMEL = 1024


@known_bug("diffusers group offload without record_stream", says="record_stream is missing")
def record_stream_missing(sim: ModuleType, has_bug: bool) -> None:
    """A layer is freed while another stream still computes with it, and the next one is copied to where it was."""
    copy, compute = torch.Stream("sim"), torch.accelerator.current_stream()
    for layer in (torch.ones(NUMEL, pin_memory=True), torch.zeros(NUMEL, pin_memory=True)):
        with copy:
            weight = torch.empty(NUMEL, device="sim")
            weight.copy_(layer, non_blocking=True)
        compute.wait_stream(copy)
        weight * 2
        if not has_bug:
            weight.record_stream(compute)
        del weight


@known_bug("the same mistake for temporaries", says="record_stream is missing")
def temporary_of_another_stream_freed(sim: ModuleType, has_bug: bool) -> None:
    """A cast made for a copy dies before the copy has run, and the next cast takes its place."""
    d2h, compute = torch.Stream("sim"), torch.accelerator.current_stream()
    for numel in (NUMEL, NUMEL // 2):
        host = torch.empty(numel, pin_memory=True)
        upcast = torch.ones(numel, dtype=torch.bfloat16, device="sim").float()
        d2h.wait_stream(compute)
        with d2h:
            host.copy_(upcast, non_blocking=True)
        if not has_bug:
            upcast.record_stream(d2h)
        del upcast


@known_bug("FSDP's storage.resize_(0) of gathered parameters", says="use after free")
def parameter_used_after_its_storage_was_freed(sim: ModuleType, has_bug: bool) -> None:
    param = torch.ones(NUMEL, device="sim")
    shard = torch.ones(NUMEL, device="sim")
    param.untyped_storage().resize_(0)
    if not has_bug:
        param.untyped_storage().resize_(param.nbytes)
        param.copy_(shard)
    param * 2


@known_bug("a stream for each layer", says="more than 32 streams")
def more_streams_than_the_device_has(sim: ModuleType, has_bug: bool) -> None:
    """Streams come from a pool of 32; the next is one of them again, and waits for its work."""
    streams = [torch.Stream("sim") for _ in range(40 if has_bug else 32)]
    for stream in streams:
        stream.wait_stream(torch.accelerator.current_stream())
