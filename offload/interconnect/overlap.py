"""How much two kinds of work slow each other: copies, accelerator compute and the CPU update, in pairs and all at once.

Two figures say it. *Rate kept*: what work keeps of its own rate while the other outlasts it. *Overlap*: of equally long
pieces started together, how much of the time that could be hidden was: 1 where they take as long as the longer one
alone, 0 where they take as long as one after the other. What is not hidden is the *exposed* time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, permutations

import torch

from offload.accelerators import Accelerator
from offload.interconnect.buffers import Pair
from offload.interconnect.copies import WRONG, quartiles, rate_result
from offload.interconnect.harness import Activity, Harness
from offload.interconnect.results import Result
from offload.interconnect.settings import Settings
from offload.kernels import AdamScalars, adam_step

UP, DOWN, UPDATE, MATMUL, ELEMENTWISE = "copy up", "copy down", "CPU update", "matmul", "elementwise"
ACTIVITIES = (UP, DOWN, UPDATE, MATMUL, ELEMENTWISE)
_LEAST_WIDTH = 64
_LONGER = 1.5  # times the measured work that interfering work is aimed at

# More than two at once: copies both ways with what an interleaved update runs beside them.
_CROWDS = (
    (UP, DOWN, MATMUL),
    (UP, DOWN, ELEMENTWISE),
    (UP, DOWN, UPDATE),
    (UPDATE, MATMUL, UP, DOWN),
)

# What an interleaved update does, measured while copies go both ways; and a copy beside all else on the device.
_UNDER_BOTH = ((UPDATE, UP, DOWN), (MATMUL, UP, DOWN), (UP, DOWN, MATMUL))

# Where work happens, for the names of cases.
_PLACES = {
    UP: ("pinned", "device"),
    DOWN: ("device", "pinned"),
    UPDATE: ("host", "host"),
    MATMUL: ("device", "device"),
    ELEMENTWISE: ("device", "device"),
}

SCALARS = AdamScalars.at_step(
    step=1, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=True, grad_scale=1.0
)


def cpu_update(numel: int, *, num_threads: int | None = None) -> Callable[[], None]:
    """One fused update of ``numel`` parameters with bfloat16 gradients, in memory touched by the calling thread."""
    master, exp_avg, exp_avg_sq = (torch.zeros(numel) for _ in range(3))
    grad, param = (torch.zeros(numel, dtype=torch.bfloat16) for _ in range(2))
    return lambda: adam_step(master, exp_avg, exp_avg_sq, grad, param, scalars=SCALARS, num_threads=num_threads)


class Workload:
    """The five kinds of work, with buffers of their own each."""

    def __init__(self, harness: Harness, settings: Settings) -> None:
        accelerator = harness.accelerator
        self.up, self.down = (make(accelerator, settings.copy_bytes) for make in (Pair.up, Pair.down))
        x = torch.zeros(settings.copy_bytes // 4, device=accelerator.device)
        self.activities = {
            UP: self.up.copy(UP),
            DOWN: self.down.copy(DOWN),
            UPDATE: Activity(
                UPDATE, cpu_update(settings.update_numel), settings.update_numel, "parameters/s", on_host=True
            ),
            MATMUL: _matmul_of(harness, settings),
            ELEMENTWISE: Activity(ELEMENTWISE, lambda: x.add_(1.0), 2.0 * x.nbytes, "bytes/s"),
        }

    def clear(self) -> None:
        self.up.clear()
        self.down.clear()

    def problem(self, names: Sequence[str]) -> str:
        pairs = {UP: self.up, DOWN: self.down}
        return "" if all(pairs[name].arrived() for name in names if name in pairs) else WRONG


def _matmul_of(harness: Harness, settings: Settings) -> Activity:
    """The largest matrix product that takes no longer than other pieces, so that pieces can be made equally long."""
    width = settings.matmul_width
    while True:
        activity = _matmul(harness.accelerator, width)
        if width <= _LEAST_WIDTH or harness.alone_s(activity) <= settings.piece_s / 4:
            return activity
        width //= 2


def _matmul(accelerator: Accelerator, width: int) -> Activity:
    a, product = (torch.zeros(width, width, dtype=torch.bfloat16, device=accelerator.device) for _ in range(2))
    return Activity(MATMUL, lambda: torch.mm(a, a, out=product), 2.0 * width**3, "FLOP/s")


def overlaps(harness: Harness, settings: Settings) -> Iterator[Result]:
    """Every kind of work alone and beside each other one, then the overlap of pairs and of more at once."""
    work = Workload(harness, settings)
    counts = {name: harness.pieces(activity, settings.piece_s) for name, activity in work.activities.items()}
    alone_s = {}
    for name, activity in work.activities.items():
        timings = harness.time((activity, counts[name]))
        alone_s[name] = statistics.median(timing.duration_s(0) for timing in timings)
        group = "update" if name == UPDATE else "overlap"
        amount = counts[name] * activity.amount
        yield rate_result(group, (*_PLACES[name], f"{name} alone"), timings, amount, activity.unit)
    for measured, *others in (*permutations(ACTIVITIES, 2), *_UNDER_BOTH):
        if {measured, *others} != {MATMUL, ELEMENTWISE}:  # which no offloading runtime overlaps
            yield _beside(harness, work, measured, others, counts, alone_s)
    for crowd in (*combinations(ACTIVITIES, 2), *_CROWDS):
        if set(crowd) != {MATMUL, ELEMENTWISE}:
            yield _together(harness, work, crowd, counts, alone_s)


def _beside(
    harness: Harness,
    work: Workload,
    measured: str,
    others: Sequence[str],
    counts: dict[str, int],
    alone_s: dict[str, float],
) -> Result:
    """What ``measured`` keeps of its rate while each of ``others`` outlasts it."""
    activity, count = work.activities[measured], counts[measured]
    beside = [
        (work.activities[name], max(1, round(_LONGER * counts[name] * alone_s[measured] / alone_s[name] + 0.5)))
        for name in others
    ]
    work.clear()
    timings = harness.outlasted((activity, count), *beside)
    kept = [alone_s[measured] / timing.duration_s(0) for timing in timings]
    return rate_result(
        "overlap", (*_PLACES[measured], f"{measured} under {' and '.join(others)}"), timings, count * activity.amount,
        activity.unit, details={"rate_kept": statistics.median(kept)}, problem=work.problem((measured, *others)),
    )  # fmt: skip


def _together(
    harness: Harness, work: Workload, crowd: Sequence[str], counts: dict[str, int], alone_s: dict[str, float]
) -> Result:
    """Pieces of about the same length, started together: what of the time that could be hidden was."""
    work.clear()
    timings = harness.time(*((work.activities[name], counts[name]) for name in crowd))
    serial_s, ideal_s = sum(alone_s[name] for name in crowd), max(alone_s[name] for name in crowd)
    totals = [timing.total_s for timing in timings]
    low, middle, high = quartiles([overlap_share(total_s, serial_s, ideal_s) for total_s in totals])
    total_s = statistics.median(totals)
    return Result(
        "overlap", "all", "all", " with ".join(crowd), middle, "share", low, high,
        details={
            "total_s": total_s, "ideal_s": ideal_s, "serial_s": serial_s, "exposed_s": max(0.0, total_s - ideal_s),
        },
        problem=work.problem(crowd),
    )  # fmt: skip


def overlap_share(total_s: float, serial_s: float, ideal_s: float) -> float:
    """1 where ``total_s`` is the ideal, 0 where it is that of one after the other, below 0 where it is even longer."""
    return min(1.0, (serial_s - total_s) / (serial_s - ideal_s))
