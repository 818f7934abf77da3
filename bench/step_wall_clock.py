"""Steps in wall-clock beside the same steps in virtual time: does the virtual clock tell the truth about overlap?

    python -m bench.step_wall_clock

One program runs on both clocks: layers whose forward and backward are *played*, by sleeping in wall-clock and by
charging the clock in virtual time, so that the processors are free for the update. Gradients, transfers and CPU updates
are real. The virtual clock is told three rates of this machine, each the mean of what was measured right before and
right after a case: of CPU updates; of the emulated device's own kernels, which the processors run (norms of gradients,
the gradients themselves); and of host memory, by what updates touch with a thread on each processor and nothing beside
them. Updates and copies share that, and a copied byte is read and written, as the device's memory is the host's. Links
are slow enough for :data:`LINK_BYTES_PER_S` to be what they really do. All updates run on the CPU, by one thread:
copies take a processor here, which they would not on a machine whose link has engines of its own.

Forward takes as long as the update, or half of it, so that some steps hide all of the update and others do not.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import offload
from offload._table import format_table
from offload.gradients import total_norm
from offload.kernels import num_threads, set_num_threads
from offload.plan import Placement, lower
from offload.policy import Overlap

NUM_LAYERS, LAYER_NUMEL = 12, 2**22  # so large that a step's Python is small beside it
LINK_BYTES_PER_S = 2e9
UPDATE_BYTES = 32  # of host memory a parameter: fp32 state both ways, gradient, new parameter
WARM_UP, MEASURED = 2, 5  # steps
RATE_WARM_UP, RATE_MEASURED = 1, 3
WINDOWS = (1.0, 0.5)  # forward, in updates; backward is twice as long
OVERLAPS: tuple[Overlap, ...] = ("none", "backward", "next_forward")

Play = Callable[[float], None]


class Played(torch.autograd.Function):
    """A layer whose device work takes the seconds that it is told, once its parameter is there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, play: Play, forward_s: float) -> Tensor:
        ctx.numel, ctx.play, ctx.backward_s = weight.numel(), play, 2 * forward_s
        used = x * weight[0]
        torch.accelerator.current_stream().synchronize()
        play(forward_s)
        return used

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        ctx.play(ctx.backward_s)
        return grad, torch.full((ctx.numel,), 1e-3, dtype=grad.dtype, device=grad.device), None, None


@dataclass(frozen=True)
class Comparison:
    """Seconds of a step, and the rates that the virtual clock was told."""

    overlap: str
    window: float
    update_params_per_s: float
    device_bytes_per_s: float
    host_dram_bytes_per_s: float
    wall_s: float
    virtual_s: float

    @property
    def ratio(self) -> float:
        return self.wall_s / self.virtual_s


@dataclass(frozen=True)
class WallClock:
    """``ratio`` is the one furthest from 1."""

    ratio: float
    comparisons: tuple[Comparison, ...]


def _optimizer(weights: list[nn.Parameter], overlap: Overlap) -> offload.AdamW:
    plan = lower([Placement.HOST] * NUM_LAYERS, num_slots=0, num_staging=NUM_LAYERS)
    return offload.AdamW(weights, plan=plan, overlap=overlap, subgroup_numel=LAYER_NUMEL)


def _step_s(
    weights: list[nn.Parameter], overlap: Overlap, forward_s: float, play: Play, now: Callable[[], float]
) -> float:
    """Median seconds of a step."""
    optimizer = _optimizer(weights, overlap)
    stamps = []
    for _ in range(WARM_UP + MEASURED + 1):
        x = torch.ones((), device="sim", requires_grad=True)
        for weight in weights:
            x = Played.apply(x, weight, play, forward_s / NUM_LAYERS)
        x.backward()  # type: ignore[no-untyped-call]
        torch.accelerator.current_stream().synchronize()
        stamps.append(now())
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.synchronize()
    return statistics.median(b - a for a, b in zip(stamps[WARM_UP:], stamps[WARM_UP + 1 :], strict=False))


def _update_rate(weights: list[nn.Parameter], threads: int | None) -> float:
    """Parameters/s of this machine's CPU updates, one subgroup after the other; None: a thread on each processor."""
    from offload.testing import sim

    sim.configure("sync", races=False, poison=False)
    set_num_threads(threads)
    optimizer = _optimizer(weights, "none")
    seconds = []
    for _ in range(RATE_WARM_UP + RATE_MEASURED):
        for weight in weights:
            weight.grad = torch.full_like(weight, 1e-3)
        optimizer.time_next_step()
        optimizer.step()
        seconds.append(sum(span.end_s - span.start_s for span in optimizer.timeline() if span.lane == "host"))
    set_num_threads(1)
    return NUM_LAYERS * LAYER_NUMEL / statistics.median(seconds[RATE_WARM_UP:])


def _device_rate(weights: list[nn.Parameter]) -> float:
    """Bytes/s of the emulated device's kernels in wall-clock, by the two norms that each step takes of gradients."""
    from offload.testing import sim

    sim.configure("threads", races=False, poison=False)
    grads, seconds = [weight.detach() for weight in weights], []
    for _ in range(RATE_WARM_UP + RATE_MEASURED):
        begin_s = time.perf_counter()
        for norm_type in (2.0, float("inf")):
            float(total_norm(grads, norm_type))
        seconds.append(time.perf_counter() - begin_s)
    return 2 * sum(grad.nbytes for grad in grads) / statistics.median(seconds[RATE_WARM_UP:])


def _rates(weights: list[nn.Parameter]) -> dict[str, float]:
    """What the virtual clock is told of this machine, as it is now."""
    from offload.testing import sim

    sim.set_profile(host_update_params_per_s=math.inf, host_dram_bytes_per_s=math.inf)  # updates take what they take
    rate = _update_rate(weights, 1)
    return {
        "host_update_params_per_s": rate,
        "memory_bytes_per_s": _device_rate(weights),
        "host_dram_bytes_per_s": max(rate, _update_rate(weights, None)) * UPDATE_BYTES,
    }


def _compare(weights: list[nn.Parameter], overlap: Overlap, window: float) -> Comparison:
    from offload.testing import sim

    def charge(seconds: float) -> None:
        sim.host_charge(seconds, "model")

    before = _rates(weights)
    forward_s = window * NUM_LAYERS * LAYER_NUMEL / before["host_update_params_per_s"]
    sim.configure("threads", races=False, poison=False)
    wall_s = _step_s(weights, overlap, forward_s, time.sleep, time.perf_counter)
    gc.collect()
    after = _rates(weights)
    rates = {name: statistics.fmean((before[name], after[name])) for name in before}
    sim.configure("sync", races=False, poison=False)
    sim.set_profile(**rates)
    virtual_s = _step_s(weights, overlap, forward_s, charge, sim.host_time_s)
    gc.collect()
    return Comparison(overlap, window, *rates.values(), wall_s, virtual_s)


def wall_vs_virtual() -> WallClock:
    """Measure. Wants a machine that does nothing else."""
    from offload.testing import sim

    threads_before = num_threads()
    set_num_threads(1)
    try:
        sim.load()
        sim.reset()
        sim.set_profile(
            h2d_bytes_per_s=LINK_BYTES_PER_S,
            d2h_bytes_per_s=LINK_BYTES_PER_S,
            host_bytes_per_h2d_byte=2.0,
            host_bytes_per_d2h_byte=2.0,
        )
        weights = [nn.Parameter(torch.ones(LAYER_NUMEL, device="sim")) for _ in range(NUM_LAYERS)]
        comparisons = tuple(_compare(weights, overlap, window) for window in WINDOWS for overlap in OVERLAPS)
    finally:
        set_num_threads(threads_before)
    worst = max((each.ratio for each in comparisons), key=lambda ratio: abs(ratio - 1))
    return WallClock(worst, comparisons)


def show(measured: WallClock) -> None:
    cells = [
        [
            "overlap",
            "forward in updates",
            "CPU updates",
            "device kernels",
            "host memory",
            "wall-clock",
            "virtual",
            "ratio",
        ]
    ]
    for each in measured.comparisons:
        told = [f"{each.update_params_per_s / 1e9:.3f} G/s", f"{each.device_bytes_per_s / 1e9:.2f} GB/s"]
        told.append(f"{each.host_dram_bytes_per_s / 1e9:.1f} GB/s")
        times = [f"{each.wall_s * 1e3:.1f} ms", f"{each.virtual_s * 1e3:.1f} ms", f"{each.ratio:.3f}"]
        cells.append([each.overlap, f"{each.window:g}", *told, *times])
    print(format_table(cells))


if __name__ == "__main__":
    show(wall_vs_virtual())
