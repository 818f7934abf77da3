"""Gradients, states and parameters on their way between host and device."""

from __future__ import annotations

from types import ModuleType

import torch

from tests.known_bugs.catalogue import known_bug

NUMEL = 1024


@known_bug("gradient buffers of ZeRO-Offload and its descendants", says="aten::fill_.Scalar writes on stream 0")
def gradient_buffer_reused_before_its_copy_ended(sim: ModuleType, has_bug: bool) -> None:
    """Backward writes the next bucket's gradients where the last ones are still being copied from."""
    bucket = torch.zeros(NUMEL, device="sim")
    host = torch.empty(2, NUMEL, pin_memory=True)
    compute, d2h = torch.accelerator.current_stream(), torch.Stream("sim")
    for i in range(2):
        bucket.fill_(float(i))
        d2h.wait_stream(compute)
        with d2h:
            host[i].copy_(bucket, non_blocking=True)
        if not has_bug:
            compute.wait_stream(d2h)


@known_bug("torch.optim offloaders that flush on a stream of their own", says="d2h reads")
def state_flushed_before_its_update(sim: ModuleType, has_bug: bool) -> None:
    state = torch.zeros(NUMEL, device="sim")
    host = torch.empty(NUMEL, pin_memory=True)
    d2h = torch.Stream("sim")
    d2h.wait_stream(torch.accelerator.current_stream())
    state.add_(1)
    if not has_bug:
        d2h.wait_stream(torch.accelerator.current_stream())
    with d2h:
        host.copy_(state, non_blocking=True)
    state.record_stream(d2h)


@known_bug("update hidden under the next forward", says="h2d writes")
def parameters_uploaded_while_forward_reads_them(sim: ModuleType, has_bug: bool) -> None:
    param = torch.zeros(NUMEL, device="sim")
    updated = torch.ones(NUMEL, pin_memory=True)
    h2d = torch.Stream("sim")
    h2d.wait_stream(torch.accelerator.current_stream())
    loss = (param * 2).sum()
    if not has_bug:
        h2d.wait_stream(torch.accelerator.current_stream())
    with h2d:
        param.copy_(updated, non_blocking=True)
    torch.accelerator.current_stream().wait_stream(h2d)
    del loss


@known_bug("one event for both directions", says="aten::add.out writes on stream 0")
def waits_for_the_wrong_stream(sim: ModuleType, has_bug: bool) -> None:
    """A slot is filled by one copy stream, but the wait is for the other."""
    slot = torch.zeros(NUMEL, device="sim")
    layer = torch.ones(NUMEL, pin_memory=True)
    compute, h2d, d2h = torch.accelerator.current_stream(), torch.Stream("sim"), torch.Stream("sim")
    h2d.wait_stream(compute)
    with h2d:
        slot.copy_(layer, non_blocking=True)
    compute.wait_stream(d2h if has_bug else h2d)
    slot.add_(1)


@known_bug("vLLM prefetch: a pageable source serialises", says="h2d of 4096 bytes blocks although it was asked not to")
def copy_from_pageable_memory(sim: ModuleType, has_bug: bool) -> None:
    layer = torch.ones(NUMEL, pin_memory=not has_bug)
    torch.empty(NUMEL, device="sim").copy_(layer, non_blocking=True)


@known_bug("prime-rl #3258: 587 synchronisations a step", says=".item()")
def value_read_in_the_step(sim: ModuleType, has_bug: bool) -> None:
    step = torch.zeros((), device="sim")
    with sim.forbid_sync():
        step += 1
        correction = 1 - 0.9 ** (step.item() if has_bug else step)
        torch.ones(NUMEL, device="sim") / correction
