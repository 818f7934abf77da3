"""What it costs to allocate, to pin, to launch and to wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from offload.accelerators import Accelerator
from offload.interconnect.copies import quartiles
from offload.interconnect.harness import Harness
from offload.interconnect.results import Result
from offload.interconnect.settings import Settings

_NUM_LAUNCHES = 64


def costs(harness: Harness, settings: Settings) -> Iterator[Result]:
    """Seconds of the calling thread, by the clock that the device sees its host with."""
    accelerator, repeats, num_bytes = harness.accelerator, harness.repeats, settings.pin_bytes
    device = accelerator.device
    one, stream = torch.zeros(1, device=device), torch.Stream(device)

    def launch() -> None:
        for _ in range(_NUM_LAUNCHES):
            one.add_(1)

    def record_and_wait() -> None:
        stream.record_event().synchronize()

    def cross() -> None:
        stream.wait_event(torch.accelerator.current_stream(device).record_event())

    # Real work of the host, which a virtual clock does not see, and what the device's own clock counts.
    yield _cost(
        "host", "pinned", "pin", repeats, lambda: accelerator.pinned_empty(num_bytes), time.perf_counter, num_bytes
    )
    yield _cost(
        "host", "pageable", "allocate and touch", repeats, lambda: _touched(num_bytes), time.perf_counter, num_bytes
    )
    yield _cost(
        "host", "device", "allocate", repeats, lambda: _on_device(accelerator, num_bytes), time.perf_counter, num_bytes
    )
    clock = accelerator.host_time_s
    yield _cost("host", "device", "launch", repeats, launch, clock, pieces=_NUM_LAUNCHES)
    yield _cost("device", "host", "record an event and wait", repeats, record_and_wait, clock)
    yield _cost("stream", "stream", "record an event and let a stream wait", repeats, cross, clock)


def _touched(num_bytes: int) -> None:
    torch.empty(num_bytes, dtype=torch.uint8).zero_()


def _on_device(accelerator: Accelerator, num_bytes: int) -> None:
    """Anew from the device: torch's allocator would give back what it had a moment ago."""
    torch.accelerator.empty_cache()
    torch.empty(num_bytes, dtype=torch.uint8, device=accelerator.device)


def _cost(
    source: str,
    target: str,
    mode: str,
    repeats: int,
    run: Callable[[], object],
    clock: Callable[[], float],
    num_bytes: int | None = None,
    pieces: int = 1,
) -> Result:
    """Seconds of one piece of ``run``, after one run that does not count; the device is idle before each."""
    times_s = []
    for _ in range(repeats + 1):
        torch.accelerator.synchronize()
        start_s = clock()
        run()
        times_s.append((clock() - start_s) / pieces)
    low, middle, high = quartiles(sorted(times_s[1:]))
    return Result("cost", source, target, mode, middle, "s", low, high, num_bytes)
