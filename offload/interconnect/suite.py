"""All microbenchmarks of a device, in order, with what follows from them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from offload.accelerators import Accelerator, accelerator_for
from offload.calibration import UPDATE_HOST_BYTES
from offload.interconnect import copies, costs, overlap, ranks, topology
from offload.interconnect.harness import Harness
from offload.interconnect.results import Report, Result
from offload.interconnect.settings import Settings
from offload.interconnect.step import measure_steps
from offload.perf_model import Rates
from offload.processors import allowed_processors, numa_nodes

Progress = Callable[[str, "Result | None"], None]

# Parts in the order they run, each with what a progress display calls it.
_PARTS: dict[str, tuple[str, Callable[[Harness, Settings], Iterator[Result]]]] = {
    "copy": ("copies over sizes", copies.copies_alone),
    "duplex": ("both directions at once", copies.both_ways),
    "streams": ("several streams", copies.several_streams),
    "batch": ("many small copies", copies.small_and_large),
    "overlap": ("overlap with compute and CPU update", overlap.overlaps),
    "node": ("NUMA nodes", topology.by_node),
    "cores": ("number of cores", topology.by_cores),
    "cost": ("allocation, pinning, launches, events", costs.costs),
}
_LINKS = (
    ("h2d", "pinned", "device"),
    ("d2h", "device", "pinned"),
    ("pageable_h2d", "pageable", "device"),
    ("pageable_d2h", "device", "pageable"),
)
_RANKS, _STEP = "ranks", "step"
PARTS = (*_PARTS, _RANKS, _STEP)


@dataclass(slots=True)
class Suite:
    """The microbenchmarks of ``accelerator``.

    Attributes:
        only: names of the parts to run, of :data:`PARTS`.
        progress: called with a part's title and None when it begins, and with each result of it.
    """

    accelerator: Accelerator
    settings: Settings
    only: tuple[str, ...] = PARTS
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.only) - set(PARTS):
            raise ValueError(
                f"no part of the benchmarks is called {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}"
            )

    def run(self) -> Report:
        free_bytes = self.accelerator.memory().free_bytes
        settings = self.settings.within(free_bytes, psutil.virtual_memory().available)
        harness = Harness(self.accelerator, settings.repeats)
        results: list[Result] = []
        for name, (title, cases) in _PARTS.items():
            if name in self.only:
                self._collect(title, cases(harness, settings), results)
        if _RANKS in self.only:
            self._collect("ranks", ranks.by_rank(self.accelerator.device, settings), results)
        step: dict[str, Any] = {}
        if _STEP in self.only and settings.step_numel:
            self._tell("steps of the optimizer", None)
            step = measure_steps(self.accelerator, settings.step_numel, settings.repeats)
        return Report(machine(self.accelerator), asdict(settings), results, figures(results, step), step)

    def _collect(self, title: str, cases: Iterator[Result], results: list[Result]) -> None:
        self._tell(title, None)
        for result in cases:
            results.append(result)
            self._tell(title, result)

    def _tell(self, title: str, result: Result | None) -> None:
        if self.progress is not None:
            self.progress(title, result)


def run_suite(
    device: torch.device | str | None = None,
    settings: Settings | None = None,
    *,
    only: tuple[str, ...] = PARTS,
    progress: Progress | None = None,
) -> Report:
    """Measure ``device`` (default: the current accelerator) and its host.

    Raises:
        ValueError: without an accelerator, or for a part that is unknown.
    """
    found = torch.accelerator.current_accelerator(check_available=True) if device is None else torch.device(device)
    if found is None or found.type == "cpu":
        raise ValueError(
            "there is no accelerator to measure; on a machine without one, measure the emulated device "
            "(offload.testing.sim.load(), or `offload bench --emulated`)"
        )
    return Suite(accelerator_for(found), settings or Settings(), only, progress).run()


def machine(accelerator: Accelerator) -> dict[str, Any]:
    """What was measured, for the head of a report."""
    device = accelerator.device
    return {
        "device": str(device),
        "device_name": accelerator.name(),
        "device_memory_bytes": accelerator.memory().total_bytes,
        "emulated": device.type == "sim",
        "processor": platform.processor() or platform.machine(),
        "num_processors": len(allowed_processors()),
        "num_numa_nodes": len(numa_nodes()),
        "host_memory_bytes": psutil.virtual_memory().total,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def figures(results: list[Result], step: dict[str, Any]) -> dict[str, float]:
    """What the results say in the performance model's terms; only what was measured."""
    found: dict[str, float] = {}
    for key, source, target in _LINKS:
        points = [
            (result.num_bytes, result.details["seconds"])
            for result in results
            if (result.group, result.source, result.target) == ("copy", source, target) and result.num_bytes
        ]
        if points:
            found[f"{key}_latency_s"], found[f"{key}_bytes_per_s"] = copies.fit_line(points)
    found.update(_both(results, found))
    for result in results:
        if result.group == "update":
            found["host_update_params_per_s"] = result.value
            found["host_dram_bytes_per_s"] = result.value * UPDATE_HOST_BYTES["fp32"]
        elif result.mode == "launch":
            found["launch_s"] = result.value
    if "compute" in step.get("work", {}):
        numel, seconds = step["work"]["compute"]
        found["device_update_params_per_s"] = numel / seconds
    return found


def _both(results: list[Result], found: dict[str, float]) -> dict[str, float]:
    """The rate each way while both are busy: what each keeps of its own, at sizes where latency does not count."""
    shares = {result.source: result.details["share_of_alone"] for result in results if result.group == "duplex"}
    alone = {"pinned": found.get("h2d_bytes_per_s"), "device": found.get("d2h_bytes_per_s")}
    rates = [min(1.0, share) * rate for source, share in shares.items() if (rate := alone[source]) is not None]
    return {"both_bytes_per_s": min(rates)} if rates else {}


def rates_of(report: Report) -> Rates | None:
    """The rates of the performance model, for bounds; None where the run left some out.

    Host memory is taken to be as fast as the CPU update was seen to use it, so its bound is an upper one.
    """
    seen = report.figures
    needed = ("h2d_bytes_per_s", "d2h_bytes_per_s", "host_update_params_per_s", "device_update_params_per_s")
    if any(key not in seen for key in needed):
        return None
    return Rates(
        **{key: seen[key] for key in needed},
        copy_latency_s=seen["h2d_latency_s"],
        both_bytes_per_s=seen.get("both_bytes_per_s", min(seen["h2d_bytes_per_s"], seen["d2h_bytes_per_s"])),
    )
