"""Cases of copies: over sizes, both ways at once, on several streams, many small against one large."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from offload.interconnect.buffers import Pair
from offload.interconnect.harness import Activity, Harness, Timing
from offload.interconnect.results import Result
from offload.interconnect.settings import Settings

WRONG = "what arrived is not what was sent"
NOT_HELD = "the streams ran before all was enqueued: the time holds launches too"

# source, target, whether the host's side is pinned
_KINDS = (
    ("pinned", "device", True),
    ("device", "pinned", True),
    ("pageable", "device", False),
    ("device", "pageable", False),
)


def rate_result(
    group: str,
    names: tuple[str, str, str],
    timings: list[Timing],
    amount: float,
    unit: str,
    *,
    num_bytes: int | None = None,
    details: dict[str, float] | None = None,
    problem: str = "",
) -> Result:
    """The rate of the first activity of ``timings``, which did ``amount`` in each."""
    rates = sorted(amount / timing.duration_s(0) for timing in timings)
    low, _, high = quartiles(rates)
    source, target, mode = names
    return Result(
        group, source, target, mode, statistics.median(rates), unit, low, high, num_bytes, details or {}, problem
    )


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Of one value or more."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def copies_alone(harness: Harness, settings: Settings) -> Iterator[Result]:
    """Each direction, from pinned and from pageable memory, over all sizes."""
    for source, target, pinned in _KINDS:
        make = Pair.up if target == "device" else Pair.down
        whole = make(harness.accelerator, max(settings.sizes), pinned=pinned)
        for num_bytes in settings.sizes:
            pair = whole.part(num_bytes)
            pair.clear()
            # A copy of pageable memory makes the host wait, so nothing can be enqueued before the release.
            timings = harness.time((pair.copy("copy"), 1), gated=pinned)
            problem = "" if pair.arrived() else WRONG
            if pinned and not all(timing.was_held for timing in timings):
                problem = problem or NOT_HELD
            yield rate_result(
                "copy", (source, target, "alone"), timings, num_bytes, "bytes/s", num_bytes=num_bytes,
                details={"seconds": statistics.median(t.duration_s(0) for t in timings)}, problem=problem,
            )  # fmt: skip


def both_ways(harness: Harness, settings: Settings) -> Iterator[Result]:
    """Each direction while copies the other way outlast it."""
    up, down = (make(harness.accelerator, settings.copy_bytes) for make in (Pair.up, Pair.down))
    for (source, target, pair), other in (
        (("pinned", "device", up), down),
        (("device", "pinned", down), up),
    ):
        copy, opposite = pair.copy("copy"), other.copy("opposite copy")
        count = harness.pieces(copy, settings.piece_s)
        alone_s = harness.alone_s(copy, count)
        pair.clear()
        timings = harness.outlasted((copy, count), (opposite, harness.pieces(opposite, 1.5 * alone_s)))
        kept = alone_s / statistics.median(timing.duration_s(0) for timing in timings)
        yield rate_result(
            "duplex", (source, target, "while the other way is busy"), timings, count * copy.amount, "bytes/s",
            num_bytes=settings.copy_bytes, details={"share_of_alone": kept},
            problem="" if pair.arrived() else WRONG,
        )  # fmt: skip


def several_streams(harness: Harness, settings: Settings) -> Iterator[Result]:
    """The same bytes cut evenly over so many streams."""
    for make, source, target in ((Pair.up, "pinned", "device"), (Pair.down, "device", "pinned")):
        whole = make(harness.accelerator, settings.copy_bytes)
        for num_streams in settings.num_streams:
            part_bytes = settings.copy_bytes // num_streams
            whole.clear()
            parts = [whole.part(part_bytes, i * part_bytes) for i in range(num_streams)]
            timings = harness.time(*((part.copy(f"stream {i}"), 1) for i, part in enumerate(parts)))
            rates = sorted(num_streams * part_bytes / timing.total_s for timing in timings)
            low, middle, high = quartiles(rates)
            problem = "" if all(part.arrived() for part in parts) else WRONG
            yield Result(
                "streams", source, target, f"on {num_streams} streams", middle, "bytes/s", low, high, part_bytes,
                problem=problem,
            )  # fmt: skip


def small_and_large(harness: Harness, settings: Settings) -> Iterator[Result]:
    """The same bytes in many small copies on one stream, and in one."""
    for make, source, target in ((Pair.up, "pinned", "device"), (Pair.down, "device", "pinned")):
        part_bytes = settings.copy_bytes // settings.num_small
        whole = make(harness.accelerator, part_bytes * settings.num_small)
        parts = [whole.part(part_bytes, i * part_bytes) for i in range(settings.num_small)]

        def copy_parts(parts: list[Pair] = parts) -> None:
            for part in parts:
                part.target.copy_(part.source, non_blocking=True)

        large_s = harness.alone_s(whole.copy("one copy"))
        whole.clear()
        timings = harness.time((Activity("small copies", copy_parts, whole.source.numel(), "bytes/s"), 1))
        small_s = statistics.median(timing.duration_s(0) for timing in timings)
        problem = "" if whole.arrived() else WRONG
        yield rate_result(
            "batch", (source, target, f"in {settings.num_small} copies"), timings, whole.source.numel(), "bytes/s",
            num_bytes=part_bytes, details={"share_of_one_copy": large_s / small_s}, problem=problem,
        )  # fmt: skip


def fit_line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """(seconds of latency, bytes/s) of the line ``latency + bytes / rate`` nearest to (bytes, seconds), relatively.

    Relative errors count, so that small copies tell the latency and large ones the rate.
    """
    if len(points) == 1:
        return 0.0, points[0][0] / points[0][1]
    # Minimise the sum of ((a + b x) / y - 1)**2: least squares with weights 1 / y**2.
    s0 = sum(1 / y**2 for _, y in points)
    sx = sum(x / y**2 for x, y in points)
    sxx = sum((x / y) ** 2 for x, y in points)
    sy, sxy = sum(1 / y for _, y in points), sum(x / y for x, y in points)
    per_byte = (s0 * sxy - sx * sy) / (s0 * sxx - sx**2)
    if per_byte <= 0:  # latency hides all else: take the largest copy's rate
        x, y = max(points)
        return 0.0, x / y
    return max(0.0, (sy - per_byte * sx) / s0), 1 / per_byte
