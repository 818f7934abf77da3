"""What a change of phase costs under MemoryMonitor, so that one can decide to leave it on.

    python bench/monitor.py [--device sim|cuda|cpu] [--changes 2000] [--live-tensors 200]

Prints the median and the 99th percentile in microseconds, with and without the slow meters (NVML, RSS).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from offload.monitor import MemoryMonitor, Phase


def change_times_us(monitor: MemoryMonitor, num_changes: int) -> list[float]:
    """Microseconds that each ``enter`` takes, going round the phases."""
    phases = list(Phase)
    times_us = []
    for change in range(num_changes):
        phase = phases[(change + 1) % len(phases)]
        start_ns = time.perf_counter_ns()
        monitor.enter(phase)
        times_us.append((time.perf_counter_ns() - start_ns) / 1e3)
    return times_us


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="torch device to follow; 'sim' loads the emulated one")
    parser.add_argument("--changes", type=int, default=2000)
    parser.add_argument("--live-tensors", type=int, default=200, help="tensors allocated on the device meanwhile")
    arguments = parser.parse_args()
    if arguments.device == "sim":
        from offload.testing import sim

        sim.load()
    tensors = [torch.empty(1024, device=arguments.device) for _ in range(arguments.live_tensors)]
    print(f"device {arguments.device}, {len(tensors)} live tensors, torch {torch.__version__}")
    for label, interval_s in (("allocator only", 3600.0), ("every meter at each change", 0.0)):
        monitor = MemoryMonitor(arguments.device, min_interval_s=interval_s)
        change_times_us(monitor, len(Phase))  # reads each phase's meters once
        times_us = sorted(change_times_us(monitor, arguments.changes))
        median_us, p99_us = statistics.median(times_us), times_us[len(times_us) * 99 // 100]
        print(f"{label:<28} median {median_us:7.1f} us   p99 {p99_us:7.1f} us")


if __name__ == "__main__":
    main()
