"""How long ``import offload`` takes after ``import torch``, in fresh interpreters: ``python bench/import_time.py``."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

NUM_RUNS = 7
TIMED = """
import time
start_s = time.perf_counter()
import torch
torch_s = time.perf_counter()
import offload
print(torch_s - start_s, time.perf_counter() - torch_s)
"""


def import_seconds() -> tuple[float, float]:
    """Seconds for torch, and for offload after it."""
    # As for a user: with bytecode kept from one start to the next.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", TIMED]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    torch_s, offload_s = map(float, output.split())
    return torch_s, offload_s


def main() -> None:
    import_seconds()  # compiles the bytecode and fills the page cache
    runs = [import_seconds() for _ in range(NUM_RUNS)]
    for name, seconds in zip(("torch", "offload"), zip(*runs, strict=True), strict=True):
        median_s, least_s, most_s = statistics.median(seconds), min(seconds), max(seconds)
        print(f"import {name}: {median_s:.3f} s, median of {NUM_RUNS} ({least_s:.3f} … {most_s:.3f})")


if __name__ == "__main__":
    main()
