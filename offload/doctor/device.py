"""The accelerator: whether there is one, whether copies overlap, and whether the whole runtime gives the right bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from offload.accelerators import Accelerator, accelerator_for
from offload.doctor.findings import OVERLAPS, RIGHT, RUNS, Finding
from offload.interconnect.buffers import Pair
from offload.interconnect.copies import WRONG
from offload.interconnect.harness import Harness
from offload.interconnect.overlap import overlap_share
from offload.interconnect.results import format_value
from offload.optimizers import AdamW
from offload.plan import Plan
from offload.policy import Policy, Stride
from offload.pool import format_bytes

COPY_BYTES = 16 << 20
PIECE_S = 0.01
LEAST_OVERLAP = 0.5  # below this the link is used in turns
NUMEL, NUM_PARAMS, NUM_STEPS = 5003, 6, 3

NO_ACCELERATOR = Finding(
    "accelerator", "note",
    "none is here. What still works: training on the CPU (the same code and bits), `offload plan` and `simulate` for "
    "machines you need not own, and everything on the emulated device (offload.testing.sim, `--emulated`)",
)  # fmt: skip


def examine_device(device: torch.device) -> list[Finding]:
    """Memory, overlap of copies, and training steps against the CPU's; what raises becomes a line."""
    parts = (("accelerator", _presence), ("overlap", _overlap), ("runtime", _bits))
    return [_try(topic, examine, device) for topic, examine in parts]


def _try(topic: str, examine: Callable[[Accelerator], Finding], device: torch.device) -> Finding:
    try:
        return examine(accelerator_for(device))
    except (RuntimeError, ValueError) as error:
        text = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        is_full = isinstance(error, torch.OutOfMemoryError)
        remedy = "free device memory, and run this again" if is_full else f"make the {topic} test pass: {text}"
        return Finding(topic, "bad", text, remedy, RUNS)


def _presence(accelerator: Accelerator) -> Finding:
    memory = accelerator.memory()
    text = f"{accelerator.name()}, {format_bytes(memory.free_bytes)} of {format_bytes(memory.total_bytes)} free"
    return Finding("accelerator", "good", text)


def _overlap(accelerator: Accelerator) -> Finding:
    """Both directions of the link at once."""
    harness = Harness(accelerator, 3)
    pairs = [make(accelerator, COPY_BYTES) for make in (Pair.up, Pair.down)]
    copies = [pair.copy("copy") for pair in pairs]
    counts = [harness.pieces(copy, PIECE_S) for copy in copies]
    alone_s = [harness.alone_s(copy, count) for copy, count in zip(copies, counts, strict=True)]
    for pair in pairs:
        pair.clear()
    total_s = min(timing.total_s for timing in harness.time(*zip(copies, counts, strict=True)))
    if not all(pair.arrived() for pair in pairs):
        return Finding("overlap", "bad", WRONG, "do not train on this device: its copies are corrupt", RIGHT)
    share = overlap_share(total_s, sum(alone_s), max(alone_s))
    rates = [
        format_value(count * copy.amount / seconds, "bytes/s")
        for copy, count, seconds in zip(copies, counts, alone_s, strict=True)
    ]
    text = f"{rates[0]} up, {rates[1]} down, pinned; both at once overlap by {share:.0%}"
    if share < LEAST_OVERLAP:
        remedy = "copies up and down take turns: look at the link (`offload bench --only duplex`) and other users of it"
        return Finding("overlap", "bad", text, remedy, OVERLAPS)
    return Finding("overlap", "good", text)


def _bits(accelerator: Accelerator) -> Finding:
    """Some steps of the optimizer with every placement, against the same steps with all on the CPU."""
    expected = _train(torch.device("cpu"), "host")
    policies: tuple[Policy, ...] = ("host", "device", Stride(2), Plan.parse("R0 R1 R2 R3 R4 R5"))
    for policy in policies:
        found = _train(accelerator.device, policy)
        if not all(map(torch.equal, found, expected)):
            text = f"training with plan {policy!s} gives other bits than on the CPU"
            return Finding("runtime", "bad", text, "do not train on this device: report this", RIGHT)
    return Finding("runtime", "good", f"{NUM_STEPS} training steps in {len(policies)} plans give the CPU's bits")


def _train(device: torch.device, policy: Policy) -> Sequence[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(NUMEL, generator=generator) for _ in range(NUM_PARAMS)]
    params = [nn.Parameter(value.bfloat16().to(device)) for value in values]
    optimizer = AdamW(params, lr=1e-2, plan=policy, subgroup_numel=NUMEL)
    for _ in range(NUM_STEPS):
        for param, value in zip(params, values, strict=True):
            param.grad = value.flip(0).bfloat16().to(device)
        optimizer.step()
    optimizer.synchronize()
    return [param.detach().cpu() for param in params]
