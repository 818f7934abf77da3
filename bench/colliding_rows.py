"""How much longer a step takes when its rows collide in the first-level cache: ``python -m bench.colliding_rows``.

AMD's cores since Zen guess the way of that cache from a hash of the address; see [Note: rows that collide] in
offload/host_memory.py. The same rows are updated at several distances from each other, taking turns, by one thread. On
other processors all distances take the same time.
"""

from __future__ import annotations

import argparse

import torch

from bench.cpu_adam_cases import HYPER, STEP, fastest
from bench.interleaved import Case, take_turns
from offload import host_memory
from offload.kernels import AdamScalars, adam_step

NUMEL = 1 << 21
APART = "2**28 bytes + 64 KiB"  # as offload/host_memory.py does it
DISTANCES = {
    APART: (1 << 28) + (1 << 16),
    "2**26 bytes": 1 << 26,
    "2**27 bytes (two collide)": 1 << 27,
    "2**28 bytes (all collide)": 1 << 28,
    "2**28 + 64 bytes": (1 << 28) + 64,
}


def step_at(memory: torch.Tensor, distance_bytes: int) -> Case:
    """A step on four fp32 rows of ``memory``, each ``distance_bytes`` after the one before it."""
    rows = [memory[i * distance_bytes :][: 4 * NUMEL].view(torch.float32).uniform_() for i in range(4)]
    scalars = AdamScalars.at_step(step=STEP, decoupled=True, **HYPER)
    return lambda: adam_step(*rows, scalars=scalars, implementation=fastest(), num_threads=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=25)
    arguments = parser.parse_args()
    memory = host_memory.empty(3 * max(DISTANCES.values()) + 4 * NUMEL)  # of which little is touched
    times = take_turns({name: step_at(memory, each) for name, each in DISTANCES.items()}, arguments.turns)
    print(f"{'distance of rows':<26}{'ns/param':>9}{'x':>7}   median of {arguments.turns} turns")
    for name, each in times.items():
        print(f"{name:<26}{each.median_s / NUMEL * 1e9:>9.3f}{each.over(times[APART]):>7.2f}")


if __name__ == "__main__":
    main()
