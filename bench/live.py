"""What writing the status for ``offload watch`` costs a training step.

    python -m bench.live [--device sim|cuda|cpu] [--repeats 300]

Prints the processor time of the hooks around a step that writes nothing and around one that writes, in the median, and
what they come to: every step has the first, at most two steps a second have the second.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import offload
from offload.live import WRITE_INTERVAL_S

NUM_PARAMS, NUMEL = 48, 1 << 12


def cpu_s(run: Callable[[], object], repeats: int) -> float:
    """Median processor time of the calling thread, which a busy machine does not stretch as it does wall-clock."""
    times_s = []
    for _ in range(repeats):
        start_s = time.thread_time()
        run()
        times_s.append(time.thread_time() - start_s)
    return statistics.median(times_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="'sim' loads the emulated one")
    parser.add_argument("--repeats", type=int, default=300)
    arguments = parser.parse_args()
    if arguments.device == "sim":
        from offload.testing import sim

        sim.load()
    params = [torch.nn.Parameter(torch.zeros(NUMEL, device=arguments.device)) for _ in range(NUM_PARAMS)]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer = offload.AdamW(params, plan="host", subgroup_numel=NUMEL)
    optimizer.step()
    now_s = [0.0]
    with tempfile.TemporaryDirectory() as folder:
        status = offload.LiveStatus(optimizer, Path(folder) / "status.json", clock=lambda: now_s[0])

        def around_a_step() -> None:
            status._before(optimizer, (), {})
            status._after(optimizer, (), {})

        def around_a_written_step() -> None:
            now_s[0] += WRITE_INTERVAL_S
            around_a_step()

        silent_s, written_s = cpu_s(around_a_step, arguments.repeats), cpu_s(around_a_written_step, arguments.repeats)
        status.close()
    print(f"device {arguments.device}, {NUM_PARAMS} subgroups, median of {arguments.repeats}")
    print(f"a step that writes nothing: {silent_s * 1e6:.0f} us; one that writes: {written_s * 1e6:.0f} us")
    print(f"writing twice a second takes {2 * written_s:.2%} of the time, besides the first in each step")


if __name__ == "__main__":
    main()
