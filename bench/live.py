"""What writing the status for ``offload watch`` costs a training step.

    python -m bench.live [--device sim|cuda|cpu] [--numel 4194304] [--steps 200]

Steps with and without the status take turns within each pair, so that a disturbance of the machine meets both. Prints
medians and the share that the status adds; with steps shorter than half a second, most of them write nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import offload


def make(device: str, numel: int) -> tuple[offload.AdamW, list[torch.nn.Parameter]]:
    params = [torch.nn.Parameter(torch.zeros(numel // 4, device=device)) for _ in range(4)]
    for param in params:
        param.grad = torch.zeros_like(param)
    return offload.AdamW(params, plan="host"), params


def step_s(optimizer: offload.AdamW) -> float:
    start_s = time.perf_counter()
    optimizer.step()
    optimizer.synchronize()
    return time.perf_counter() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="'sim' loads the emulated one")
    parser.add_argument("--numel", type=int, default=1 << 22, help="parameters of the model")
    parser.add_argument("--steps", type=int, default=200, help="pairs of steps")
    arguments = parser.parse_args()
    if arguments.device == "sim":
        from offload.testing import sim

        sim.load()
    plain, _ = make(arguments.device, arguments.numel)
    watched, _ = make(arguments.device, arguments.numel)
    with tempfile.TemporaryDirectory() as folder:
        status = offload.LiveStatus(watched, Path(folder) / "status.json")
        times_s = [(step_s(plain), step_s(watched)) for _ in range(arguments.steps)][1:]
        status.close()
    plain_s, watched_s = (sum(column) for column in zip(*times_s, strict=True))
    medians = [statistics.median(column) * 1e3 for column in zip(*times_s, strict=True)]
    print(f"device {arguments.device}, {arguments.numel:,} parameters, {len(times_s)} pairs of steps")
    print(f"without {medians[0]:.3f} ms, with {medians[1]:.3f} ms in the median; {watched_s / plain_s - 1:+.2%} in all")


if __name__ == "__main__":
    main()
